"""What anybody may do to a torch optimizer, done to every optimizer that the package offers."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import Net, assert_same_bits, batches, factors, make_model, train, train_on
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import oplora

Make = Callable[..., torch.optim.Optimizer]

OURS: dict[str, Make] = {
    "lean": lambda params, **options: oplora.AdamW(params, **{"lr": 1e-2, "state": "lean", **options}),
    "exact": lambda params, **options: oplora.AdamW(params, **{"lr": 1e-2, "state": "exact", **options}),
    "auto": lambda params, **options: oplora.AdamW(params, **{"lr": 1e-2, "preset": "auto", **options}),
}
OVER_GENERATORS: dict[str, Make] = {
    "AdamW over generators": lambda model, **options: oplora.create_oplora_optimizer(
        model, torch.optim.AdamW, **{"lr": 1e-2, "weight_decay": 1e-2, **options}
    ),
    "SGD over generators": lambda model, **options: oplora.create_oplora_optimizer(
        model, torch.optim.SGD, **{"lr": 1e-2, "momentum": 0.9, **options}
    ),
}
EVERY = {**OURS, **OVER_GENERATORS}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
ours = pytest.mark.parametrize("make", OURS.values(), ids=OURS)
SEEDED = {name: make for name, make in EVERY.items() if name != "auto"}  # that write a start of their own


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def generated(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in trained(model).items() if "lora_" in name]


def moments_of(entry: Mapping[str, Any]) -> list[str]:
    return [name for name in ("exp_avg", "exp_avg_sq") if name in entry]


def step_plainly(plain: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, of_group: int = 0) -> None:
    """With the numbers of a group of `optimizer`, which has just stepped; where it finds the rate, at that."""
    group = optimizer.param_groups[of_group]
    found = next((entry["found"][0].item() for entry in optimizer.state.values() if "found" in entry), None)
    lr = group["lr"] if found is None else group["lr"] / group["peak_lr"] * found
    plain.param_groups[0].update(lr=lr, betas=group["betas"])
    plain.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy((bits(model), optimizer.state_dict()))


def assert_same_trees(some: Any, others: Any) -> None:
    (one, form), (two, expected) = tree_flatten(some), tree_flatten(others)
    assert form == expected
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)


def backward(model: nn.Module, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
    x, y = next(batches(1, torch.float32)) if pair is None else pair
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def give_gradients(model: nn.Module, seed: int = 3) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in trained(model).values():
        p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype)


def begun(make: Make, dtype: torch.dtype = torch.float32, steps: int = 2, **config: Any) -> tuple[nn.Module, Any]:
    """A model and its optimizer after some steps."""
    model = make_model(dtype, **config)
    optimizer = make(model)
    for i in range(steps):
        give_gradients(model, i)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def go_on(model: nn.Module, optimizer: Any, steps: int = 2) -> dict[str, Tensor]:
    for i in range(steps):
        give_gradients(model, 100 + i)
        optimizer.step()
    return bits(model)


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- memory ----


@every
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("steps", [False, True], ids=["skipped", "stepped"])
def test_gradients_are_freed_by_zero_grad(clip: bool, steps: bool, make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    give_gradients(model)
    gradients = [weakref.ref(p.grad) for p in trained(model).values()]
    if clip and hasattr(optimizer, "clip_grad_norm_"):
        optimizer.clip_grad_norm_(1e-3)
    if steps:
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert not any(gradient() is not None for gradient in gradients)


# ---- state, where torch keeps it ----


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_of_every_generated_tensor_has_columns_of_its_shape(make: Make, dtype: torch.dtype) -> None:
    model, optimizer = begun(make, dtype)
    for p in generated(model):
        for name in moments_of(optimizer.state[p]):
            assert optimizer.state[p][name].shape[-p.dim() :] == p.shape


@every
def test_state_has_every_parameter_that_was_stepped(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    assert {id(p) for p in optimizer.state} == {id(p) for p in trained(model).values()}


@every
def test_moments_zeroed_through_the_state_change_the_next_step(make: Make) -> None:
    (model, optimizer), (twin, untouched) = begun(make), begun(make)
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if name.endswith(("exp_avg", "exp_avg_sq", "momentum_buffer", "hidden_moments")):
                value.zero_()
    moved, its = go_on(model, optimizer, 1), go_on(twin, untouched, 1)
    assert all(not torch.equal(tensor, its[name]) for name, tensor in moved.items())


@ours
def test_moment_that_is_assigned_is_written_where_the_step_reads_it(make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make), begun(make)
    for p, its in zip(generated(model), generated(twin), strict=True):
        for name in moments_of(optimizer.state[p]):
            optimizer.state[p][name] = torch.zeros_like(optimizer.state[p][name])
            other.state[its][name].zero_()
    assert_same_bits(go_on(model, optimizer), go_on(twin, other))


CLEARED: dict[str, Callable[[Any], Any]] = {
    "clear": lambda optimizer: optimizer.state.clear(),
    "another dict": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "an empty dict each": lambda optimizer: [entry.clear() for entry in optimizer.state.values()],
}
every_clearing = pytest.mark.parametrize("clear", CLEARED.values(), ids=CLEARED)


@ours
@every_clearing
def test_cleared_state_leaves_the_factors(clear: Callable[[Any], Any], make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    before = bits(model)
    clear(optimizer)
    optimizer.state_dict()
    assert_same_bits(bits(model), before)
    give_gradients(model)
    optimizer.step()
    for name, p in trained(model).items():
        assert 0 < (p.detach() - before[name]).abs().max() < 0.1


@ours
@every_clearing
def test_cleared_state_begins_moments_and_steps_anew(clear: Callable[[Any], Any], make: Make) -> None:
    _, optimizer = begun(make)
    clear(optimizer)
    saved = optimizer.state_dict()["state"]
    for entry in saved.values():
        assert not any(entry[name].any() for name in moments_of(entry))
        assert int(entry.get("step", 0)) == 0
    kept = next(name for name in ("weight_change", "weight", "generated") if name in saved[0])
    assert all(entry[kept].any() for entry in saved.values())


@ours
def test_cleared_state_of_what_is_plain_is_that_of_a_fresh_adamw(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    optimizer.state.clear()
    biases = {name: p for name, p in trained(model).items() if "lora_" not in name}
    twins = [nn.Parameter(p.detach().clone()) for p in biases.values()]
    go_on(model, optimizer, 1)
    for twin, p in zip(twins, biases.values(), strict=True):
        twin.grad = p.grad.clone()
    step_plainly(torch.optim.AdamW(twins), optimizer)
    assert all(map(torch.equal, twins, biases.values()))


@ours
def test_layer_whose_state_is_dropped_begins_anew_alone(make: Make) -> None:
    model, optimizer = begun(make)
    first, _, second, _ = generated(model)
    optimizer.state.pop(first)
    optimizer.state_dict()
    assert int(optimizer.state[first]["step"]) == 0 and int(optimizer.state[second]["step"]) == 2


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "cpu": lambda state: state.update({k: v.cpu() for k, v in state.items() if isinstance(v, Tensor)}),
    "items": lambda state: [state.__setitem__(k, v.cpu()) for k, v in state.items() if isinstance(v, Tensor)],
    "merged": lambda state: state.__ior__({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}),
    "copies": lambda state: [state.__setitem__(k, v.clone()) for k, v in state.items() if isinstance(v, Tensor)],
}


@ours
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_loop_that_moves_the_state_changes_nothing(offload: Callable[[Any], Any], make: Make) -> None:
    (model, optimizer), (twin, untouched) = begun(make, bias="all"), begun(make, bias="all")
    for entry in optimizer.state.values():
        offload(entry)
    assert_same_bits(go_on(model, optimizer), go_on(twin, untouched))
    assert_same_trees(optimizer.state_dict(), untouched.state_dict())


@ours
def test_state_that_is_put_in_as_new_dicts_is_taken(make: Make) -> None:
    """As trainers do that move an optimizer's state to a device."""
    (model, optimizer), (twin, untouched) = begun(make, bias="all"), begun(make, bias="all")
    for p, entry in optimizer.state.items():
        optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
    assert_same_bits(go_on(model, optimizer), go_on(twin, untouched))
    assert_same_trees(optimizer.state_dict(), untouched.state_dict())


