"""oplora.AdamW as a torch optimizer over PEFT models: what it steps and leaves alone, resumes and refuses."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Net, assert_same_bits, batches, factors, make_model, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oplora
from oplora import engines
from oplora.engines.settings import views

only_exact = pytest.mark.parametrize("default_state", ["exact"], indirect=True)
only_lean = pytest.mark.parametrize("default_state", ["lean"], indirect=True)


@pytest.fixture(autouse=True, params=["lean", "exact"])
def default_state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What holds for oplora.AdamW holds in every state, so each test runs with each as the default."""
    monkeypatch.setitem(oplora.AdamW.__init__.__kwdefaults__, "state", request.param)
    return request.param


def start_equal(optimizer: oplora.AdamW, generators: oplora.Generators) -> None:
    for state, generator in zip(optimizer._stepper.states, generators, strict=True):
        for name, view in views(state.pieces()["parameters"], 32, 128).items():
            assert torch.equal(view, getattr(generator, name))


# ---- the start ----


@only_exact
def test_start_is_that_of_generators_with_the_same_seed() -> None:
    start_equal(oplora.AdamW(make_model(), seed=3), oplora.Generators(make_model(), seed=3))


@only_exact
def test_start_depends_on_seed_and_layer() -> None:
    first, second = (oplora.AdamW(make_model(), seed=seed)._stepper.states for seed in (0, 1))
    first, second = ([state.pieces()["parameters"] for state in some] for some in (first, second))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0][:100], first[1][:100])


@only_exact
def test_start_is_the_papers() -> None:
    model = make_model(r=64)
    state = oplora.AdamW(model, hidden_width=32, latent_width=128)._stepper.states[0]
    start = views(state.pieces()["parameters"], 32, 128)
    of_a = 64 * 13
    assert start["W2"][:of_a].abs().max() <= 32**-0.5
    assert start["W2"][:of_a].std().item() == pytest.approx(32**-0.5 / 3**0.5, rel=0.02)
    assert not start["W2"][of_a:].any()
    assert not start["c1"].any() and not start["c2"].any()
    assert start["W1"].std().item() == pytest.approx(128**-0.5 / 3**0.5, rel=0.05)
    assert start["z"].std().item() == pytest.approx(0.01, rel=0.3)


def test_paper_start_leaves_the_model_at_its_base() -> None:
    model = make_model()
    x = next(batches(1, torch.float32))[0]
    before = model(x)
    oplora.AdamW(model)
    assert torch.equal(model(x), before)


def test_keep_start_leaves_every_factor_as_it_is() -> None:
    model = make_model(r=4, init_lora_weights="orthogonal")
    before = factors(model)
    oplora.AdamW(model, init="keep")
    assert_same_bits(factors(model), before)


def test_paper_start_keeps_layers_that_were_trained_before_and_warns() -> None:
    model = make_model(init_lora_weights="pissa")
    before = factors(model)
    with pytest.warns(UserWarning, match=r"2 of 2 layers hold a start of their own .*PiSSA"):
        oplora.AdamW(model)
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("init", ["paper", "keep"])
def test_step_with_lr_zero_moves_nothing_but_rounding(init: str) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=0.0, init=init)
    before = factors(model)
    train(model, optimizer, 3)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


# ---- what is stepped ----


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_other_parameters_get_plain_adamw(bias: str) -> None:
    model, twin = make_model(bias=bias), make_model(bias=bias)
    optimizer = oplora.AdamW(model, lr=1e-2, weight_decay=0.1)
    twin.load_state_dict(model.state_dict())
    names = [n for n, p in twin.named_parameters() if p.requires_grad and "lora_" not in n]
    plain = torch.optim.AdamW([twin.get_parameter(n) for n in names], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for n in names:
            grad = torch.randn_like(twin.get_parameter(n))
            twin.get_parameter(n).grad, model.get_parameter(n).grad = grad, grad.clone()
        plain.step()
        optimizer.step()
    assert names
    for n in names:
        assert torch.equal(model.get_parameter(n), twin.get_parameter(n))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_added_group_is_stepped_by_plain_adamw_at_its_own_rate(bias: str) -> None:
    optimizer = oplora.AdamW(make_model(bias=bias), lr=1e-2)
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [ours], "lr": 0.5})
    plain = torch.optim.AdamW([theirs], lr=0.5)
    for _ in range(3):
        ours.grad = torch.rand(3)
        theirs.grad = ours.grad.clone()
        optimizer.step(), plain.step()
    assert torch.equal(ours, theirs)
    optimizer.load_state_dict(optimizer.state_dict())


