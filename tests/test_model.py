"""wrap, OPLoRAConfig, merge, stats and save_adapter: the way in, the way out, and what can be watched."""

import functools
import json
import logging
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Net, assert_same_bits, batches, factors, make_model, train
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import oplora
from oplora.engines import FOUND, Rate
from oplora.engines.settings import views as views_of


def of_kind(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.requires_grad and name in n]


# ---- wrap ----


def test_wrap_puts_lora_into_every_linear_layer() -> None:
    model = oplora.wrap(Net(), oplora.OPLoRAConfig(r=2, lora_alpha=4))
    assert isinstance(model, PeftModel)
    assert set(factors(model)) == {
        f"base_model.model.{n}.lora_{f}.default.weight" for n in ("first", "second") for f in "AB"
    }
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_wrapped_model_trains_in_two_lines() -> None:
    model = oplora.wrap(Net())
    losses = train(model, oplora.AdamW(model, lr=1e-2), 30)
    assert losses[-1] < losses[0]


def test_wrap_passes_patterns_dropout_and_scaling_on_to_peft() -> None:
    config = oplora.OPLoRAConfig(
        r=4,
        rank_pattern={"second": 2},
        alpha_pattern={"first": 32},
        use_rslora=True,
        lora_dropout=0.25,
        adapter_name="a",
    )
    net = oplora.wrap(Net(), config).base_model.model
    assert (net.first.r["a"], net.second.r["a"]) == (4, 2)
    assert net.first.scaling["a"] == 32 / math.sqrt(4)
    assert net.first.lora_dropout["a"].p == 0.25


def test_wrap_names_the_layers_that_there_are() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"target_modules=\['nothing'\].*first, second"):
        oplora.wrap(Net(), oplora.OPLoRAConfig(target_modules=["nothing"]))


def test_wrap_refuses_a_wrapped_model_and_other_configs() -> None:
    with pytest.raises(oplora.OPLoRAError, match="has an adapter already"):
        oplora.wrap(make_model())
    injected = make_model().base_model.model  # as by transformers' and diffusers' add_adapter; PEFT would begin it anew
    with pytest.raises(oplora.OPLoRAError, match="has an adapter already"):
        oplora.wrap(injected)
    for config in ({"r": 3}, IA3Config(target_modules=["first"], feedforward_modules=[])):
        expected = rf"expected \(nn.Module, OPLoRAConfig or .*LoraConfig\), got \(Net, {type(config).__name__}\)"
        with pytest.raises(oplora.OPLoRAError, match=expected):
            oplora.wrap(Net(), config)


def test_wrap_takes_a_field_that_pefts_config_alone_has() -> None:
    config = LoraConfig(target_modules="all-linear", exclude_modules=["second"])
    model = oplora.wrap(Net(), config)
    assert set(factors(model)) == {f"base_model.model.first.lora_{f}.default.weight" for f in "AB"}
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("config", [None, oplora.OPLoRAConfig(adapter_name="b"), LoraConfig(target_modules=["first"])])
def test_wrap_gives_the_adapter_the_name_that_is_asked_for(config: object) -> None:
    assert list(oplora.wrap(Net(), config, adapter_name="mine").peft_config) == ["mine"]


def test_wrap_names_the_layers_that_there_are_for_pefts_config_too() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"target_modules={'nothing'}.*first, second"):
        oplora.wrap(Net(), LoraConfig(target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("rank_pattern", {"x": -1}),
        ("rank_pattern", None),
        ("lora_alpha", "16"),
        ("lora_alpha", 0),
        ("lora_alpha", math.nan),
        ("alpha_pattern", {"x": math.inf}),
        ("alpha_pattern", None),
        ("alpha_pattern", {"x": "16"}),
        ("lora_dropout", 1.0),
        ("lora_dropout", "0.1"),
        ("bias", "some"),
        ("target_modules", []),
        ("modules_to_save", "lm_head"),
        ("adapter_name", "a.b"),
    ],
)
def test_config_is_checked_when_made(field: str, value: object) -> None:
    expected = f"{field.removesuffix('_pattern')} x is" if isinstance(value, dict) else field
    with pytest.raises(oplora.OPLoRAError, match=expected):
        oplora.OPLoRAConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("init_lora_weights", "sideways"), ("task_type", "poetry")])