@every
def test_state_dict_has_torchs_form(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    saved = optimizer.state_dict()
    assert {"state", "param_groups"} <= saved.keys()
    assert saved.keys() == {"state", "param_groups"} or not isinstance(optimizer, oplora.AdamW)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(trained(model)))) and set(saved["state"]) == set(numbers)


@every
def test_state_dict_is_loaded_with_weights_only_and_goes_on_bit_for_bit(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    twin = make_model(bias="all")
    resumed = make(twin)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))


@every
def test_state_saved_before_the_first_step_goes_on_bit_for_bit(make: Make) -> None:
    (model, optimizer), twin = begun(make, steps=0), make_model()
    resumed = make(twin, seed=5)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))


@ours
@pytest.mark.parametrize(
    "hand_over", [lambda m: m.parameters(), lambda m: m.named_parameters()], ids=["nameless", "named"]
)
def test_state_of_handed_over_parameters_goes_on_bit_for_bit(hand_over: Callable[[nn.Module], Any], make: Make) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = make(hand_over(model)), make(hand_over(twin), seed=5)
    go_on(model, optimizer)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))


def in_groups(model: nn.Module, *orders: list[int]) -> list[dict[str, Any]]:
    named = list(trained(model).items())
    return [{"params": [named[i] for i in order]} for order in orders]


