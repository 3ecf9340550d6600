"""oplora.AdamW in the loops that people write: loss scaling, compiling, checkpointing, half precision, several adapters
and optimizers, schedulers, closures, averages of the weights."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import Net, assert_same_bits, batches, factors, make_model, options_of, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_flatten

import oplora
from oplora.errors import OPLoRARuntimeError

every_state = pytest.mark.parametrize("state", ["lean", "exact", "auto"])
both_halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

# its gradients are finite by themselves, but not when they are scaled
OVERFLOWING = (torch.ones(8, 13), torch.full((8, 5), 1e38))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a step may change: weights, generators, moments, step counts, rates."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def assert_same_trees(ours: object, theirs: object) -> None:
    (mine, shape), (its, its_shape) = tree_flatten(ours), tree_flatten(theirs)
    assert shape == its_shape
    for a, b in zip(mine, its, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal to rounding: for models in float64."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-10, atol=1e-12)


def of_adapter(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Everything in the model that belongs to one adapter: factors, magnitudes, biases, modules_to_save."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".{adapter}." in name}


# ---- loss scaling ----


def train_scaled(
    model: nn.Module,
    optimizer: oplora.AdamW,
    scaler: GradScaler,
    data: Iterable[tuple[Tensor, Tensor]],
    max_norm: float | None = None,
) -> None:
    for x, y in data:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        if max_norm is not None:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(max_norm)
        scaler.step(optimizer)
        scaler.update()


def replace_parameters(model: nn.Module, path: Path) -> None:
    """Loads the adapter's own values into it, by the way on which PEFT puts new Parameters into the layers."""
    model.save_pretrained(path)
    model.load_adapter(path, "default", is_trainable=True, low_cpu_mem_usage=True)


@every_state
@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_grad_scaler_skips_an_overflowing_step_and_changes_nothing(
    state: str, skip_nonfinite: bool, max_norm: float | None
) -> None:
    model, scaler = make_model(bias="all"), GradScaler("cpu")
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state), skip_nonfinite=skip_nonfinite)
    train_scaled(model, optimizer, scaler, batches(2, torch.float32), max_norm)
    before = everything(model, optimizer)
    train_scaled(model, optimizer, scaler, [OVERFLOWING], max_norm)
    assert_same_trees(everything(model, optimizer), before)


def test_grad_scaler_halves_its_scale_at_an_overflowing_step() -> None:
    model, scaler = make_model(), GradScaler("cpu", init_scale=1024.0)
    train_scaled(model, oplora.AdamW(model), scaler, [OVERFLOWING])
    assert scaler.get_scale() == 512.0


@every_state
def test_training_goes_on_after_a_skipped_batch_as_if_it_had_not_been(state: str) -> None:
    data, results = list(batches(5, torch.float32)), []
    for seen in (data, [*data[:2], OVERFLOWING, *data[2:]]):
        model = make_model(bias="all")
        optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
        train_scaled(model, optimizer, GradScaler("cpu"), seen)
        results.append(everything(model, optimizer))
    assert_same_trees(*results)


@every_state
def test_scaling_by_a_power_of_two_leaves_the_bits_of_training(state: str) -> None:
    model, twin = make_model(), make_model()
    train_scaled(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), GradScaler("cpu"), batches(4, torch.float32))
    train(twin, oplora.AdamW(twin, lr=1e-2, **options_of(state)), 4)
    assert_same_bits(factors(model), factors(twin))


@every_state
def test_clipping_after_unscale_is_clipping_without_a_scaler(state: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizers = [oplora.AdamW(m, lr=1e-2, **options_of(state)) for m in (model, twin)]
    train_scaled(model, optimizers[0], GradScaler("cpu"), batches(4, torch.float32), max_norm=0.05)
    for x, y in batches(4, torch.float32):
        optimizers[1].zero_grad()
        loss_of(twin, x, y).backward()
        assert optimizers[1].clip_grad_norm_(0.05) > 0.05
        optimizers[1].step()
    assert_same_trees(everything(model, optimizers[0]), everything(twin, optimizers[1]))


@every_state
def test_zero_grad_clears_gradients_of_parameters_that_were_replaced(state: str, tmp_path: Path) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, **options_of(state))
    dead = list(optimizer.param_groups[0]["params"])
    replace_parameters(model, tmp_path)
    live = [p for name, p in model.named_parameters() if "lora_" in name]
    assert not {id(p) for p in live} & {id(p) for p in dead}
    for p in live:
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    assert all(p.grad is None for p in live)


