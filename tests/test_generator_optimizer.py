"""create_oplora_optimizer's optimizer in the hands of loops, closures, scalers, schedulers, accelerate and Trainer."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import test_trainer
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from conftest import assert_same_bits, batches, factors, make_model, train, train_on
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.utils._pytree import tree_flatten

import oplora
from oplora.definition import GeneratorOptimizer

CLASSES = {
    "SGD": (torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "Adam": (torch.optim.Adam, dict(lr=1e-2)),
    "AdamW": (torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    "Adafactor": (torch.optim.Adafactor, dict(lr=0.1)),
    "Adagrad": (torch.optim.Adagrad, dict(lr=1e-2)),
    "RMSprop": (torch.optim.RMSprop, dict(lr=1e-3)),
}
every_class = pytest.mark.parametrize(("optimizer_cls", "options"), CLASSES.values(), ids=CLASSES)


def make(model: nn.Module, optimizer_cls: type = torch.optim.AdamW, **options: Any) -> GeneratorOptimizer:
    return oplora.create_oplora_optimizer(model, optimizer_cls, **{"lr": 1e-2, **options})


def loss_of(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return (model(pair[0]) - pair[1]).square().mean()


def data(steps: int = 1) -> list[tuple[Tensor, Tensor]]:
    return list(batches(steps, torch.float32))


def poisoned(pair: tuple[Tensor, Tensor], value: float = torch.nan) -> tuple[Tensor, Tensor]:
    return torch.full_like(pair[0], value), pair[1]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_trees(ours: Any, theirs: Any) -> None:
    (some, form), (others, expected) = tree_flatten(ours), tree_flatten(theirs)
    assert form == expected
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def train_scheduled(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, pairs: Iterable[tuple[Tensor, Tensor]]
) -> None:
    for pair in pairs:
        train_on(model, optimizer, [pair])
        scheduler.step()


def foreign(model: nn.Module, optimizer_cls: type, lr: float, ratio: float = 1.0, **options: Any) -> Any:
    """As oplora 0.1 had it: the class itself over the generators' parameters; it, the generators, and a step."""
    generators = oplora.Generators(model)
    inner = [p for g in generators for p in (g.W2, g.c2)], [p for g in generators for p in (g.z, g.W1, g.c1)]
    groups: list[dict[str, Any]] = [{"params": inner[0]}, {"params": inner[1], "lr": lr * ratio}]
    if others := [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]:
        groups.append({"params": others})
    optimizer = optimizer_cls(groups, lr=lr, **options)

    def step(pair: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        loss_of(model, pair).backward()
        generators.backward()
        optimizer.step()
        generators.refresh()

    return optimizer, generators, step


# ---- what it is ----


@every_class
def test_losses_fall(optimizer_cls: type, options: dict[str, float]) -> None:
    model = make_model(bias="all")
    losses = train_on(model, make(model, optimizer_cls, **options), data() * 30)
    assert losses[-1] < 0.8 * losses[0]


@every_class
def test_steps_are_those_of_the_class_over_the_generators(optimizer_cls: type, options: dict[str, float]) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    train(model, make(model, optimizer_cls, **options), 6)
    _, _, step = foreign(twin, optimizer_cls, **options)
    for pair in data(6):
        step(pair)
    assert_same_bits(tensors(model), tensors(twin))


def test_groups_hold_the_factors_and_then_the_others() -> None:
    model = make_model(bias="all")
    first, second = make(model, weight_decay=0.3, hidden_lr_ratio=0.5).param_groups
    named = dict(model.named_parameters())
    assert {id(p) for p in first["params"]} == {id(p) for n, p in named.items() if "lora_" in n}
    assert {id(p) for p in second["params"]} == {id(p) for n, p in named.items() if n.endswith("bias")}
    assert (first["lr"], first["hidden_lr_ratio"], first["weight_decay"]) == (1e-2, 0.5, 0.3)


def test_numbers_set_in_the_groups_are_those_of_the_next_step() -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    set_later = make(model, torch.optim.SGD, lr=7.0, momentum=0.5)
    set_at_once = make(twin, torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.2, hidden_lr_ratio=0.5)
    for group in set_later.param_groups:
        group.update(lr=1e-2, momentum=0.9, weight_decay=0.2)
    set_later.param_groups[0]["hidden_lr_ratio"] = 0.5
    train(model, set_later, 3), train(twin, set_at_once, 3)
    assert_same_bits(tensors(model), tensors(twin))


def test_numbers_that_the_class_keeps_in_its_groups_stay_its_own() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for i, group in enumerate(self.param_groups):
                group["dampening"] += i

    model = make_model()
    optimizer = make(model, Counting)
    train(model, optimizer, 3)
    assert [group["dampening"] for group in optimizer.inner.param_groups] == [0, 3]


def test_added_parameters_are_stepped() -> None:
    model, extra = make_model(), nn.Parameter(torch.ones(3))
    optimizer = make(model, torch.optim.SGD)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    extra.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(extra.detach(), torch.full((3,), 0.5))


def test_repr_says_class_layers_and_width() -> None:
    text = repr(make(make_model(bias="all"), torch.optim.RMSprop, hidden_width=7))
    assert text.startswith(
        "GeneratorOptimizer (RMSprop over the generators of 2 layers: 180 factor entries, hidden_wid"
    )
    assert "hidden_lr_ratio: 1.0" in text


# ---- closures ----


@every_class
def test_closure_steps_as_the_plain_loop_does(optimizer_cls: type, options: dict[str, float]) -> None:
    model, twin = make_model(), make_model()
    optimizer, losses = make(model, optimizer_cls, **options), []
    for pair in data(3):

        def closure(pair: tuple[Tensor, Tensor] = pair) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, pair)
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(optimizer.step(closure).item())
    assert losses == train(twin, make(twin, optimizer_cls, **options), 3)
    assert_same_bits(factors(model), factors(twin))