@ours
def test_state_of_named_tensors_is_loaded_in_whatever_order_they_are(make: Make) -> None:
    """torch goes by places, but writes no values: here they would get into another layer."""
    sizes = {"target_modules": ["first", "second"], "bias": "all"}
    model, twin = (get_peft_model(Net((8, 8, 8)), LoraConfig(r=2, **sizes)) for _ in range(2))
    of_first, of_second = [0, 1, 2], [3, 4, 5]  # bias, A and B of each layer
    optimizer = make(in_groups(model, [*of_first, *of_second[1:]], of_second[:1]))
    resumed = make(in_groups(twin, [*of_second[1:], *reversed(of_first)], of_second[:1]))
    go_on(model, optimizer)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(bits(twin), bits(model))
    for (name, p), its in zip(trained(model).items(), trained(twin).values(), strict=True):
        for key in moments_of(optimizer.state[p]):
            assert torch.equal(optimizer.state[p][key], resumed.state[its][key]), name


@ours
def test_state_of_tensors_that_were_in_other_groups_is_refused_and_nothing_changed(make: Make) -> None:
    config = LoraConfig(r=2, target_modules=["first", "second"])
    model, twin = (get_peft_model(Net((8, 8, 8)), config) for _ in range(2))
    optimizer, other = make(in_groups(model, [0, 1], [2, 3])), make(in_groups(twin, [2, 3], [0, 1]))
    go_on(model, optimizer)
    before = everything(twin, other)
    with pytest.raises(oplora.OPLoRAError, match=r"group 0 has .*second.* where the saved one has .*first"):
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_trees(everything(twin, other), before)


@every
def test_reading_the_state_changes_nothing(make: Make) -> None:
    (model, optimizer), (twin, unread) = begun(make, steps=0, bias="all"), begun(make, steps=0, bias="all")
    for i in range(3):
        optimizer.state_dict(), repr(optimizer), optimizer.state, copy.deepcopy(optimizer.state_dict())
        give_gradients(model, i), give_gradients(twin, i)
        optimizer.state_dict()
        optimizer.step(), unread.step()
    assert_same_bits(bits(model), bits(twin))
    assert_same_trees(optimizer.state_dict(), unread.state_dict())


@every
def test_hooks_on_saving_run_and_see_everything(make: Make) -> None:
    _, optimizer = begun(make)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    optimizer.register_state_dict_post_hook(lambda o, saved: {"mine": saved})
    saved = optimizer.state_dict()
    assert seen == [optimizer] and saved.keys() == {"mine"}
    assert "factor" in saved["mine"]["state"][0]


@every
def test_hooks_on_loading_run_and_see_everything(make: Make) -> None:
    (model, optimizer), (twin, resumed) = begun(make), begun(make, steps=0)
    seen = []
    resumed.register_load_state_dict_pre_hook(lambda o, saved: saved["mine"])
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(factors(twin)))
    resumed.load_state_dict({"mine": copy.deepcopy(optimizer.state_dict())})
    assert_same_bits(seen[0], factors(model))


@every
def test_step_hooks_run_around_the_step(make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make), begun(make)
    seen = []

    def halve(*_: Any) -> None:
        torch._foreach_mul_([p.grad for p in generated(model)], 0.5)

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda o, *_: seen.append(factors(model)))
    give_gradients(model), give_gradients(twin)
    for p in generated(twin):
        p.grad *= 0.5
    optimizer.step(), other.step()
    assert_same_bits(factors(model), factors(twin))
    assert_same_bits(seen[0], factors(model))


@every
def test_state_of_torchs_adamw_is_refused_and_nothing_changed(make: Make) -> None:
    model, optimizer = begun(make)
    other = torch.optim.AdamW(generated(make_model()))
    before = everything(model, optimizer)
    with pytest.raises(oplora.OPLoRAError):
        optimizer.load_state_dict(other.state_dict())
    assert_same_trees(everything(model, optimizer), before)


# ---- arguments ----


@ours
@pytest.mark.parametrize("name", ["foreach", "fused", "capturable"])
@pytest.mark.parametrize("value", [True, False, None])
def test_argument_that_means_nothing_here_is_taken(name: str, value: Any, make: Make) -> None:
    (model, optimizer), (twin, other) = begun(lambda m: make(m, **{name: value})), begun(make)
    assert_same_bits(go_on(model, optimizer), go_on(twin, other))


@ours
@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_argument_that_would_change_the_step_is_refused_when_true(name: str, make: Make) -> None:
    model = make_model()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=rf"{name}=True is not supported: \w+"):
        make(model, **{name: True})
    assert_same_bits(factors(model), before)