def test_modules_to_save_are_stepped() -> None:
    model = make_model(target_modules=["first"], modules_to_save=["second"])
    optimizer = oplora.AdamW(model, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n.split(".")[-3] for n in moved if "modules_to_save" in n} == {"modules_to_save"}
    assert all("lora_" in n or "modules_to_save" in n for n in moved)


def test_frozen_base_is_never_touched() -> None:
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train(model, oplora.AdamW(model, lr=1e-2), 3)
    assert_same_bits({n: p.detach() for n, p in model.named_parameters() if n in before}, before)


def test_layer_without_gradient_stays_and_its_steps_do_not_advance() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    first, second = optimizer._stepper.states
    before = copy.deepcopy(second.pieces())
    for p in first.factors.layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (first.steps, second.steps) == (1, 0)
    assert_same_bits(second.pieces(), before)


def test_zero_gradients_move_nothing_and_make_no_nan() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, weight_decay=0.0)
    before = factors(model)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(factors(model), before)


def test_one_factor_without_gradient_counts_as_zero() -> None:
    model, twin = make_model(), make_model()
    one, two = oplora.AdamW(model, lr=1e-2), oplora.AdamW(twin, lr=1e-2)
    for mine, its in zip(one.param_groups[0]["params"], two.param_groups[0]["params"], strict=True):
        grad = torch.ones_like(mine) if mine.shape[0] == 3 else None
        mine.grad, its.grad = grad, torch.zeros_like(its) if grad is None else grad
    one.step(), two.step()
    assert_same_bits(factors(model), factors(twin))


def test_frozen_factor_gets_no_generator() -> None:
    model = make_model()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    before = factors(model)
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    for name, tensor in factors(model).items():
        assert torch.equal(tensor, before[name]) == ("lora_A" in name)


def test_several_adapters_step_only_what_is_trained() -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    both = oplora.AdamW(model)
    assert {s.name.rpartition(".")[2] for s in both._stepper.states} == {"default"}
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    names = [s.name for s in oplora.AdamW(model, init="keep")._stepper.states]
    assert sorted(n.rpartition(".")[2] for n in names) == ["default", "default", "other"]
    only = oplora.AdamW(model, adapter_name="other", init="keep", lr=1e-2)
    before = factors(model)
    model.base_model.set_adapter("other")
    train(model, only, 2)
    for name, tensor in factors(model).items():
        assert torch.equal(tensor, before[name]) == (".other." not in name)


def test_switching_adapters_in_training_steps_each_in_its_turn() -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = oplora.AdamW(model, lr=1e-2)
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        before = factors(model)
        train(model, optimizer, 2)
        for name, tensor in factors(model).items():
            assert torch.equal(tensor, before[name]) == (f".{adapter}." not in name)