def test_wrap_says_that_a_field_is_refused_and_nothing_of_layers(field: str, value: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match=rf"PEFT refused the configuration.*{value}") as caught:
        oplora.wrap(Net(), oplora.OPLoRAConfig(**{field: value}))
    assert "linear layers" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.b", ""])
def test_wrap_refuses_a_name_that_no_module_can_have(name: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"oplora\.wrap: adapter_name is .* without dots"):
        oplora.wrap(Net(), LoraConfig(target_modules=["first"]), adapter_name=name)


# ---- merge ----


def test_merge_gives_plain_layers_with_the_same_outputs() -> None:
    model = make_model(torch.float64)
    train(model, oplora.AdamW(model, lr=1e-2), 5, torch.float64)
    x = next(batches(1, torch.float64))[0]
    expected = model(x).detach()
    merged = oplora.merge(model)
    assert type(merged.first) is nn.Linear and type(merged.second) is nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-13)


def test_merge_of_an_injected_adapter() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), Net())
    x = next(batches(1, torch.float32))[0]
    expected = model(x).detach()
    merged = oplora.merge(model)
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), expected)


def test_merge_refuses_a_model_without_adapter_and_nan() -> None:
    with pytest.raises(oplora.OPLoRAError, match="no adapter to fold in"):
        oplora.merge(Net())
    model = make_model()
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(oplora.OPLoRAError, match="NaN"):
        oplora.merge(model)


# ---- stats ----


def test_stats_are_the_two_terms_of_the_papers_step() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, state="exact")
    train(model, optimizer, 3, torch.float64)
    state = optimizer._stepper.states[0]
    tensors = {k: v.clone().requires_grad_() for k, v in views_of(state.pieces()["parameters"], 32, 128).items()}
    train(model, optimizer, 1, torch.float64)
    g = torch.cat([p.grad.flatten() for p in state.factors.layer.parameters()])
    h = torch.relu(tensors["W1"] @ tensors["z"] + tensors["c1"])
    v = tensors["W2"] @ h + tensors["c2"]
    hidden = torch.autograd.grad(v, [tensors[k] for k in ("z", "W1", "c1")], g)
    numbers = oplora.stats(optimizer)[state.name]
    assert numbers["trainable_lr"] == pytest.approx(float(h.detach() @ h.detach()), rel=1e-12)
    assert numbers["line_search"] == pytest.approx(
        sum(float(d.square().sum()) for d in hidden) / float(g @ g), rel=1e-10
    )
    assert numbers["live_units"] == int((h > 0).sum())
    assert numbers["norm_g"] == pytest.approx(float(g.norm()), rel=1e-12)
    A, B = state.factors.layer.parameters()
    assert (numbers["norm_A"], numbers["norm_B"]) == pytest.approx((A.norm().item(), B.norm().item()))


@pytest.mark.parametrize("width", [32, 5])
def test_lr_of_exact_is_what_adamw_moves_what_is_generated_by(width: int) -> None:
    model = make_model(torch.float64)
    groups = [{"params": of_kind(model, "lora_A"), "lr": 3e-3}, {"params": of_kind(model, "lora_B"), "lr": 2e-2}]
    optimizer = oplora.AdamW(groups, state="exact", hidden_width=width)
    train(model, optimizer, 6, torch.float64)
    expected = {}
    for state in optimizer._stepper.states:
        tensors = views_of(state.pieces()["parameters"], width, 128)
        h = torch.relu(tensors["W1"] @ tensors["z"] + tensors["c1"])
        expected[state.name] = 2e-2 * (1 + 32 / width * float(h.sum()))
    train(model, optimizer, 1, torch.float64)
    assert {name: numbers["lr"] for name, numbers in oplora.stats(optimizer).items()} == pytest.approx(expected)