@every_state
def test_grad_scaler_unscales_parameters_that_were_replaced(state: str, tmp_path: Path) -> None:
    model, twin = make_model(), make_model()
    optimizers = [oplora.AdamW(m, lr=1e-2, **options_of(state)) for m in (model, twin)]
    replace_parameters(model, tmp_path)
    train_scaled(model, optimizers[0], GradScaler("cpu"), batches(3, torch.float32))
    train(twin, optimizers[1], 3)
    assert_same_bits(factors(model), factors(twin))


def test_grad_scaler_skips_an_overflowing_step_of_parameters_that_were_replaced(tmp_path: Path) -> None:
    model, scaler = make_model(), GradScaler("cpu", init_scale=1024.0)
    optimizer = oplora.AdamW(model)
    replace_parameters(model, tmp_path)
    before = factors(model)
    train_scaled(model, optimizer, scaler, [OVERFLOWING])
    assert_same_bits(factors(model), before)
    assert scaler.get_scale() == 512.0


# ---- torch.compile ----


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def tiny_llama(**config: object) -> nn.Module:
    """Llama of two layers with LoRA, always from the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **config)
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), lora)


def train_llama(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    torch.manual_seed(5)  # of data and dropout
    losses = []
    for ids in torch.randint(64, (steps, 2, 9)):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_model_is_compiled_once_for_all_steps() -> None:
    model = compiled(tiny_llama())
    optimizer = oplora.AdamW(model, lr=1e-2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_llama(model, optimizer, 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("_fresh_dynamo")
@every_state
@pytest.mark.parametrize("first", ["compile", "optimizer"])
def test_compiled_model_trains_as_the_uncompiled_one(state: str, first: str) -> None:
    twin, model = make_model(torch.float64), make_model(torch.float64)
    fast = compiled(model)
    optimizer = oplora.AdamW(fast if first == "compile" else model, lr=1e-2, **options_of(state))
    train(fast, optimizer, 4, torch.float64)
    train(twin, oplora.AdamW(twin, lr=1e-2, **options_of(state)), 4, torch.float64)
    assert_close(factors(model), factors(twin))


@pytest.mark.usefixtures("_fresh_dynamo")
@every_state
def test_state_of_a_compiled_model_resumes_in_an_uncompiled_one(state: str) -> None:
    model, fresh = compiled(make_model()), make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    train(model, optimizer, 2)
    resumed = oplora.AdamW(fresh, lr=1.0, **options_of(state))
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_bits(factors(fresh), factors(model._orig_mod))


# ---- gradient checkpointing ----


@every_state
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(state: str, use_reentrant: bool) -> None:
    results, forwards = [], []
    for checkpointing in (False, True):
        model = tiny_llama(lora_dropout=0.2)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        layer = model.get_base_model().model.layers[0]
        calls: list[None] = []
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        losses = train_llama(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 3)
        results.append((losses, factors(model)))
        forwards.append(len(calls))
    assert forwards == [3, 6]  # so it was in force
    assert_same_trees(*results)


# ---- half precision ----


def half_model(dtype: torch.dtype, autocast_adapter_dtype: bool) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second"])
    return get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)


def train_on_one_batch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> list[float]:
    losses = []
    for x, y in [*batches(1, dtype)] * steps:
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_state
@both_halves
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_adapter_of_a_half_precision_base_trains_in_its_own_dtype(
    state: str, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    model = half_model(dtype, autocast_adapter_dtype)
    losses = train_on_one_batch(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 20, dtype)
    assert {t.dtype for t in factors(model).values()} == {torch.float32 if autocast_adapter_dtype else dtype}
    assert losses[-1] < 0.5 * losses[0]


@every_state
@both_halves
def test_model_under_autocast_trains(state: str, dtype: torch.dtype) -> None:
    model = make_model()
    losses = train_on_one_batch(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 20, autocast=dtype)
    assert losses[-1] < 0.5 * losses[0]


@every_state
@both_halves
# in state exact, what the file rounded is an edit
@pytest.mark.filterwarnings("ignore:oplora. the factors of 2 layer")
def test_adapter_cast_by_load_adapter_is_trained_by_the_optimizer_made_before(
    state: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = half_model(dtype, autocast_adapter_dtype=False)
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {t.dtype for t in factors(model).values()} == {torch.float32}  # PEFT has made new Parameters
    losses = train_on_one_batch(model, optimizer, 20, dtype)
    assert losses[-1] < 0.5 * losses[0]


# ---- several adapters, several optimizers ----


def two_adapters(dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """Adapters "one" and "two", both trainable; "one" is active."""
    torch.manual_seed(0)
    settings = {"r": 3, "target_modules": ["first", "second"], **config}
    model = get_peft_model(Net().to(dtype), LoraConfig(**settings), "one")
    model.add_adapter("two", LoraConfig(**settings))
    model.set_requires_grad(["one", "two"])
    return model


def train_both(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int) -> list[float]:
    """With the sum of both adapters active."""
    model.base_model.set_adapter(["one", "two"])
    losses = []
    for x, y in [*batches(1, torch.float32)] * steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


KEPT_BY_ADAPTER = {
    "factors": {},
    "modules_to_save": {"target_modules": ["first"], "modules_to_save": ["second"]},
    "magnitudes": {"use_dora": True},
    "lora biases": {"lora_bias": True},
}


@every_state
@pytest.mark.parametrize("kept", KEPT_BY_ADAPTER)
def test_optimizer_of_one_adapter_steps_all_of_it_and_nothing_of_another(state: str, kept: str) -> None:
    model = two_adapters(**KEPT_BY_ADAPTER[kept])
    optimizer = oplora.AdamW(model, lr=1e-2, adapter_name="one", **options_of(state))
    mine, its = of_adapter(model, "one"), of_adapter(model, "two")
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if name in mine or name in its else None
    optimizer.step()
    assert_same_bits(of_adapter(model, "two"), its)
    assert all(not torch.equal(tensor, mine[name]) for name, tensor in of_adapter(model, "one").items())


@pytest.mark.parametrize("state", ["lean", "exact"])  # which write a start of their own
def test_two_optimizers_in_turn_train_each_adapter_as_if_it_were_alone(state: str) -> None:
    model = two_adapters()
    optimizers = {name: oplora.AdamW(model, lr=1e-2, adapter_name=name, **options_of(state)) for name in ("one", "two")}
    turns = ("one", "two", "one")
    for name in turns:
        model.set_adapter(name)
        train(model, optimizers[name], 2)
    for name, optimizer in optimizers.items():
        torch.manual_seed(0)
        alone = get_peft_model(Net(), LoraConfig(r=3, target_modules=["first", "second"]), name)
        its = oplora.AdamW(alone, lr=1e-2, **options_of(state))
        for _ in range(turns.count(name)):
            train(alone, its, 2)
        assert_same_bits(of_adapter(model, name), of_adapter(alone, name))
        assert_same_trees(optimizer.state_dict(), its.state_dict())


@every_state
def test_two_optimizers_train_the_sum_of_two_adapters(state: str) -> None:
    model = two_adapters()
    losses = train_both(
        model, [oplora.AdamW(model, lr=1e-2, adapter_name=n, **options_of(state)) for n in ("one", "two")], 20
    )
    assert losses[-1] < 0.5 * losses[0]


@every_state
def test_loading_one_optimizers_state_leaves_the_other_adapter(state: str) -> None:
    model = two_adapters()
    optimizers = [oplora.AdamW(model, lr=1e-2, adapter_name=name, **options_of(state)) for name in ("one", "two")]
    train_both(model, optimizers, 2)
    saved, then = copy.deepcopy(optimizers[0].state_dict()), of_adapter(model, "one")
    train_both(model, optimizers, 2)
    its = of_adapter(model, "two"), copy.deepcopy(optimizers[1].state_dict())
    optimizers[0].load_state_dict(saved)
    assert_same_bits(of_adapter(model, "one"), then)
    assert_same_trees((of_adapter(model, "two"), optimizers[1].state_dict()), its)


@every_state
def test_two_optimizers_resume_bit_for_bit(state: str) -> None:
    model, fresh = two_adapters(), two_adapters()
    optimizers, resumed = (
        [oplora.AdamW(m, lr=lr, adapter_name=name, **options_of(state)) for name in ("one", "two")]
        for m, lr in ((model, 1e-2), (fresh, 1.0))
    )
    train_both(model, optimizers, 2)
    for mine, its in zip(resumed, optimizers, strict=True):
        mine.load_state_dict(copy.deepcopy(its.state_dict()))
    assert train_both(fresh, resumed, 3) == train_both(model, optimizers, 3)
    assert_same_bits(factors(fresh), factors(model))


@every_state
def test_torch_adamw_of_another_adapter_trains_beside_it(state: str) -> None:
    model = two_adapters()
    ours = oplora.AdamW(model, lr=1e-2, adapter_name="one", **options_of(state))
    theirs = torch.optim.AdamW([p for name, p in model.named_parameters() if ".two." in name], lr=1e-2)
    losses = train_both(model, [ours, theirs], 20)
    assert losses[-1] < 0.5 * losses[0]
    for mine, its, optimizer in (("one", "two", ours), ("two", "one", theirs)):
        before = of_adapter(model, mine), of_adapter(model, its)
        optimizer.step()
        assert all(not torch.equal(tensor, before[0][name]) for name, tensor in of_adapter(model, mine).items())
        assert_same_bits(of_adapter(model, its), before[1])


@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapter_added_in_training_changes_nothing_for_the_old_one(state: str, dtype: torch.dtype) -> None:
    model, twin = make_model(dtype), make_model(dtype)
    optimizers = [oplora.AdamW(m, lr=1e-2, **options_of(state)) for m in (model, twin)]
    train(model, optimizers[0], 2, dtype)
    model.add_adapter("added", LoraConfig(r=2, target_modules=["first", "second"]))
    added = of_adapter(model, "added")
    train(model, optimizers[0], 2, dtype)
    for _ in range(2):
        train(twin, optimizers[1], 2, dtype)
    assert_same_bits(of_adapter(model, "default"), factors(twin))
    assert_same_bits(of_adapter(model, "added"), added)


@every_state
def test_step_is_refused_where_only_an_adapter_is_trained_that_the_optimizer_does_not_know(state: str) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    train(model, optimizer, 1)
    model.add_adapter("added", LoraConfig(r=2, target_modules=["first", "second"]))
    model.set_adapter("added")
    before = everything(model, optimizer)
    with pytest.raises(OPLoRARuntimeError, match="added"):
        train(model, optimizer, 1)
    assert_same_trees(everything(model, optimizer), before)


@every_state
def test_switching_back_from_an_unknown_adapter_goes_on_bit_for_bit(state: str) -> None:
    model, twin = make_model(), make_model()
    optimizers = [oplora.AdamW(m, lr=1e-2, **options_of(state)) for m in (model, twin)]
    train(model, optimizers[0], 2)
    model.add_adapter("added", LoraConfig(r=2, target_modules=["first", "second"]))
    model.set_adapter("added")
    with pytest.raises(OPLoRARuntimeError):
        train(model, optimizers[0], 1)
    model.set_adapter("default")
    train(model, optimizers[0], 2)
    for _ in range(2):
        train(twin, optimizers[1], 2)
    assert_same_bits(of_adapter(model, "default"), factors(twin))


# ---- schedulers and closures ----


def one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=8)


SCHEDULERS = {
    "OneCycleLR": one_cycle,
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 2e-2, step_size_up=2),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 6)],
        milestones=[2],
    ),
}


def train_scheduled(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, data: Iterable[tuple[Tensor, Tensor]]
) -> None:
    for x, y in data:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_drives_it_as_it_drives_generators_under_torch_adamw(name: str) -> None:
    model, twin = (make_model(torch.float64, bias="all") for _ in range(2))
    ours = oplora.AdamW(model, lr=1e-2, state="exact")
    theirs = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
    for m, optimizer in ((model, ours), (twin, theirs)):
        train_scheduled(m, optimizer, SCHEDULERS[name](optimizer), batches(7, torch.float64))
    assert_close(
        {n: p.detach() for n, p in model.named_parameters()}, {n: p.detach() for n, p in twin.named_parameters()}
    )


def test_one_cycle_cycles_the_first_beta_of_every_group() -> None:
    model = make_model(bias="all")
    optimizer = oplora.AdamW(model, betas=(0.9, 0.99))
    scheduler, betas = one_cycle(optimizer), []
    for x, y in batches(3, torch.float32):
        betas.append([group["betas"] for group in optimizer.param_groups])
        train_scheduled(model, optimizer, scheduler, [(x, y)])
    assert betas[0] == [(0.95, 0.99)] * 2
    assert betas[2] == [(pytest.approx(0.85, abs=0.02), 0.99)] * 2


@every_state
def test_optimizer_and_scheduler_resume_together_bit_for_bit(state: str) -> None:
    data = list(batches(6, torch.float32))
    model, fresh = make_model(), make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    scheduler = one_cycle(optimizer)
    train_scheduled(model, optimizer, scheduler, data[:3])
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    train_scheduled(model, optimizer, scheduler, data[3:])
    resumed = oplora.AdamW(fresh, lr=1.0, **options_of(state))
    schedule = one_cycle(resumed)
    resumed.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    train_scheduled(fresh, resumed, schedule, data[3:])
    assert_same_trees(everything(fresh, resumed), everything(model, optimizer))


@every_state
def test_closure_steps_as_the_plain_loop_does(state: str) -> None:
    """Also with gradients switched off around the step, as torch's own optimizers allow."""
    model, twin = make_model(), make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    losses = []
    for x, y in batches(3, torch.float32):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(optimizer.step(closure).item())
    assert losses == train(twin, oplora.AdamW(twin, lr=1e-2, **options_of(state)), 3)
    assert_same_bits(factors(model), factors(twin))