@only_exact
@pytest.mark.parametrize(
    "config",
    [
        dict(lora_dropout=0.3),
        dict(rank_pattern={"second": 7}),
        dict(alpha_pattern={"second": 50}),
        dict(use_rslora=True),
        dict(lora_bias=True),
    ],
    ids=str,
)
def test_peft_options_train_as_generators_under_torch_adamw_do(config: dict[str, object]) -> None:
    results = []
    for make in (
        lambda m: oplora.AdamW(m, lr=1e-2),
        lambda m: oplora.create_oplora_optimizer(m, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
    ):
        model = make_model(torch.float64, **config)
        optimizer = make(model)
        torch.manual_seed(5)  # of the dropout
        results.append(train(model, optimizer, 10, torch.float64))
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert results[0][0] != results[0][-1]


class Pictures(nn.Module):
    """The other layers that PEFT's LoRA adapts: an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.convolve = nn.Conv2d(1, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(self.table(x)[:, None]).square().mean()


@only_exact
def test_embeddings_and_convolutions_train_as_generators_under_torch_adamw_do() -> None:
    losses = []
    for make in (
        lambda m: oplora.AdamW(m, lr=1e-2),
        lambda m: oplora.create_oplora_optimizer(m, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
    ):
        torch.manual_seed(0)
        model = get_peft_model(
            Pictures().double(),
            LoraConfig(r=2, target_modules=["table", "convolve"]),
            autocast_adapter_dtype=False,
        )
        optimizer = make(model)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(torch.arange(10).view(2, 5))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] < losses[0][0]


def test_conv1d_of_gpt2_trains() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_attn", "c_proj"]))
    optimizer = oplora.AdamW(model, lr=1e-2)
    assert len(optimizer._stepper.states) == 3
    ids = torch.arange(12)[None]
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_the_float32_ones_rounded_once(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = oplora.AdamW(model, lr=1e-2)
    twin = make_model()
    twin_optimizer = oplora.AdamW(twin, lr=1e-2)
    for _ in range(3):
        for mine, its in zip(
            optimizer.param_groups[0]["params"], twin_optimizer.param_groups[0]["params"], strict=True
        ):
            mine.grad = torch.randn(mine.shape).to(dtype)
            its.grad = mine.grad.float()
        optimizer.step(), twin_optimizer.step()
    assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {dtype}
    assert_same_bits(factors(model), {n: t.to(dtype) for n, t in factors(twin).items()})


def test_factors_of_several_dtypes_in_one_model() -> None:
    model = make_model()
    model.base_model.model.second.double()
    optimizer = oplora.AdamW(model, lr=1e-2)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    before = factors(model)
    optimizer.step()
    assert all(not torch.equal(t, before[n]) for n, t in factors(model).items())


# ---- loops ----


def test_accumulated_gradients_equal_the_sum() -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    one, two = oplora.AdamW(model, lr=1e-2), oplora.AdamW(twin, lr=1e-2)
    data = list(batches(4, torch.float64))
    for x, y in data:
        (model(x) - y).square().mean().backward()
    sum((twin(x) - y).square().mean() for x, y in data).backward()
    one.step(), two.step()
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name], rtol=1e-12, atol=1e-14)


def test_schedulers_set_the_rate() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5][min(step, 1)])
    before = factors(model)
    train(model, optimizer, 1)
    assert_same_bits(factors(model), before)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    train(model, optimizer, 1)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in factors(model).items())


def test_closure_is_evaluated_and_its_loss_returned() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    x, y = next(batches(1, torch.float32))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


def test_stale_graphs_are_caught() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    x, y = next(batches(1, torch.float32))
    loss = (model(x) - y).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@only_exact
def test_clip_grad_norm_is_that_of_torch_over_all_parameters() -> None:
    model = make_model(torch.float64, bias="all")
    twin = make_model(torch.float64, bias="all")
    ours = oplora.AdamW(model, lr=1e-2)
    theirs = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
    for x, y in batches(5, torch.float64):
        for m, o in ((model, ours), (twin, theirs)):
            o.zero_grad()
            (m(x) - y).square().mean().backward()
        norm = ours.clip_grad_norm_(0.1)
        theirs.generators.backward()
        truth = nn.utils.clip_grad_norm_([*theirs.generators.parameters(), *theirs.param_groups[1]["params"]], 0.1)
        assert norm.item() == pytest.approx(truth.item(), rel=1e-12)
        ours.step(), theirs.step()
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name], rtol=1e-11, atol=1e-13)


def test_gradients_changed_after_clipping_are_measured_again() -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    one, two = oplora.AdamW(model, lr=1e-2), oplora.AdamW(twin, lr=1e-2)
    x, y = next(batches(1, torch.float64))
    for m in (model, twin):
        (m(x) - y).square().mean().backward()
    one.clip_grad_norm_(1e9)
    for p in [*one.param_groups[0]["params"], *two.param_groups[0]["params"]]:
        p.grad.mul_(0.5)
    one.step(), two.step()
    assert_same_bits(factors(model), factors(twin))


# ---- determinism ----


def test_same_bits_for_any_number_of_threads(threads) -> None:
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        torch.manual_seed(0)
        model = get_peft_model(Net((300, 700, 900)), LoraConfig(r=16, target_modules=["first", "second"]))
        # one layer small enough for one thread, one that is spread: both ways of the core
        optimizer = oplora.AdamW(model, lr=1e-2, hidden_width=100)
        for seed in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        results.append(factors(model))
    for result in results[1:]:
        assert_same_bits(result, results[0])


# ---- resume ----


def assert_same_state(ours: dict[str, object], theirs: dict[str, object]) -> None:
    """Of two state_dicts."""
    assert ours["state"].keys() == theirs["state"].keys()
    for number, entry in ours["state"].items():
        assert entry.keys() == theirs["state"][number].keys()
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs["state"][number][name]), (number, name)
            else:
                assert value == theirs["state"][number][name], (number, name)


def saved_and_loaded(state: dict[str, object]) -> dict[str, object]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@settings(max_examples=15, deadline=None)
@given(
    before=st.integers(0, 4),
    after=st.integers(1, 4),
    init=st.sampled_from(["paper", "keep"]),
    hidden_width=st.sampled_from([1, 5, 32]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.sampled_from(["none", "all"]),
    weight_decay=st.sampled_from([0.0, 0.5]),
)
def test_resume_equals_uninterrupted_bit_for_bit(
    before: int, after: int, init: str, hidden_width: int, dtype: torch.dtype, bias: str, weight_decay: float
) -> None:
    options = dict(lr=1e-2, init=init, hidden_width=hidden_width, weight_decay=weight_decay)
    model = make_model(dtype, bias=bias)
    optimizer = oplora.AdamW(model, **options)
    train(model, optimizer, before, dtype)
    state = saved_and_loaded(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())

    fresh = make_model(dtype, bias=bias)
    resumed = oplora.AdamW(fresh, **options)
    fresh.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert_same_bits(factors(fresh), factors(model))
    assert train(fresh, resumed, after, dtype) == train(model, optimizer, after, dtype)
    assert_same_bits(factors(fresh), factors(model))


def test_resume_writes_the_factors_into_a_fresh_model() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    fresh = make_model()
    resumed = oplora.AdamW(fresh, lr=1e-2, seed=9)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same_bits(factors(fresh), factors(model))


def test_resume_from_a_trained_adapter_file() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="hold a start of their own"):
        resumed = oplora.AdamW(fresh, lr=1e-2)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert train(fresh, resumed, 3) == train(model, optimizer, 3)


def test_resume_restores_rates_and_steps() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 7e-3
    resumed = oplora.AdamW(make_model(), lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 7e-3
    assert [s.steps for s in resumed._stepper.states] == [2, 2]


OTHERS = {
    "rank": (lambda: oplora.AdamW(make_model(r=4)), "has shapes"),
    "hidden width": (lambda: oplora.AdamW(make_model(), hidden_width=8), "has hidden_width"),
    "latent width": (lambda: oplora.AdamW(make_model(), latent_width=8), "has latent_width"),
    "layers": (lambda: oplora.AdamW(make_model(target_modules=["first"])), "of other layers.*lacks .*second.default"),
    "dtype": (lambda: oplora.AdamW(make_model(torch.float64)), "float64"),
    "adapter": (
        lambda: oplora.AdamW(get_peft_model(Net(), LoraConfig(r=3, target_modules=["first", "second"]), "b")),
        "second.b",
    ),
    "optimizer": (lambda: torch.optim.AdamW(make_model().parameters()), "no generators"),
    "groups": (lambda: oplora.AdamW(make_model(bias="all")), "parameter groups do not fit"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_state_of_another_run_is_refused_and_changes_nothing(what: str) -> None:
    make, message = OTHERS[what]
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    before, kept = factors(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(oplora.OPLoRAError, match=message):
        optimizer.load_state_dict(make().state_dict())
    assert_same_bits(factors(model), before)
    assert_same_state(optimizer.state_dict(), kept)


def keys_of(state: str) -> list[str]:
    return list(oplora.AdamW(make_model(), state=state).state_dict()["state"][0])


@pytest.mark.parametrize("key", sorted({*keys_of("lean"), *keys_of("exact")}))
def test_damaged_state_is_refused(key: str) -> None:
    optimizer = oplora.AdamW(make_model())
    state = copy.deepcopy(optimizer.state_dict())
    if key not in (saved := state["state"][0]):
        pytest.skip("of the other state")
    saved[key] = None if key != "step" else -1
    with pytest.raises(oplora.OPLoRAError, match="of layer"):
        optimizer.load_state_dict(state)
    del saved[key]
    with pytest.raises(oplora.OPLoRAError, match=f"lacks {key}|no generators"):
        optimizer.load_state_dict(state)


def test_state_of_another_kind_is_refused(default_state: str) -> None:
    other = {"lean": "exact", "exact": "lean"}[default_state]
    saved = oplora.AdamW(make_model(), state=other).state_dict()
    message = f"with state='{other}'.*, this one has state='{default_state}'.* load the saved adapter and no state"
    with pytest.raises(oplora.OPLoRAError, match=message):
        oplora.AdamW(make_model()).load_state_dict(saved)


def test_saved_adapter_goes_on_in_the_other_state(default_state: str, tmp_path: Path) -> None:
    """What that message tells to do."""
    other = {"lean": "exact", "exact": "lean"}[default_state]
    model = make_model()
    train(model, oplora.AdamW(model, lr=1e-2, state=other), 5)
    oplora.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    optimizer = oplora.AdamW(loaded, lr=1e-2, init="keep")
    assert_same_bits(factors(loaded), factors(model))
    losses = train(loaded, optimizer, 30)
    assert losses[-1] < losses[0]


@only_lean
@pytest.mark.parametrize("other", [{"weight_rank": 3}, {"moment_rank": 2}, {"start": "uniform"}], ids=str)
def test_lean_state_of_other_numbers_is_refused(other: dict[str, object]) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    before, kept = factors(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(oplora.OPLoRAError, match=f"has {next(iter(other))}"):
        optimizer.load_state_dict(oplora.AdamW(make_model(), **other).state_dict())
    assert_same_bits(factors(model), before)
    assert_same_state(optimizer.state_dict(), kept)


# ---- other hands on the factors ----


@only_lean
def test_edits_between_steps_become_part_of_the_bias() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-3)
    train(model, optimizer, 2)
    model.load_state_dict({n: torch.full_like(t, 0.25) for n, t in factors(model).items()}, strict=False)
    train(model, optimizer, 1)
    for tensor in factors(model).values():
        assert (tensor - 0.25).abs().max() < 0.02


@only_exact
def test_edits_between_steps_are_adopted_with_a_warning() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-3)
    train(model, optimizer, 2)
    edited = {n: torch.full_like(t, 0.25) for n, t in factors(model).items()}
    model.load_state_dict(edited, strict=False)
    with pytest.warns(UserWarning, match=r"factors of 2 layer\(s\) were changed"):
        train(model, optimizer, 1)
    for tensor in factors(model).values():
        assert (tensor - 0.25).abs().max() < 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)


def test_writing_the_same_values_is_no_edit() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-3)
    model.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    assert all(base is None for state in optimizer._stepper.states for base in state.factors.bases)


def test_replaced_parameters_are_found_through_the_layer() -> None:
    model, twin = make_model(), make_model()
    one, two = oplora.AdamW(model, lr=1e-2), oplora.AdamW(twin, lr=1e-2)
    train(model, one, 1), train(twin, two, 1)
    linear = model.base_model.model.first.lora_A["default"]
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    train(model, one, 2), train(twin, two, 2)
    assert_same_bits(factors(model), factors(twin))
    assert any(p is linear.weight for p in one.param_groups[0]["params"])


def test_model_moved_to_another_dtype_goes_on() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 1)
    model.to(torch.bfloat16)
    train(model, optimizer, 2, torch.bfloat16)
    model.to(torch.float32)
    train(model, optimizer, 2)
    assert all(t.isfinite().all() for t in factors(model).values())


def test_model_moved_to_bfloat16_loses_no_small_step() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-5, weight_decay=0.0)
    model.to(torch.bfloat16)
    before = factors(model)
    for _ in range(300):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = [(before[n].float() - t.float()).mean() for n, t in factors(model).items()]
    assert all(m > 2e-3 for m in moved)


# ---- the ops ----


class Recorder(TorchDispatchMode):
    """Keeps a copy of what each of our ops was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, list[object]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "oplora":
            self.calls.append((func, [copied(argument) for argument in args]))
        return func(*args, **(kwargs or {}))


def copied(argument: object) -> object:
    if isinstance(argument, torch.Tensor):
        return argument.detach().clone()
    return [copied(item) for item in argument] if isinstance(argument, list | tuple) else argument


@pytest.mark.parametrize("init", ["paper", "keep"])
def test_ops_change_what_their_schemas_say(default_state: str, init: str) -> None:
    model = make_model()
    with Recorder() as recorder:
        optimizer = oplora.AdamW(model, init=init)
        for clip in (False, True):
            train(model, optimizer, 1)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            if clip:
                optimizer.clip_grad_norm_(0.1)
            optimizer.step()
    called = {func.name().removeprefix("oplora::") for func, _ in recorder.calls}
    first = {"lean": "lean_start_", "exact": "exact_generate_"}[default_state]
    assert called == {first, f"{default_state}_measure_", f"{default_state}_step_", "fingerprint"}
    for func, args in recorder.calls:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_autograd_registration"))


# ---- bad input ----


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_gradient_is_refused_and_changes_nothing(where: str, value: float) -> None:
    model = make_model(bias="all")
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    x, y = next(batches(1, torch.float32))
    (model(x) - y).square().mean().backward()
    next(p for n, p in model.named_parameters() if where in n and p.requires_grad).grad.view(-1)[-1] = value
    with pytest.raises(oplora.OPLoRAError, match="NaN or infinity"):
        optimizer.step()
    assert_same_bits(model.state_dict(), before)
    assert [generator.steps for generator in optimizer._stepper.states] == [2, 2]
    assert_same_state(optimizer.state_dict(), state)


def test_nonfinite_gradient_names_the_layer() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    optimizer._stepper.states[1].factors.layer.parameters()[1].grad[0, 0] = float("nan")
    with pytest.raises(oplora.OPLoRAError, match=r"layer base_model\.model\.second\.default"):
        optimizer.step()


def test_nonfinite_step_is_skipped_if_asked() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, skip_nonfinite=True)
    train(model, optimizer, 1)
    before = factors(model)
    optimizer.param_groups[0]["params"][0].grad[0] = float("inf")
    optimizer.step()
    assert_same_bits(factors(model), before)