@ours
@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_argument_that_would_change_the_step_is_taken_when_false(name: str, make: Make) -> None:
    make(make_model(), **{name: False})


@ours
@pytest.mark.parametrize("name", ["amsgrad", "maximize", "differentiable"])
def test_argument_in_a_group_that_would_change_the_step_is_refused(name: str, make: Make) -> None:
    with pytest.raises(oplora.OPLoRAError, match=f"{name}=True is not supported .parameter group 0."):
        make([{"params": generated(make_model()), name: True}])


@every
def test_argument_that_nobody_knows_is_refused_by_its_name(make: Make) -> None:
    with pytest.raises(TypeError, match="wieght_decay") as raised:
        make(make_model(), wieght_decay=0.1)
    assert isinstance(raised.value, oplora.OPLoRAError)


@every
@pytest.mark.parametrize("name", ["lr", "weight_decay", "hidden_lr_ratio", "latent_std", "hidden_width", "seed"])
@pytest.mark.parametrize("value", ["1e-4", "3", [1], float("nan"), -1, True], ids=str)
def test_argument_of_the_wrong_kind_is_refused_before_anything_is_written(name: str, value: Any, make: Make) -> None:
    model = make_model()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=f"{name}"):
        make(model, **{name: value})
    assert_same_bits(factors(model), before)


@ours
@pytest.mark.parametrize("name", ["eps", "max_grad_norm", "precondition", "weight_rank", "moment_rank"])
def test_text_is_refused_by_the_arguments_name(name: str, make: Make) -> None:
    with pytest.raises(oplora.OPLoRAError, match=f"{name} is ('1e-4', expected|for presets 'paper' and 'flat')"):
        make(make_model(), **{name: "1e-4"})


@ours
@pytest.mark.parametrize("betas", [("0.9", "0.99"), 0.9, (0.9,), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), "ab"])
def test_betas_that_are_none_are_refused(betas: Any, make: Make) -> None:
    with pytest.raises(oplora.OPLoRAError, match="betas"):
        make(make_model(), betas=betas)


@every
@pytest.mark.parametrize("name", [["default"], 3, ("default",)])
def test_adapter_name_that_is_no_name_is_refused(name: Any, make: Make) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"adapter_name is .*expected the name of one adapter"):
        make(make_model(), adapter_name=name)


@every
def test_adapter_that_is_not_there_is_refused_with_those_that_are(make: Make) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"no adapter is named 'other'; the model has 'default'"):
        make(make_model(), adapter_name="other")


# ---- gradients ----


SPARSE = [
    (name, which) for name in EVERY for which in ("lora_A", "lora_B", "bias") if (name[:3], which) != ("SGD", "bias")
]


@pytest.mark.parametrize(("name", "which"), SPARSE)
def test_sparse_gradient_is_refused_and_nothing_changed(name: str, which: str) -> None:
    model, optimizer = begun(EVERY[name], bias="all")
    give_gradients(model)
    p = next(p for name, p in trained(model).items() if which in name)
    p.grad = p.grad.to_sparse()
    before = everything(model, optimizer)
    with pytest.raises(oplora.OPLoRAError, match="sparse"):
        optimizer.step()
    assert_same_trees(everything(model, optimizer), before)


@ours
@pytest.mark.parametrize("which", ["lora_A", "bias"])
def test_sparse_gradient_is_refused_by_clipping(which: str, make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    give_gradients(model)
    p = next(p for name, p in trained(model).items() if which in name)
    p.grad = p.grad.to_sparse()
    with pytest.raises(oplora.OPLoRAError, match="sparse"):
        optimizer.clip_grad_norm_(1.0)


def test_sparse_gradient_that_the_class_steps_is_stepped() -> None:
    (model, optimizer), (twin, other) = (begun(OVER_GENERATORS["SGD over generators"], bias="all") for _ in range(2))
    give_gradients(model), give_gradients(twin)
    for name, p in trained(model).items():
        if name.endswith("bias"):
            p.grad = p.grad.to_sparse()
    optimizer.step(), other.step()
    assert_same_bits(bits(model), bits(twin))


@every
def test_gradient_scaled_in_its_data_is_stepped_as_it_is(make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make, bias="all"), begun(make, bias="all")
    give_gradients(model), give_gradients(twin)
    for p, its in zip(trained(model).values(), trained(twin).values(), strict=True):
        p.grad.data.mul_(0.5)
        its.grad = its.grad * 0.5
    optimizer.step(), other.step()
    assert_same_bits(bits(model), bits(twin))


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "data.mul_": lambda grad: grad.data.mul_(0.5),
    "data.add_": lambda grad: grad.data.add_(1.0),
    "numpy": lambda grad: grad.numpy().__imul__(0.5),
    "one entry": lambda grad: grad.data.view(-1)[1:2].fill_(7.0),
    "nan": lambda grad: grad.data.view(-1)[1:2].fill_(math.nan),
    "an exchange": lambda grad: grad.data.copy_(grad.data.flip(0)),
}