# ---- gradients ----


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_skipped_batch_leaves_no_trace(clear: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer = make(model)
    first, second, third = data(3)
    for pair in (first, poisoned(second), third):
        (model if clear == "model" else optimizer).zero_grad()
        loss = loss_of(model, pair)
        loss.backward()
        if loss.isfinite():
            optimizer.step()
    train_on(twin, make(twin), [first, third])
    assert_same_bits(tensors(model), tensors(twin))


@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_refused_batch_leaves_no_trace(clear: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer = make(model, skip_nonfinite=True)
    first, second, third = data(3)
    for pair in (first, poisoned(second), third):
        (model if clear == "model" else optimizer).zero_grad()
        loss_of(model, pair).backward()
        optimizer.step()
    train_on(twin, make(twin), [first, third])
    assert_same_bits(tensors(model), tensors(twin))


def test_step_leaves_the_factors_gradients_and_none_in_the_generators() -> None:
    model = make_model()
    optimizer = make(model)
    loss_of(model, data()[0]).backward()
    before = [p.grad.clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(optimizer.param_groups[0]["params"], before, strict=True))
    assert all(p.grad is None for p in optimizer.generators.parameters())


def test_zero_grad_drops_what_backward_put_into_the_generators() -> None:
    model = make_model()
    optimizer = make(model)
    loss_of(model, poisoned(data()[0])).backward()
    optimizer.generators.backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in [*optimizer.generators.parameters(), *model.parameters()])


def test_gradients_clipped_in_the_generators_are_those_that_are_stepped() -> None:
    model, twin = make_model(), make_model()
    optimizer, (theirs, generators, _) = make(model, torch.optim.SGD), foreign(twin, torch.optim.SGD, lr=1e-2)
    for pair in data(3):
        loss_of(model, pair).backward(), loss_of(twin, pair).backward()
        optimizer.generators.backward(), generators.backward()
        for each in (optimizer.generators, generators):
            assert nn.utils.clip_grad_norm_(each.parameters(), 1e-3) > 1e-3
        optimizer.step(), theirs.step()
        generators.refresh(), theirs.zero_grad()
    assert_same_bits(factors(model), factors(twin))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_is_refused_and_nothing_changed(value: float) -> None:
    model = make_model(bias="all")
    optimizer = make(model)
    train(model, optimizer, 2)
    loss_of(model, data()[0]).backward()
    model.base_model.model.second.lora_B["default"].weight.grad[1, 2] = value
    before = copy.deepcopy((tensors(model), optimizer.state_dict()))
    with pytest.raises(oplora.OPLoRAError, match=r"layer base_model.model.second.default holds NaN or infinity"):
        optimizer.step()
    assert_same_bits(tensors(model), before[0])
    assert_same_trees(optimizer.state_dict(), before[1])


def test_gradient_outside_the_adapters_that_is_not_finite_is_refused() -> None:
    model = make_model(bias="all")
    optimizer = make(model)
    loss_of(model, data()[0]).backward()
    model.base_model.model.first.base_layer.bias.grad[0] = torch.nan
    before = tensors(model)
    with pytest.raises(oplora.OPLoRAError, match="parameters outside the adapters"):
        optimizer.step()
    assert_same_bits(tensors(model), before)


def test_skip_nonfinite_changes_nothing() -> None:
    model = make_model()
    optimizer = make(model, skip_nonfinite=True)
    before = tensors(model)
    train_on(model, optimizer, [poisoned(data()[0])])
    assert_same_bits(tensors(model), before)
    assert not optimizer.inner.state


def test_layer_without_gradient_stays() -> None:
    model = make_model()
    optimizer = make(model)
    loss_of(model, data()[0]).backward()
    for p in model.base_model.model.first.parameters():
        p.grad = None
    before = factors(model)
    optimizer.step()
    for name, tensor in factors(model).items():
        assert torch.equal(tensor, before[name]) == (".first." in name)


@pytest.mark.parametrize("first", [lambda _: None, lambda o: o.load_state_dict(o.state_dict())], ids=["", "loaded"])
def test_factors_that_peft_replaced_are_stepped(first: Callable[[Any], Any]) -> None:
    model, twin = make_model(), make_model()
    optimizer = make(model)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.weight = nn.Parameter(part.weight.detach().clone())
    first(optimizer)
    train(model, optimizer, 2), train(twin, make(twin), 2)
    assert_same_bits(factors(model), factors(twin))


def test_model_that_was_moved_takes_its_generators_and_their_state_along() -> None:
    """As far as one device can show it: what follows a move is done, and changes nothing."""
    model, twin = make_model(), make_model()
    optimizer, unmoved = make(model), make(twin)
    train(model, optimizer, 2), train(twin, unmoved, 2)
    for generator in optimizer.generators:
        generator.factors.placed = torch.device("meta")
    optimizer._devices = [torch.device("meta")]
    train(model, optimizer, 2), train(twin, unmoved, 2)
    assert_same_bits(factors(model), factors(twin))
    assert {g.factors.placed.type for g in optimizer.generators} == {"cpu"} == {d.type for d in optimizer._devices}


def test_other_tensors_in_the_place_of_the_factors_are_refused() -> None:
    model = make_model()
    optimizer = make(model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(oplora.OPLoRAError, match="in the place of the factors"):
        optimizer.step()


# ---- GradScaler ----


def scaled_step(model: nn.Module, optimizer: Any, scaler: Any, pair: tuple[Tensor, Tensor], clip: bool = False) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model, pair)).backward()
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()