@pytest.mark.parametrize("width", [32, 5])
def test_lr_of_lean_has_the_bound_of_cauchy_and_schwarz(width: int) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=7e-3, state="lean", hidden_width=width)
    train(model, optimizer, 7)
    for numbers in oplora.stats(optimizer).values():
        bound = math.sqrt(numbers["trainable_lr"] * numbers["live_units"])
        assert numbers["lr"] == pytest.approx(7e-3 * (1 + 32 / width * bound), rel=1e-12) and bound > 0


def test_lr_of_any_optimizer_class_is_that_of_w2_at_every_width() -> None:
    model = make_model()
    optimizer = oplora.create_oplora_optimizer(model, torch.optim.Adam, lr=3e-3, hidden_width=5)
    train(model, optimizer, 6)
    sums = [float(generator.report["h"].sum()) for generator in optimizer.generators]
    assert any(sums)
    assert [n["lr"] for n in oplora.stats(optimizer).values()] == pytest.approx([3e-3 * (1 + h) for h in sums])


def test_generators_have_no_lr() -> None:
    assert not any("lr" in numbers for numbers in oplora.stats(oplora.Generators(make_model())).values())


def test_stats_of_the_general_path_are_the_same() -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    one = oplora.AdamW(model, lr=1e-2, state="exact")
    two = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
    train(model, one, 4, torch.float64), train(twin, two, 4, torch.float64)
    ours, theirs = oplora.stats(one), oplora.stats(two)
    assert ours.keys() == theirs.keys()
    for name, numbers in ours.items():
        assert numbers == pytest.approx(theirs[name], rel=1e-9)


def test_stats_before_the_first_step_have_norms_only() -> None:
    model = make_model()
    numbers = next(iter(oplora.stats(oplora.AdamW(model, preset="paper")).values()))
    assert all(math.isnan(numbers[name]) for name in ("lr", "trainable_lr", "line_search", "norm_g"))
    assert numbers["norm_A"] > 0 and numbers["norm_B"] == 0


# ---- stats of preset auto, and what else tells the rate ----


def test_stats_of_auto_have_what_means_something_there() -> None:
    for numbers in oplora.stats(oplora.AdamW(make_model())).values():
        assert numbers.keys() == {"lr", "settled", "norm_g", "norm_A", "norm_B"}


def test_lr_of_auto_is_the_rate_found_times_the_share_of_b() -> None:
    model = make_model()
    lrs = {"first.lora_A": 5.0, "first.lora_B": 3.0, "second.lora_A": 1.0, "second.lora_B": 4.0}
    optimizer = oplora.AdamW([{"params": of_kind(model, name), "lr": lr} for name, lr in lrs.items()])
    train(model, optimizer, 6)
    rate = float(optimizer._stepper.found[0])
    assert [n["lr"] for n in oplora.stats(optimizer).values()] == pytest.approx([rate * 3 / 5, rate * 4 / 5], rel=1e-12)


def test_lr_of_auto_is_that_of_the_last_step() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 3)
    before = oplora.stats(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    assert oplora.stats(optimizer) == before
    train(model, optimizer, 1)
    assert {n["lr"] for n in oplora.stats(optimizer).values()} == {0.25 * float(optimizer._stepper.found[0])}


def test_norms_of_auto_are_those_of_the_gradient_and_the_factors() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 3, torch.float64)
    numbers = oplora.stats(optimizer)
    for state in optimizer._stepper.states:
        A, B = state.factors.layer.parameters()
        g = torch.cat([A.grad.flatten(), B.grad.flatten()])
        told = [numbers[state.name][name] for name in ("norm_g", "norm_A", "norm_B")]
        assert told == pytest.approx([g.norm().item(), A.norm().item(), B.norm().item()], rel=1e-12)


def test_layer_that_auto_has_not_stepped_has_no_lr() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    model(torch.ones(3, 13)).sum().backward()
    for p in of_kind(model, "second"):
        p.grad = None
    optimizer.step()
    first, second = oplora.stats(optimizer).values()
    assert first["lr"] > 0 and math.isnan(second["lr"])