# ---- gradients in other hands ----


def test_factors_gradients_clipped_by_hand_train_as_generators_under_torch_adamw() -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    ours = oplora.AdamW(model, lr=1e-2, state="exact")
    theirs = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
    for x, y in batches(4, torch.float64):
        for m, optimizer in ((model, ours), (twin, theirs)):
            m.zero_grad()
            loss_of(m, x, y).backward()
            assert nn.utils.clip_grad_norm_(m.parameters(), 1e-3) > 1e-3
            optimizer.step()
            optimizer.zero_grad()
    assert_close(factors(model), factors(twin))


@every_state
def test_accumulated_small_batches_train_as_the_large_batch(state: str) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    for x, y in batches(5, torch.float64):
        for small_x, small_y in zip(x.split(2), y.split(2), strict=True):
            (loss_of(model, small_x, small_y) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    train(twin, oplora.AdamW(twin, lr=1e-2, **options_of(state)), 5, torch.float64)
    assert_close(factors(model), factors(twin))


# ---- averages of the weights ----


@every_state
def test_averaged_model_beside_training_leaves_its_bits(state: str) -> None:
    model, twin = make_model(), make_model()
    optimizer, average = oplora.AdamW(model, lr=1e-2, **options_of(state)), AveragedModel(model)
    for x, y in batches(3, torch.float32):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        average.update_parameters(model)
    train(twin, oplora.AdamW(twin, lr=1e-2, **options_of(state)), 3)
    assert_same_bits(factors(model), factors(twin))


AVERAGES = {
    "mean": (None, lambda seen: torch.stack(seen).mean(0)),
    "exponential": (get_ema_multi_avg_fn(0.5), lambda seen: 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averaged_models_factors_are_the_average_of_what_training_wrote(kind: str) -> None:
    average_by, expected = AVERAGES[kind]
    model = make_model(torch.float64)
    optimizer, average, seen = oplora.AdamW(model, lr=1e-2), AveragedModel(model, multi_avg_fn=average_by), []
    for x, y in batches(3, torch.float64):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        average.update_parameters(model)
        seen.append(factors(model))
    assert_close(factors(average.module), {name: expected([step[name] for step in seen]) for name in seen[0]})


@every_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_average_swapped_in_for_evaluation_and_out_again_leaves_the_bits_of_training(
    state: str, dtype: torch.dtype
) -> None:
    model, twin = make_model(dtype), make_model(dtype)
    optimizers = [oplora.AdamW(m, lr=1e-2, **options_of(state)) for m in (model, twin)]
    average = AveragedModel(model)
    average.update_parameters(model)
    train(model, optimizers[0], 2, dtype)
    average.update_parameters(model)
    held = factors(model)
    model.load_state_dict(average.module.state_dict())
    assert all(not torch.equal(tensor, held[name]) for name, tensor in factors(model).items())
    model.load_state_dict(held, strict=False)
    train(model, optimizers[0], 2, dtype)
    for _ in range(2):
        train(twin, optimizers[1], 2, dtype)
    assert_same_bits(factors(model), factors(twin))


def test_sd_scripts_loop_saves_what_training_holds(accelerator: Accelerator, tmp_path: Path) -> None:
    """Rows of tensors with a rate each, accelerate, files on the way. It calls eval() before and train() after of
    optimizers whose name ends in ScheduleFree alone: here is nothing to call."""
    model, twin = make_model(), make_model()
    parts = (model.base_model.model.first, model.base_model.model.second)
    rows = [{"params": {n: p for n, p in part.named_parameters() if p.requires_grad}.values()} for part in parts]
    optimizer = oplora.AdamW([{**row, "lr": 1e-4} for row in rows], lr=1e-4)
    scheduler = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    training, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for x, y in batches(15, torch.float32):
        with accelerator.accumulate(training):
            accelerator.backward(loss_of(training, x, y))
            accelerator.clip_grad_norm_(training.parameters(), 1e9)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        save_file(factors(accelerator.unwrap_model(training)), tmp_path / "step.safetensors")
    train(twin, oplora.AdamW(twin), 15)
    assert_same_bits(load_file(tmp_path / "step.safetensors"), factors(twin))