def test_grad_scaler_steps_as_without_it() -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    for pair in data(3):
        scaled_step(model, optimizer, scaler, pair)
    train(twin, make(twin), 3)
    assert_same_bits(tensors(model), tensors(twin))


def test_grad_scaler_skips_a_step_with_infinity() -> None:
    model = make_model(bias="all")
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = tensors(model)
    scaled_step(model, optimizer, scaler, poisoned(data()[0], torch.inf))
    assert scaler.get_scale() == 128
    assert_same_bits(tensors(model), before)


def test_clipped_after_unscaling_it_steps_as_without_a_scaler() -> None:
    model, twin = make_model(), make_model()
    ours, theirs = make(model, torch.optim.SGD), make(twin, torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for pair in data(3):
        scaled_step(model, ours, scaler, pair, clip=True)
        scaled_step(twin, theirs, torch.amp.GradScaler("cpu", enabled=False), pair, clip=True)
    assert_same_bits(factors(model), factors(twin))


# ---- schedulers ----


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=9),
    "LambdaLR from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
}
every_scheduler = pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)


@every_scheduler
def test_scheduler_drives_it_as_it_drives_the_class_itself(schedule: Callable[[Any], Any]) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer = make(model)
    train_scheduled(model, optimizer, schedule(optimizer), data(7))
    theirs, _, step = foreign(twin, torch.optim.AdamW, lr=1e-2)
    scheduler = schedule(theirs)
    for pair in data(7):
        step(pair)
        scheduler.step()
    assert_same_bits(tensors(model), tensors(twin))