@ours
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_gradient_edited_after_clipping_is_stepped_as_it_is(edit: Callable[[Tensor], Any], make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make), begun(make)
    give_gradients(model), give_gradients(twin)
    optimizer.clip_grad_norm_(0.1), other.clip_grad_norm_(0.1)
    for p, its in zip(generated(model), generated(twin), strict=True):
        edit(p.grad)
        its.grad = p.grad.clone()  # another tensor, so nothing that was measured holds for it
    for each in (optimizer, other):
        each.skip_nonfinite = True
        each.step()
    assert_same_bits(bits(model), bits(twin))


@every
def test_loop_that_is_compiled_whole_trains_as_the_uncompiled_one(make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make, bias="all"), begun(make, bias="all")

    def one_step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        if hasattr(optimizer, "clip_grad_norm_"):
            optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(one_step, backend="eager")
    for pair in batches(3, torch.float32):
        torch.testing.assert_close(compiled(model, optimizer, *pair), one_step(twin, other, *pair))
    for name, p in bits(model).items():
        torch.testing.assert_close(p, bits(twin)[name], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@every
def test_closure_is_evaluated_with_gradients_once_and_returned(make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make), begun(make)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        calls.append(backward(model))
        return calls[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0] and len(calls) == 1
    backward(twin)
    other.step()
    assert_same_bits(bits(model), bits(twin))


@every
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_every_gradient(set_to_none: bool, make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    give_gradients(model)
    optimizer.zero_grad(set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in trained(model).values())


@every
def test_step_without_any_gradient_changes_nothing(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    before = everything(model, optimizer)
    optimizer.step()
    assert_same_trees(everything(model, optimizer), before)


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edited", ["lora_A", "second"])
@pytest.mark.filterwarnings("ignore:oplora. the factors of:UserWarning")
def test_state_saved_after_an_edit_goes_on_bit_for_bit(edited: str, dtype: torch.dtype, make: Make) -> None:
    """As where an average is swapped in before saving: what is resumed is what was there."""
    model, optimizer = begun(make, dtype, steps=5)
    twin = make_model(dtype)
    resumed = make(twin)
    for name, p in trained(model).items():
        if edited in name:
            p.data.mul_(0.5).add_(0.25)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_while_an_average_is_swapped_in_leaves_the_run_as_it_is(dtype: torch.dtype, make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make, dtype, steps=5), begun(make, dtype, steps=5)
    before = bits(model)
    with torch.no_grad():
        for p in trained(model).values():
            p.mul_(0.5)
        optimizer.state_dict()
        for name, p in trained(model).items():
            p.copy_(before[name])
    assert_same_bits(go_on(model, optimizer), go_on(twin, other))


def test_edit_of_one_bfloat16_factor_makes_no_start_of_its_neighbours_rounding() -> None:
    model, optimizer = begun(OURS["exact"], torch.bfloat16)
    A, B = generated(model)[:2]
    A.data.mul_(2)
    give_gradients(model)
    with pytest.warns(UserWarning, match="were changed"):
        optimizer.step()
    assert "base" in optimizer.state[A] and "base" not in optimizer.state[B]


FROZEN = ("lora_A", "lora_B")


def freeze(model: nn.Module, what: str, on: bool) -> None:
    for name, p in model.named_parameters():
        if what in name:
            p.requires_grad_(not on)
            p.grad = None


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", FROZEN)
def test_factor_that_is_frozen_in_training_stays_while_the_other_moves(
    what: str, dtype: torch.dtype, make: Make
) -> None:
    model, optimizer = begun(make, dtype, steps=5)
    freeze(model, what, True)
    before = factors(model)
    go_on(model, optimizer, 5)
    for name, p in factors(model).items():
        assert torch.equal(p, before[name]) == (what in name)


@every
@pytest.mark.parametrize("what", FROZEN)
def test_factor_that_is_unfrozen_again_goes_on_from_where_it_stayed(what: str, make: Make) -> None:
    model, optimizer = begun(make, torch.float64, steps=5)
    freeze(model, what, True)
    before = factors(model)
    go_on(model, optimizer, 50)
    freeze(model, what, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody has edited anything
        for group in optimizer.param_groups:
            group["lr"] = 1e-9
        go_on(model, optimizer, 1)
    for name, p in factors(model).items():
        if what in name:
            torch.testing.assert_close(p, before[name], rtol=0, atol=1e-4)
            assert not torch.equal(p, before[name])


@ours
@pytest.mark.parametrize("what", FROZEN)
def test_state_with_a_frozen_factor_goes_on_bit_for_bit(what: str, make: Make) -> None:
    model, optimizer = begun(make, steps=5)
    freeze(model, what, True)
    go_on(model, optimizer)
    twin = make_model()
    resumed = make(twin)
    freeze(twin, what, True)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))
    for each in (model, twin):
        freeze(each, what, False)
    assert_same_bits(go_on(twin, resumed), go_on(model, optimizer))


# ---- torch's defaults ----


@ours
def test_default_device_is_not_where_the_optimizer_keeps_anything(make: Make) -> None:
    """As after torch.set_default_device("cuda"), with factors wherever they are."""
    model, twin = make_model(bias="all"), make_model(bias="all")
    with torch.device("meta"):
        optimizer = make(model, max_grad_norm=0.1)
    other = make(twin, max_grad_norm=0.1)
    for seed in range(3):
        give_gradients(model, seed), give_gradients(twin, seed)
        other.step()
        other.load_state_dict(copy.deepcopy(other.state_dict()))
        with torch.device("meta"):
            optimizer.step()
            oplora.stats(optimizer)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(bits(model), bits(twin))
    assert_same_trees(optimizer.state_dict(), other.state_dict())


@ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_default_dtype_changes_nothing(dtype: torch.dtype, make: Make) -> None:
    """bfloat16 counts to 256."""
    model, twin = make_model(bias="all"), make_model(bias="all")
    torch.set_default_dtype(dtype)
    try:
        optimizer = make(model)
    finally:
        torch.set_default_dtype(torch.float32)
    other = make(twin)
    for _ in range(2):
        kept, expected = (tree_flatten(each.state_dict())[0] for each in (optimizer, other))
        assert [getattr(one, "dtype", None) for one in kept] == [getattr(one, "dtype", None) for one in expected]
        assert_same_trees(optimizer.state_dict(), other.state_dict())
        go_on(model, optimizer), go_on(twin, other)


# ---- plain parameters of any kind ----


@ours
def test_plain_parameter_without_entries_is_stepped_beside_others(make: Make) -> None:
    model, empty = make_model(), nn.Parameter(torch.empty(0))
    optimizer = make([*model.parameters(), empty], max_grad_norm=1.0)
    before = bits(model)
    give_gradients(model)
    empty.grad = torch.empty(0)
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())


@ours
def test_clipping_counts_the_imaginary_part_of_a_complex_parameter(make: Make) -> None:
    model, extra = make_model(), nn.Parameter(torch.ones(4, dtype=torch.complex64))
    optimizer = make([*model.parameters(), extra])
    extra.grad = torch.full((4,), 2j, dtype=torch.complex64)
    assert float(optimizer.clip_grad_norm_(1.0)) == 4.0
    torch.testing.assert_close(extra.grad, torch.full((4,), 0.5j, dtype=torch.complex64))


# ---- other hands on the factors ----


EXACT_AND_GENERATORS = {name: make for name, make in EVERY.items() if name not in ("lean", "auto")}
HALVES = [
    *((name, torch.float32) for name in EVERY),
    *((name, torch.bfloat16) for name in EVERY),
]


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
@pytest.mark.filterwarnings("ignore:oplora. the factors of")
def test_values_written_into_the_data_are_gone_on_from(name: str, dtype: torch.dtype) -> None:
    (model, optimizer), (twin, other) = begun(EVERY[name], dtype), begun(EVERY[name], dtype)
    for p, its in zip(generated(model), generated(twin), strict=True):
        new = torch.randn(p.shape).to(dtype)
        p.data.copy_(new)
        with torch.no_grad():
            its.copy_(new)
    before = bits(model)
    after = go_on(model, optimizer, 1)
    assert_same_bits(after, go_on(twin, other, 1))
    assert all((tensor - before[name]).abs().max() < 0.3 for name, tensor in after.items())


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
@pytest.mark.filterwarnings("ignore:oplora. the factors of")
def test_adapter_swapped_in_hot_is_gone_on_from(name: str, dtype: torch.dtype) -> None:
    (model, optimizer), (other, _) = begun(EVERY[name], dtype), begun(EVERY[name], dtype, steps=5)
    theirs = {key: value.clone() for key, value in get_peft_model_state_dict(other).items()}
    hotswap_adapter_from_state_dict(model, _with_adapter_names(theirs), "default", model.peft_config["default"])
    assert_same_bits(factors(model), factors(other))
    for key, tensor in go_on(model, optimizer, 1).items():
        assert 0 < (tensor - factors(other)[key]).abs().max() < 0.1


def _with_adapter_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".weight", ".default.weight"): value for key, value in state.items()}