def test_nonfinite_norm_leaves_the_gradients_for_step_to_refuse() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    gradient = optimizer.param_groups[0]["params"][0].grad
    gradient[0] = float("inf")
    before = gradient.clone()
    assert not optimizer.clip_grad_norm_(1.0).isfinite()
    assert torch.equal(gradient, before)
    with pytest.raises(oplora.OPLoRAError, match="NaN or infinity"):
        optimizer.step()


@pytest.mark.parametrize("preset", ["paper", "auto"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("scale", [0, 1e-30, 1e-22, 1e18, 1e30, 7.5e36, 3.4e38])
def test_extreme_gradients_stay_finite(scale: float, eps: float, preset: str) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, eps=eps, **({"lr": 1e-3} if preset == "paper" else {"state": None}))
    for step in range(6):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn_like(p).sign() * (scale if step < 3 else 1)
        optimizer.step()
    assert all(t.isfinite().all() for t in factors(model).values())
    for state in optimizer._stepper.states:
        assert all(piece.isfinite().all() for piece in state.pieces().values())


def test_merged_layer_refuses_the_step() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    model.merge_adapter()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=r"layer base_model\.model\.first\.default is merged.*unmerge_adapter"):
        optimizer.step()
    assert_same_bits(factors(model), before)
    model.unmerge_adapter()
    optimizer.step()