def test_warm_up_from_zero_moves_nothing_in_its_first_step() -> None:
    model = make_model()
    optimizer = make(model)
    before = factors(model)
    train_scheduled(model, optimizer, SCHEDULERS["LambdaLR from 0"](optimizer), data())
    assert_same_bits(factors(model), before)


def test_one_cycle_cycles_the_momentum_of_the_class() -> None:
    model = make_model()
    optimizer = make(model, torch.optim.SGD, momentum=0.5)
    train_scheduled(model, optimizer, lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9), data(2))
    assert optimizer.inner.param_groups[1]["momentum"] == pytest.approx(0.9, abs=0.06)


def test_reduce_on_plateau_lowers_both_rates() -> None:
    model = make_model()
    optimizer = make(model, hidden_lr_ratio=0.25)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for pair in data(2):
        train_on(model, optimizer, [pair])
        scheduler.step(1.0)
    train_on(model, optimizer, data())
    assert [group["lr"] for group in optimizer.inner.param_groups] == [5e-3, 1.25e-3]


def test_rate_may_be_a_tensor() -> None:
    model, twin = make_model(), make_model()
    optimizer = make(model, lr=torch.tensor(1e-2, dtype=torch.float64), foreach=False)
    train(model, optimizer, 3), train(twin, make(twin, foreach=False), 3)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name])


# ---- accelerate and Trainer ----


def test_accelerate_prepares_and_steps_it() -> None:
    model, twin = make_model(), make_model()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, make(model))
    for pair in data(3):
        optimizer.zero_grad()
        accelerator.backward(loss_of(prepared, pair))
        accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
        optimizer.step()
    train(twin, make(twin), 3)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, factors(twin)[name])


def as_optimizer(model: nn.Module) -> dict[str, Any]:
    return {"optimizers": (make(model, weight_decay=0.1), None)}


def as_factory(_: nn.Module) -> dict[str, Any]:
    """Trainer calls what is no class, and then what that returns with the model."""
    arguments = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-2, "weight_decay": 0.1}
    return {"optimizer_cls_and_kwargs": (lambda: oplora.create_oplora_optimizer, arguments)}


def test_trainer_trains_with_it_handed_over_in_either_way(tmp_path: Path) -> None:
    model, twin = test_trainer.make_model(), test_trainer.make_model()
    losses = test_trainer.run(test_trainer.make_trainer(tmp_path, model, as_optimizer(model)))
    assert test_trainer.run(test_trainer.make_trainer(tmp_path, twin, as_factory(twin))) == losses
    assert_same_bits(factors(model), factors(twin))
    assert losses[-1] < losses[0] - 0.2