@pytest.mark.parametrize("turned", [0.0, 7.0])
def test_auto_has_settled_once_the_signal_has_turned(turned: float) -> None:
    optimizer = oplora.AdamW(make_model())
    optimizer._stepper.found[FOUND.index("turned")] = turned
    assert [n["settled"] for n in oplora.stats(optimizer).values()] == [float(turned > 0)] * 2


def test_found_lr_is_the_rate_of_the_group_that_has_the_highest_now() -> None:
    model = make_model()
    optimizer = oplora.AdamW(
        [{"params": of_kind(model, "lora_A"), "lr": 2.0}, {"params": of_kind(model, "lora_B"), "lr": 8.0}]
    )
    train(model, optimizer, 5)
    rate = float(optimizer._stepper.found[0])
    assert optimizer.found_lr == rate
    optimizer.param_groups[1]["lr"] = 1.0  # a schedule's fall
    assert optimizer.found_lr == pytest.approx(rate * 2 / 8, rel=1e-15)


def test_reading_found_lr_changes_nothing() -> None:
    trained = []
    for reads in (True, False):
        model = make_model()
        optimizer = oplora.AdamW(model)
        for lr in (1.0, 2.0, 0.5):
            train(model, optimizer, 1)
            optimizer.param_groups[0]["lr"] = lr
            if reads:
                assert optimizer.found_lr > 0
        train(model, optimizer, 1)
        trained.append((factors(model), optimizer.param_groups[0]["peak_lr"]))
    assert_same_bits(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1] == 2.0


def test_found_lr_of_a_resumed_run_is_that_of_the_saved_one() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 5)
    resumed = oplora.AdamW(make_model())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.found_lr == optimizer.found_lr


@pytest.mark.parametrize("preset", ["paper", "flat"])
def test_found_lr_is_nan_where_none_is_searched_for(preset: str) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, preset=preset)
    train(model, optimizer, 1)
    assert math.isnan(optimizer.found_lr)


def test_found_lr_is_nan_before_the_first_step() -> None:
    assert math.isnan(oplora.AdamW(make_model()).found_lr)


def test_repr_tells_the_rate_found_so_far() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    assert " found" not in repr(optimizer)
    train(model, optimizer, 5)
    assert f"; rate {optimizer.found_lr:.1e} found\n" in repr(optimizer)


def rate_lines(caplog: pytest.LogCaptureFixture, optimizer: oplora.AdamW, model: nn.Module, steps: int) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="oplora"):
        train(model, optimizer, steps)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("turned", "more"), [(5.0, ""), (0.0, " (still searching)")])
def test_log_tells_the_rate_after_a_hundred_steps_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, turned: float, more: str
) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    assert not rate_lines(caplog, optimizer, model, 99)
    optimizer._stepper.found[FOUND.index("turned")] = turned
    monkeypatch.setattr(Rate, "find", lambda *_: None)
    assert rate_lines(caplog, optimizer, model, 1) == [f"oplora found {optimizer.found_lr:.1e}{more}"]
    assert not rate_lines(caplog, optimizer, model, 101)


def test_log_tells_no_rate_of_other_presets(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    assert not rate_lines(caplog, oplora.AdamW(model, preset="paper"), model, 101)


def test_rate_is_not_read_where_no_log_is_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, logger="oplora")
    model = make_model()
    optimizer = oplora.AdamW(model)
    monkeypatch.setattr(oplora.AdamW, "_found", lambda _: pytest.fail("it was read"))
    train(model, optimizer, 101)


def test_steps_that_are_captured_are_not_asked_for_the_rate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    assert not rate_lines(caplog, optimizer, model, 99)
    with monkeypatch.context() as patch:
        patch.setattr(oplora.AdamW, "_is_captured", lambda _: True)
        assert not rate_lines(caplog, optimizer, model, 3)
        assert math.isnan(optimizer.found_lr)
    assert len(rate_lines(caplog, optimizer, model, 1)) == 1


# ---- stats of what else there is ----


def test_stats_refuse_other_optimizers() -> None:
    with pytest.raises(oplora.OPLoRAError, match="got SGD"):
        oplora.stats(torch.optim.SGD(Net().parameters()))