def test_disabled_layer_refuses_the_step() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 1)
    with model.disable_adapter(), pytest.raises(oplora.OPLoRAError, match="are disabled"):
        optimizer.step()
    optimizer.step()


def test_model_without_adapter_is_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"Net has no LoRA layer.*get_peft_model.*oplora\.wrap"):
        oplora.AdamW(Net())


def test_optimizer_before_the_adapter_is_told_to_come_after_it() -> None:
    linear = nn.Sequential(nn.Linear(13, 5), nn.Linear(5, 21), nn.Linear(21, 5))
    with pytest.raises(oplora.OPLoRAError, match="after get_peft_model"):
        oplora.AdamW(linear.parameters())


def test_rate_by_its_name_elsewhere_is_told_to_be_left_out() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"no argument 'learning_rate'.*leave it out"):
        oplora.AdamW(make_model(), learning_rate=1e-4)


def test_frozen_adapter_is_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"No adapter is trainable.*set_adapter\('default'\)"):
        oplora.AdamW(make_model(inference_mode=True))


def test_unknown_adapter_name_is_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"no adapter is named 'x'; the model has 'default'"):
        oplora.AdamW(make_model(), adapter_name="x")


def test_factors_on_meta_are_refused() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"lora_A of layer .*first\.default is on the meta device"):
        oplora.AdamW(make_model().to("meta"))