def test_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    model, twin = test_trainer.make_model(), test_trainer.make_model()
    saving = {"save_strategy": "steps", "save_steps": test_trainer.SAVED}
    losses = test_trainer.run(test_trainer.make_trainer(tmp_path, model, as_optimizer(model), **saving))
    trainer = test_trainer.make_trainer(tmp_path, twin, as_optimizer(twin), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{test_trainer.SAVED}"))
    assert test_trainer.logged(trainer.state.log_history, "loss") == losses
    assert_same_bits(factors(model), factors(twin))


# ---- saving and copies ----


@every_class
def test_torch_distributed_checkpoint_resumes_bit_for_bit(
    optimizer_cls: type, options: dict[str, float], tmp_path: Path
) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = make(model, optimizer_cls, **options), make(fresh, optimizer_cls, **options)
    train(model, optimizer, 2)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    template = {"optimizer": get_optimizer_state_dict(fresh, resumed)}
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh, resumed, template["optimizer"])
    fresh.load_state_dict(model.state_dict())
    assert train(fresh, resumed, 3) == train(model, optimizer, 3)
    assert_same_bits(tensors(fresh), tensors(model))


@every_class
def test_reading_by_torch_distributed_checkpoint_changes_nothing(
    optimizer_cls: type, options: dict[str, float]
) -> None:
    model = make_model(bias="all")
    optimizer = make(model, optimizer_cls, **options)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert_same_trees(optimizer.state_dict(), before)


def test_moments_zeroed_in_the_state_are_zero_in_the_next_step() -> None:
    model = make_model()
    optimizer = make(model, torch.optim.SGD, momentum=0.9)
    train(model, optimizer, 2)
    for state in optimizer.state.values():
        for name, value in state.items():
            if name.endswith("momentum_buffer"):
                value.zero_()
    assert not any(state["momentum_buffer"].count_nonzero() for state in optimizer.inner.state.values())


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_class
def test_resume_goes_on_bit_for_bit(optimizer_cls: type, options: dict[str, float]) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = make(model, optimizer_cls, **options), make(fresh, optimizer_cls, lr=7.0)
    train(model, optimizer, 3)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    fresh.load_state_dict(model.state_dict())
    assert train(fresh, resumed, 3) == train(model, optimizer, 3)
    assert_same_bits(tensors(fresh), tensors(model))


def test_scheduled_run_resumes_bit_for_bit() -> None:
    model, fresh = make_model(), make_model()
    optimizer, resumed = make(model), make(fresh)
    scheduler, schedule = (SCHEDULERS["OneCycleLR"](o) for o in (optimizer, resumed))
    train_scheduled(model, optimizer, scheduler, data(3))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()})
    resumed.load_state_dict(saved["optimizer"]), schedule.load_state_dict(saved["scheduler"])
    train_scheduled(model, optimizer, scheduler, data(3)), train_scheduled(fresh, resumed, schedule, data(3))
    assert_same_bits(factors(fresh), factors(model))


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_state_of_oplora_0_1_goes_on_bit_for_bit(ratio: float) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    old, generators, step = foreign(model, torch.optim.AdamW, lr=1e-2, ratio=ratio, weight_decay=0.1)
    first, second = data(2)
    step(first)
    optimizer = make(fresh, lr=7.0)
    optimizer.load_state_dict(through_a_file({**old.state_dict(), "generators": generators.state_dict()}))
    fresh.load_state_dict(model.state_dict())
    step(second), train_on(fresh, optimizer, [second])
    assert_same_bits(tensors(fresh), tensors(model))
    assert optimizer.param_groups[0]["hidden_lr_ratio"] == ratio


@pytest.mark.parametrize("saved_as", [make, lambda m: make(m, torch.optim.SGD)], ids=["no generators", "another class"])
def test_state_of_another_optimizer_is_refused_and_nothing_changed(saved_as: Callable[[Any], Any]) -> None:
    model, other = make_model(), make_model(bias="all")
    optimizer = make(model)
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    saved = saved_as(other).state_dict()
    with pytest.raises(oplora.OPLoRAError):
        optimizer.load_state_dict(saved)
    assert_same_trees(optimizer.state_dict(), before)