@every
def test_one_entry_written_into_the_data_is_gone_on_from(make: Make) -> None:
    model, optimizer = begun(make)
    p = generated(model)[1]
    p.data.view(-1)[2] += 5.0
    before = p.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go_on(model, optimizer, 1)
    assert (p.detach() - before).abs().max() < 0.1


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
def test_kept_start_warning_points_at_the_users_line(make: Make) -> None:
    with pytest.warns(UserWarning, match="layers hold a start of their own") as caught:
        make(make_model(init_lora_weights="pissa"))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("make", EXACT_AND_GENERATORS.values(), ids=EXACT_AND_GENERATORS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_adopted_warning_points_at_the_users_line(scheduled: bool, make: Make) -> None:
    model, optimizer = begun(make)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    generated(model)[0].data.add_(1.0)
    give_gradients(model)
    with pytest.warns(UserWarning, match="were changed since the last step") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("make", EXACT_AND_GENERATORS.values(), ids=EXACT_AND_GENERATORS)
def test_warning_under_accelerate_points_at_the_users_line(make: Make, accelerator: Accelerator) -> None:
    model, optimizer = begun(make)
    model, prepared = accelerator.prepare(model, optimizer)
    generated(model)[0].data.add_(1.0)
    give_gradients(model)
    with pytest.warns(UserWarning, match="were changed since the last step") as caught:
        prepared.step()
    assert caught[0].filename == __file__


@ours
@pytest.mark.parametrize("what", ["lora", "base"])
def test_layer_unfrozen_later_is_trained_by_an_optimizer_of_the_models_parameters(what: str, make: Make) -> None:
    model = make_model()
    late = [p for n, p in model.named_parameters() if "second" in n and ("lora_" in n) == (what == "lora")]
    for p in late:
        p.requires_grad_(False)
    optimizer = make(model.parameters())
    go_on(model, optimizer)
    for p in late:
        p.requires_grad_(True)
    twins = [nn.Parameter(p.detach().clone()) for p in late]
    plain = torch.optim.AdamW(twins)
    for seed in range(3):
        give_gradients(model, seed)
        for twin, p in zip(twins, late, strict=True):
            twin.grad = p.grad.clone()
        optimizer.step()
        step_plainly(plain, optimizer)
    assert all(map(torch.equal, twins, late))


@every
@pytest.mark.parametrize("what", ["lora", "base"])
def test_layer_unfrozen_later_is_warned_about_once_by_an_optimizer_of_the_model(what: str, make: Make) -> None:
    model = make_model()
    late = [p for n, p in model.named_parameters() if "second" in n and ("lora_" in n) == (what == "lora")]
    for p in late:
        p.requires_grad_(False)
    optimizer = make(model)
    for p in late:
        p.requires_grad_(True)
    give_gradients(model)
    with pytest.warns(UserWarning, match=r"2 parameters have gradients that this optimizer does not step") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@every
def test_layer_unfrozen_and_added_as_a_group_is_not_warned_about(make: Make) -> None:
    """Which the warning advises."""
    model = make_model()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    optimizer = make(model)
    for p in biases:
        p.requires_grad_(True)
    optimizer.add_param_group({"params": biases})
    before = bits(model)
    give_gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", ["before", "after", "in training"])
def test_channels_last_changes_no_bit(when: str, dtype: torch.dtype, make: Make) -> None:
    def trained_as(memory_format: torch.memory_format) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=["0", "1"])
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)).to(dtype)
        model = get_peft_model(net, config, autocast_adapter_dtype=False)
        if when == "before":
            model.to(memory_format=memory_format)
        optimizer = make(model)
        if when == "after":
            model.to(memory_format=memory_format)
        go_on(model, optimizer)
        model.to(memory_format=memory_format)
        for p in generated(model):
            p.data.mul_(2)  # an edit, which is adopted
        go_on(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return go_on(model, optimizer), model

    (ours, model), (theirs, _) = trained_as(torch.channels_last), trained_as(torch.contiguous_format)
    assert not all(p.is_contiguous() for p in generated(model))
    assert_same_bits(ours, theirs)


# ---- who holds it ----


@every
def test_stats_and_monitor_take_what_accelerate_prepared(make: Make, tmp_path: Path, accelerator: Accelerator) -> None:
    model = make_model()
    model, optimizer = accelerator.prepare(model, make(model))
    monitor = oplora.Monitor(tmp_path, optimizer, every=1)
    train(model, optimizer, 2)
    monitor(1.0)
    assert all(numbers["norm_g"] > 0 for numbers in oplora.stats(optimizer).values())


def train_scaled(model: nn.Module, optimizer: Any, scaler: Any, pair: Any, unscale: bool) -> None:
    optimizer.zero_grad()
    x, y = pair
    scaler.scale((model(x) - y).square().mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@every
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_steps_as_without_it_and_skips_infinity(unscale: bool, make: Make) -> None:
    (model, optimizer), (twin, other) = begun(make, bias="all"), begun(make, bias="all")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    first, second = batches(2, torch.float32)
    train_scaled(model, optimizer, scaler, first, unscale)
    train_scaled(model, optimizer, scaler, (torch.full_like(first[0], math.inf), first[1]), unscale)
    train_scaled(model, optimizer, scaler, second, unscale)
    train_on(twin, other, [first, second])
    assert_same_bits(bits(model), bits(twin))
    assert scaler.get_scale() == 128.0


def by_torch(both: Any) -> Any:
    """As torch.save keeps a model and its optimizer as they are."""
    torch.save(both, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch.save": by_torch,
}
every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@every
@every_copy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_copy_goes_on_as_the_original(copied: Callable[[Any], Any], steps: int, dtype: torch.dtype, make: Make) -> None:
    model, optimizer = begun(make, dtype, steps=steps, bias="all")
    twin, other = copied((model, optimizer))
    assert_same_bits(go_on(twin, other), go_on(model, optimizer))
    assert_same_trees(other.state_dict(), optimizer.state_dict())


@every
@every_copy
def test_copy_shares_nothing_with_the_original(copied: Callable[[Any], Any], make: Make) -> None:
    model, optimizer = begun(make)
    before = everything(model, optimizer)
    go_on(*copied((model, optimizer)))
    assert_same_trees(everything(model, optimizer), before)


@ours
@every_copy
def test_state_of_a_copy_is_live(copied: Callable[[Any], Any], make: Make) -> None:
    model, optimizer = begun(make)
    twin, other = copied((model, optimizer))
    for both in (optimizer, other):
        for entry in both.state.values():
            for name in moments_of(entry):
                entry[name].zero_()
    assert_same_bits(go_on(twin, other), go_on(model, optimizer))


def hand_over(model: nn.Module, how: str) -> Any:
    return {"model": lambda: model, "nameless": model.parameters, "named": model.named_parameters}[how]()


@ours
@pytest.mark.parametrize("how", ["model", "nameless", "named"])
@pytest.mark.parametrize("named", [False, True])
def test_group_that_is_added_is_stepped_by_plain_adamw(named: bool, how: str, make: Make) -> None:
    model, mine, its = make_model(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, plain = make(hand_over(model, how)), torch.optim.AdamW([its])
    if named and how == "nameless":
        pytest.skip("torch's optimizers refuse it")
    optimizer.add_param_group({"params": [("extra", mine)] if named else [mine], "lr": 0.5})
    for _ in range(3):
        give_gradients(model)
        mine.grad = torch.rand(3)
        its.grad = mine.grad.clone()
        optimizer.step()
        step_plainly(plain, optimizer, of_group=-1)
    assert torch.equal(mine, its)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@ours
def test_tensor_itself_may_be_added_as_a_group(make: Make) -> None:
    optimizer, extra = make(make_model()), nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": extra})
    assert optimizer.param_groups[-1]["params"] == [extra]


@ours
@pytest.mark.parametrize("how", ["model", "nameless", "named"])
def test_added_tensors_without_an_order_are_refused(how: str, make: Make) -> None:
    optimizer = make(hand_over(make_model(), how))
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.ones(3))}})