def test_deleted_adapter_is_named() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(oplora.OPLoRAError, match="no longer holds adapter 'default'"):
        optimizer.step()


BAD_ARGUMENTS = {
    "hidden_width": [0, -1, 1.5],
    "latent_width": [0],
    "latent_std": [-1.0, float("nan"), float("inf")],
    "lr": [-1e-3, float("nan")],
    "eps": [-1.0],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (0.9,)],
    "weight_decay": [-0.1],
    "hidden_lr_ratio": [-1.0],
    "state": ["lean?"],
    "start": ["normal", 1],
    "weight_rank": [0, 9, 1.5],
    "moment_rank": [0, 9],
    "init": ["zero"],
    "seed": [-1, 2**64],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_ARGUMENTS.items() for v in values])
def test_argument_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(oplora.OPLoRAError, match=name):
        oplora.AdamW(make_model(), **{name: value})


def test_more_than_memory_is_refused_before_allocating(default_state: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match=rf"need [\d.]+ GiB, this machine has .* '{default_state}' takes"):
        oplora.AdamW(make_model(), hidden_width=10**11)


@only_exact
def test_layer_of_more_than_two_to_the_31_numbers_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width, lr = 2**24 + 3, 129, 0.5  # 26 GB of W2, m and v, of which one column is ever touched
    monkeypatch.setattr(engines, "refuse_more_than_memory", lambda *_: None)
    model = get_peft_model(nn.Sequential(nn.Linear(1, rows, bias=False)), LoraConfig(r=1, target_modules=["0"]))
    optimizer = oplora.AdamW(model, lr=lr, hidden_width=width, latent_width=1, hidden_lr_ratio=0.0, weight_decay=0.0)
    state = optimizer._stepper.states[0]
    assert width * sum(state.factors.sizes) > 2**31
    bias = views(state.pieces()["parameters"], width, 1)["c1"]
    bias[:-1], bias[-1] = -1, 3
    state.engine.begin()
    A, B = state.factors.layer.parameters()
    A.grad, B.grad = torch.zeros_like(A), torch.ones_like(B)
    optimizer.step()
    h = oplora.stats(optimizer)[state.name]["trainable_lr"] ** 0.5
    assert h == pytest.approx(3, abs=0.1)
    torch.testing.assert_close(B.detach(), torch.full_like(B, -lr * (1 + h * 32 / width)), rtol=1e-5, atol=0)