def test_hooks_of_torch_see_the_whole_state() -> None:
    model, fresh = make_model(), make_model()
    optimizer, resumed = make(model), make(fresh)
    train(model, optimizer, 2)
    optimizer.register_state_dict_post_hook(lambda _, state: {"mine": state})
    resumed.register_load_state_dict_pre_hook(lambda _, state: state["mine"])
    seen = []
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(len(o.inner.state)))
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_bits(factors(fresh), factors(model))
    assert seen == [10]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copy_trains_as_the_original(copied: Callable[[Any], Any]) -> None:
    model = make_model(bias="all")
    optimizer = make(model, hidden_lr_ratio=0.5)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # puts a step() of its own into the optimizer
    train_scheduled(model, optimizer, scheduler, data(2))
    twin, twin_optimizer = copied((model, optimizer))
    assert train(twin, twin_optimizer, 3) == train(model, optimizer, 3)
    assert_same_bits(tensors(twin), tensors(model))


def test_stats_and_monitor_find_the_generators(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make(model)
    monitor = oplora.Monitor(tmp_path, optimizer, every=1)
    train(model, optimizer, 1)
    monitor(1.0)
    assert all(numbers["norm_g"] > 0 for numbers in oplora.stats(optimizer).values())


# ---- refusals ----


@pytest.mark.parametrize(
    ("optimizer_cls", "options", "message"),
    [
        (torch.optim.LBFGS, {}, "LBFGS cannot step the generators: its step.. calls a closure"),
        (torch.optim.Muon, {}, "Muon cannot step the generators: .*2D.* Use a class that steps matrices and vectors"),
        (torch.optim.SGD, {"momentun": 0.9}, "SGD cannot step the generators: .*momentun.*arguments that it knows"),
        (torch.optim.SGD, {"momentum": -1.0}, "SGD cannot step the generators: Invalid momentum"),
        (nn.Linear, {}, "Linear cannot step the generators"),
        (torch.optim.SGD, {"lr": "1e-4"}, "lr is '1e-4', a string"),
        (torch.optim.SGD, {"weight_decay": "0.1"}, "weight_decay is '0.1', a string"),
        (torch.optim.AdamW, {"betas": ("0.9", 0.99)}, "betas is .*a string"),
        (torch.optim.SGD, {"hidden_lr_ratio": "2"}, "hidden_lr_ratio is '2', a string"),
        (torch.optim.SGD, {"lr": float("nan")}, "lr is nan"),
        (torch.optim.SGD, {"weight_decay": float("nan")}, "weight_decay is nan"),
        (torch.optim.SGD, {"lr": -1.0}, "lr is -1.0, expected a number of at least 0"),
        (torch.optim.SGD, {"lr": None}, "lr is None"),
        (torch.optim.SGD, {"hidden_lr_ratio": -1}, "hidden_lr_ratio is -1, expected"),
    ],
)
def test_argument_is_refused_before_anything_is_written(optimizer_cls: type, options: Any, message: str) -> None:
    model = make_model()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=message):
        make(model, optimizer_cls, **options)
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("model", [None, [nn.Parameter(torch.zeros(2))]])
def test_missing_model_is_refused(model: Any) -> None:
    with pytest.raises(oplora.OPLoRAError, match="expected the model itself"):
        make(model)


@pytest.mark.parametrize(("rate", "message"), [(float("nan"), "lr is nan"), (-1.0, "lr is -1.0"), ("1e-4", "lr is '1")])
def test_rate_set_later_that_is_no_rate_is_refused_and_nothing_changed(rate: Any, message: str) -> None:
    model = make_model(bias="all")
    optimizer = make(model)
    optimizer.param_groups[1]["lr"] = rate
    before = tensors(model)
    with pytest.raises(oplora.OPLoRAError, match=message):
        train(model, optimizer, 1)
    assert_same_bits(tensors(model), before)


@pytest.mark.parametrize("by_hand", [False, True])
def test_merged_layer_is_refused_and_nothing_changed(by_hand: bool) -> None:
    model = make_model()
    optimizer = make(model)
    loss_of(model, data()[0]).backward()
    if by_hand:
        optimizer.generators.backward()
    model.merge_adapter()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match="is merged"):
        optimizer.step()
    assert_same_bits(factors(model), before)