@ours
def test_entry_that_is_merged_into_is_what_the_step_reads(make: Make) -> None:
    model, optimizer = begun(make)
    entry = optimizer.state[generated(model)[0]]
    entry |= {"exp_avg_sq": torch.zeros_like(entry["exp_avg_sq"])}
    go_on(model, optimizer, 1)
    assert entry["exp_avg_sq"].any()


@every
def test_added_tensor_that_is_held_already_is_refused(make: Make) -> None:
    model, optimizer = begun(make)
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": generated(model)[:1]})
    assert len(optimizer.param_groups) == 1
    go_on(model, optimizer)


@every
def test_accelerate_saves_and_loads_it(make: Make, tmp_path: Path, accelerator: Accelerator) -> None:
    model = make_model(bias="all")
    prepared, optimizer = accelerator.prepare(model, make(model))
    train(prepared, optimizer, 2)
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    expected = train(prepared, optimizer, 2)
    accelerator.load_state(str(tmp_path))
    assert train(prepared, optimizer, 2) == expected


@every
def test_group_by_group_it_is_a_torch_optimizer(make: Make) -> None:
    model, optimizer = begun(make, bias="all")
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(map(id, held))) == len(trained(model))
    assert {id(p) for p in held} == {id(p) for p in trained(model).values()}