# ---- copies ----


def test_copy_of_model_and_optimizer_trains_on_alike() -> None:
    model = make_model(bias="all")
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 3) == train(twin, copied, 3)
    assert_same_bits(factors(model), factors(twin))


def test_copy_made_under_a_scheduler_steps_itself() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # puts a `step` of its own into the optimizer
    train(model, optimizer, 1)
    twin, copied = copy.deepcopy((model, optimizer))
    before = factors(model)
    train(twin, copied, 1)
    assert_same_bits(factors(model), before)
    assert all(not torch.equal(p, before[name]) for name, p in factors(twin).items())


# ---- memory ----


def kept(state: dict[torch.Tensor, dict[str, object]]) -> list[torch.Tensor]:
    """The tensors of optimizer.state, but for the factors themselves and the counts of steps."""
    entries = (item for entry in state.values() for item in entry.items())
    return [t for name, t in entries if isinstance(t, torch.Tensor) and name not in ("factor", "step")]


@only_exact
def test_state_takes_12_bytes_an_element_and_small_terms() -> None:
    model = get_peft_model(Net((256, 512, 128)), LoraConfig(r=16, target_modules=["first", "second"]))
    state = oplora.AdamW(model).state
    held = sum(t.numel() * t.element_size() for t in kept(state))
    N = 16 * (256 + 512 + 512 + 128)
    assert 12 * 32 * N <= held <= 12 * 33 * N + 12 * 2 * (32 * 128 + 32 + 128) + 2 * (32 * 8 * 2 + 32 + 8)