@pytest.mark.parametrize("general", [False, True], ids=["AdamW", "create_oplora_optimizer"])
def test_stats_are_those_of_the_optimizer_that_accelerate_prepared(general: bool, accelerator: Accelerator) -> None:
    model = make_model()
    make = functools.partial(oplora.create_oplora_optimizer, optimizer_cls=torch.optim.SGD) if general else oplora.AdamW
    optimizer = make(model, lr=1e-2)
    prepared = accelerator.prepare(optimizer)
    assert prepared is not optimizer
    train(model, prepared, 2)
    assert oplora.stats(prepared) == oplora.stats(optimizer)


def test_stats_refuse_what_accelerate_prepared_of_others_by_its_own_name(accelerator: Accelerator) -> None:
    with pytest.raises(oplora.OPLoRAError, match="got SGD"):
        oplora.stats(accelerator.prepare(torch.optim.SGD(Net().parameters())))


# ---- save_adapter ----


def test_saved_adapter_gives_the_same_outputs_by_peft_alone(tmp_path: Path) -> None:
    model = make_model()
    train(model, oplora.AdamW(model, lr=1e-2), 5)
    oplora.save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    x = next(batches(1, torch.float32))[0]
    model.eval()
    assert torch.equal(loaded(x), model(x))


def test_saved_adapter_is_what_peft_alone_would_write(tmp_path: Path) -> None:
    model = make_model(bias="all", rank_pattern={"second": 2}, use_rslora=True)
    oplora.save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "pefts")
    files = [sorted(p.name for p in (tmp_path / who).iterdir()) for who in ("ours", "pefts")]
    assert files[0] == files[1]
    ours, pefts = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "pefts"))
    assert ours.keys() == pefts.keys() and all(torch.equal(ours[k], pefts[k]) for k in ours)
    assert len({(tmp_path / who / "adapter_config.json").read_text() for who in ("ours", "pefts")}) == 1


def test_named_adapters_go_into_folders_of_their_names(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    oplora.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["r"] == 2


def test_saving_again_keeps_what_users_wrote_into_the_model_card(tmp_path: Path) -> None:
    oplora.save_adapter(make_model(), tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on my notes.\n")
    oplora.save_adapter(make_model(), tmp_path)
    assert "Trained on my notes." in card.read_text()


def test_unknown_format_and_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        oplora.OPLoRAError, match="format is 'zip', expected one of 'peft', 'plain', 'diffusers', 'kohya'"
    ):
        oplora.save_adapter(make_model(), tmp_path, format="zip")
    with pytest.raises(oplora.OPLoRAError, match="Net has no adapter"):
        oplora.save_adapter(Net(), tmp_path)


def test_merged_model_is_not_saved(tmp_path: Path) -> None:
    model = make_model()
    model.merge_adapter()
    with pytest.raises(oplora.OPLoRAError, match="is merged into its base"):
        oplora.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(oplora.OPLoRAError, match="is no usable path"):
        oplora.save_adapter(make_model(), tmp_path / "a\0b")


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(oplora.OPLoRAError, match=r"cannot write into .*file"):
        oplora.save_adapter(make_model(), tmp_path / "file")


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from conftest import make_model
import oplora
model = make_model(r=13)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # the config fits, the weights do not
try:
    oplora.save_adapter(model, sys.argv[1])
except oplora.OPLoRAError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes here")
def test_full_disk_leaves_the_old_adapter_whole(tmp_path: Path) -> None:
    oplora.save_adapter(make_model(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "writing the adapter into" in out and "still in the model" in out
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_refused_merge_leaves_every_adapter() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (4, 2)), nn.Conv1d(4, 4, 1, groups=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(oplora.OPLoRAError, match="PEFT cannot merge"):
        oplora.merge(model)
    assert torch.equal(model(x), before)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


def test_wrap_puts_doras_magnitude_in() -> None:
    model = oplora.wrap(Net(), oplora.OPLoRAConfig(target_modules=["first"], use_dora=True))
    assert "lora_magnitude_vector" in oplora.AdamW(model, hidden_width=4)._stepper.layers[0].tensors