@only_lean
@pytest.mark.parametrize("hidden_width", [8, 512])
def test_lean_state_takes_16_bytes_an_entry_and_terms_of_the_width(hidden_width: int) -> None:
    model = get_peft_model(Net((256, 512, 128)), LoraConfig(r=16, target_modules=["first", "second"]))
    state = oplora.AdamW(model, hidden_width=hidden_width).state
    own = kept(state)
    N = 16 * (256 + 512 + 512 + 128)
    assert sum(t.numel() * t.element_size() for t in own) == 16 * N + 2 * (36 * hidden_width + 28 * 128 + 32)


@only_lean
def test_saved_lean_state_is_as_small() -> None:
    model = get_peft_model(Net((256, 512, 128)), LoraConfig(r=16, target_modules=["first", "second"]))
    buffer = io.BytesIO()
    torch.save(oplora.AdamW(model, hidden_width=64).state_dict(), buffer)
    N = 16 * (256 + 512 + 512 + 128)
    assert len(buffer.getvalue()) < (16 + 4 + 2) * N  # with the factors, which are saved too


MEMORY_SCRIPT = """
import resource, sys, torch, oplora
from torch import nn
from peft import LoraConfig, get_peft_model
model = nn.Sequential(nn.Linear(2000, 2000, bias=False))
model = get_peft_model(model, LoraConfig(r=128, target_modules=["0"]))
optimizer = oplora.AdamW(model, lr=1e-3, state="exact")
W2 = sum(32 * sum(s.factors.sizes) * 4 for s in optimizer._stepper.states)
for p in optimizer.param_groups[0]["params"]:
    p.grad = torch.ones_like(p)
for state in optimizer._stepper.states:  # touch all of W2, m and v, so that nothing may hide in pages not yet resident
    state.pieces()["moving"].fill_(1)
optimizer.step()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
optimizer.clip_grad_norm_(1.0)
optimizer.step()
optimizer.state_dict()
print(W2, peak() - before)
"""


@only_exact
def test_no_array_of_the_size_of_w2_appears_in_a_step() -> None:
    out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True).stdout
    W2, grown = map(int, out.split())
    assert W2 > 60_000_000
    assert grown < 0.1 * W2


# ---- the adapter ----


def test_nothing_of_the_generator_is_in_the_model() -> None:
    model = make_model()
    before = set(model.state_dict()), set(get_peft_model_state_dict(model))
    train(model, oplora.AdamW(model), 1)
    assert (set(model.state_dict()), set(get_peft_model_state_dict(model))) == before
