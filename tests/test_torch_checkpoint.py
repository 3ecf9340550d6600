"""torch.distributed.checkpoint saves and resumes every optimizer to the bit, in one process and in two."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import assert_same_bits, batches, make_model
from ranks import WORLD, Ranks, join_group
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

import oplora

Make = Callable[..., torch.optim.Optimizer]
Bits = dict[str, Tensor]


def apart(model: nn.Module) -> list[dict[str, Any]]:
    """B faster than everything else."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [[item for item in named if ("lora_B" in item[0]) == is_b] for is_b in (False, True)]
    return [{"params": some, "lr": lr} for some, lr in zip(groups, (1e-3, 2e-2), strict=True)]


OURS: dict[str, Make] = {
    "auto": lambda model, **options: oplora.AdamW(model, **options),
    "lean": lambda model, **options: oplora.AdamW(model, lr=1e-2, state="lean", **options),
    "exact": lambda model, **options: oplora.AdamW(model, lr=1e-2, state="exact", **options),
    "lean, kept": lambda model, **options: oplora.AdamW(model, lr=1e-2, state="lean", init="keep", **options),
    "exact, flat": lambda model, **options: oplora.AdamW(model, lr=1e-2, state="exact", preset="flat", **options),
    "lean, nameless": lambda model, **options: oplora.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, state="lean", **options
    ),
    "exact, apart": lambda model, **options: oplora.AdamW(apart(model), state="exact", **options),
}
EVERY: dict[str, Make] = {
    **OURS,
    "AdamW over generators": lambda model, **options: oplora.create_oplora_optimizer(
        model, torch.optim.AdamW, lr=1e-2, **options
    ),
    "SGD over generators": lambda model, **options: oplora.create_oplora_optimizer(
        model, torch.optim.SGD, lr=1e-2, momentum=0.9, **options
    ),
}
every = pytest.mark.parametrize("name", EVERY)
ours = pytest.mark.parametrize("name", OURS)
with_generators = pytest.mark.parametrize("name", [name for name in EVERY if name != "auto"])  # a layer
OPTIONS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
every_form = pytest.mark.parametrize("form", OPTIONS)
DTYPES = [torch.float32, torch.bfloat16]


def bits(model: nn.Module) -> Bits:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int, each: Any = None) -> list[float]:
    """In several processes each on its part of every batch."""
    losses = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    dtype = next(model.parameters()).dtype
    for x, y in list(batches(end, dtype))[begin:]:
        if each is not None:
            each()
        optimizer.zero_grad()
        loss = (model(x[rank::WORLD]) - y[rank::WORLD]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def read(model: nn.Module, optimizer: Any, form: str) -> dict[str, Any]:
    if isinstance(optimizer, oplora.AdamW):
        optimizer.consolidate_state_dict(to=None)
    return get_optimizer_state_dict(model, optimizer, options=OPTIONS[form])


def first_read(optimizer: torch.optim.Optimizer) -> int:
    """Before the first step torch makes one of its own, at rate 0, in a class that has no state yet; Adam counts it."""
    return 0 if isinstance(optimizer, oplora.AdamW) else 1


def through_a_folder(folder: Path, form: str, model: nn.Module, optimizer: Any, fresh: nn.Module, resumed: Any) -> None:
    dcp.save({"model": get_model_state_dict(model), "optimizer": read(model, optimizer, form)}, checkpoint_id=folder)
    template = {"model": get_model_state_dict(fresh), "optimizer": read(fresh, resumed, form)}
    dcp.load(template, checkpoint_id=folder)
    set_model_state_dict(fresh, template["model"])
    set_optimizer_state_dict(fresh, resumed, template["optimizer"], options=OPTIONS[form])


# ---- one process ----


@every
@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_that_is_saved_in_a_folder_resumes_bit_for_bit(
    tmp_path: Path, form: str, name: str, dtype: torch.dtype
) -> None:
    model, fresh = make_model(dtype, bias="all"), make_model(dtype, bias="all")
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh, seed=5)
    train(model, optimizer, 0, 3)
    through_a_folder(tmp_path, form, model, optimizer, fresh, resumed)
    assert train(fresh, resumed, 3, 6) == train(model, optimizer, 3, 6)
    assert_same_bits(bits(fresh), bits(model))


@every
@every_form
def test_state_that_is_handed_over_in_memory_resumes_bit_for_bit(form: str, name: str) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh, seed=5)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=OPTIONS[form]))
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    set_optimizer_state_dict(fresh, resumed, saved, options=OPTIONS[form])
    assert train(fresh, resumed, 3, 6) == train(model, optimizer, 3, 6)
    assert_same_bits(bits(fresh), bits(model))


@every
def test_model_and_optimizer_together_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh, seed=5)
    train(model, optimizer, 0, 3)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    of_model, of_optimizer = get_state_dict(fresh, resumed)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path)
    set_state_dict(fresh, resumed, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert train(fresh, resumed, 3, 6) == train(model, optimizer, 3, 6)


@every
@every_form
def test_run_that_reads_at_every_step_equals_one_that_never_does(form: str, name: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    optimizer, unread = EVERY[name](model), EVERY[name](twin)
    begin = first_read(optimizer)
    train(model, optimizer, 0, begin), train(twin, unread, 0, begin)
    losses = train(
        model, optimizer, begin, 4, lambda: get_optimizer_state_dict(model, optimizer, options=OPTIONS[form])
    )
    assert losses == train(twin, unread, begin, 4)
    assert_same_bits(bits(model), bits(twin))


@ours
@every_form
def test_reading_before_the_first_step_changes_nothing(form: str, name: str) -> None:
    model = make_model(bias="all")
    optimizer = OURS[name](model)
    before = bits(model), copy.deepcopy(optimizer.state_dict())
    get_optimizer_state_dict(model, optimizer, options=OPTIONS[form])
    assert_same_bits(bits(model), before[0])
    (one, form_of), (two, expected) = tree_flatten(optimizer.state_dict()), tree_flatten(before[1])
    assert form_of == expected
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True))


@every
@every_form
def test_state_of_before_the_first_step_resumes_bit_for_bit(tmp_path: Path, form: str, name: str) -> None:
    model, fresh = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh, seed=5)
    through_a_folder(tmp_path, form, model, optimizer, fresh, resumed)
    assert train(fresh, resumed, 0, 3) == train(model, optimizer, 0, 3)


@every
def test_checkpoint_is_put_into_an_optimizer_that_has_stepped(name: str, tmp_path: Path) -> None:
    model, other = make_model(bias="all"), make_model(bias="all")
    optimizer, resumed = EVERY[name](model), EVERY[name](other, seed=5)
    train(model, optimizer, 0, 3), train(other, resumed, 2, 4)
    through_a_folder(tmp_path, "nested", model, optimizer, other, resumed)
    assert train(other, resumed, 3, 6) == train(model, optimizer, 3, 6)


@with_generators
@every_form
def test_edit_that_was_adopted_before_saving_is_gone_on_from_without_a_warning(
    tmp_path: Path, form: str, name: str
) -> None:
    model, fresh = make_model(), make_model()
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh)
    train(model, optimizer, 0, 2)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, 2, 3)
    through_a_folder(tmp_path, form, model, optimizer, fresh, resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if form == "flattened" else "error")  # flattened, the factors are the model's
        assert train(fresh, resumed, 3, 6) == train(model, optimizer, 3, 6)


@with_generators
def test_schedule_and_numbers_of_the_groups_come_along(name: str, tmp_path: Path) -> None:
    model, fresh = make_model(), make_model()
    optimizer, resumed = EVERY[name](model), EVERY[name](fresh)
    scheduler, later = (torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, resumed))
    optimizer.param_groups[0]["hidden_lr_ratio"] = 0.25
    train(model, optimizer, 0, 3, scheduler.step)
    through_a_folder(tmp_path, "flattened", model, optimizer, fresh, resumed)
    later.load_state_dict(scheduler.state_dict())
    assert resumed.param_groups[0]["hidden_lr_ratio"] == 0.25
    assert train(fresh, resumed, 3, 6, later.step) == train(model, optimizer, 3, 6, scheduler.step)


@pytest.mark.parametrize("ours", ["lean", "exact"])
def test_checkpoint_of_the_other_state_is_refused_and_nothing_changed(ours: str) -> None:
    model, other = make_model(), make_model()
    optimizer, refusing = OURS["exact" if ours == "lean" else "lean"](model), OURS[ours](other)
    train(model, optimizer, 0, 2)
    before = bits(other)
    with pytest.raises(oplora.OPLoRAError, match=f"state='{ours}'|state of layer"):
        set_optimizer_state_dict(other, refusing, get_optimizer_state_dict(model, optimizer))
    assert_same_bits(bits(other), before)


# ---- two processes ----


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(join_group, ("peft", "torch.distributed.checkpoint"))
    yield pair
    pair.stop(wait=True)


def replica(name: str, shard: bool, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model under DistributedDataParallel, and the optimizer of the model."""
    model = make_model(bias="all")
    optimizer = EVERY[name](model, **options, **({"shard": True} if shard else {}))
    return DistributedDataParallel(model), optimizer


def save_and_resume(name: str, shard: bool, form: str, steps: int, folder: Path) -> tuple[list[Any], list[Any]]:
    """The losses and factors of the run that goes on, and of the one that resumes."""
    model, optimizer = replica(name, shard)
    fresh, resumed = replica(name, shard, seed=5)
    train(model, optimizer, 0, steps)
    through_a_folder(folder, form, model, optimizer, fresh, resumed)
    runs = [(model, optimizer), (fresh, resumed)]
    return tuple([train(each, its, 3, 6), *bits(each).values()] for each, its in runs)  # type: ignore[return-value]


def assert_alike(ours: list[Any], theirs: list[Any]) -> None:
    assert ours[0] == theirs[0]
    assert all(map(torch.equal, ours[1:], theirs[1:]))


REPLICAS = [*((name, False) for name in EVERY), *((name, True) for name in OURS)]
every_replica = pytest.mark.parametrize(("name", "shard"), REPLICAS)


@every_replica
@pytest.mark.parametrize("form", ["nested", "flattened"])
def test_replicas_resume_bit_for_bit(ranks: Ranks, tmp_path: Path, form: str, name: str, shard: bool) -> None:
    results = ranks.run(save_and_resume, name, shard, form, 3, tmp_path)
    for kept_on, resumed in results:
        assert_alike(resumed, kept_on)
    assert all(map(torch.equal, results[0][1][1:], results[1][1][1:]))


@pytest.mark.parametrize(("name", "shard"), [("lean", False), ("exact", True), ("SGD over generators", False)])
def test_replicas_resume_from_before_the_first_step(ranks: Ranks, tmp_path: Path, name: str, shard: bool) -> None:
    for kept_on, resumed in ranks.run(save_and_resume, name, shard, "nested", 0, tmp_path):
        assert_alike(resumed, kept_on)


def read_or_not(name: str, shard: bool) -> tuple[list[Any], list[Any]]:
    (model, optimizer), (twin, unread) = replica(name, shard), replica(name, shard)
    begin = first_read(optimizer)
    train(model, optimizer, 0, begin), train(twin, unread, 0, begin)
    losses = train(model, optimizer, begin, 4, lambda: read(model, optimizer, "nested"))
    return [losses, *bits(model).values()], [train(twin, unread, begin, 4), *bits(twin).values()]


@every_replica
def test_replicas_that_read_at_every_step_equal_those_that_never_do(ranks: Ranks, name: str, shard: bool) -> None:
    for reading, unread in ranks.run(read_or_not, name, shard):
        assert_alike(reading, unread)


def save_replicas(name: str, shard: bool, folder: Path) -> None:
    model, optimizer = replica(name, shard)
    train(model, optimizer, 0, 3)
    dcp.save(
        {"optimizer": read(model, optimizer, "nested"), "model": get_model_state_dict(model)}, checkpoint_id=folder
    )


def load_replicas(name: str, shard: bool, folder: Path) -> Bits:
    model, optimizer = replica(name, shard, seed=5)
    template = {"optimizer": read(model, optimizer, "nested"), "model": get_model_state_dict(model)}
    dcp.load(template, checkpoint_id=folder)
    set_model_state_dict(model, template["model"])
    set_optimizer_state_dict(model, optimizer, template["optimizer"])
    train(model, optimizer, 3, 6)
    return bits(model.module)


@pytest.mark.parametrize("name", ["lean", "exact"])
def test_sharded_checkpoint_goes_on_whole_and_the_other_way(ranks: Ranks, tmp_path: Path, name: str) -> None:
    results = []
    for shard in (False, True):
        ranks.run(save_replicas, name, shard, tmp_path / str(shard))
        results += [ranks.run(load_replicas, name, then, tmp_path / str(shard))[0] for then in (False, True)]
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", ["lean", "exact"])
def test_checkpoint_of_two_processes_is_read_in_one(ranks: Ranks, tmp_path: Path, name: str, shard: bool) -> None:
    ranks.run(save_replicas, name, shard, tmp_path)
    model = make_model(bias="all")
    optimizer = EVERY[name](model, seed=5)
    template = {"optimizer": read(model, optimizer, "nested"), "model": get_model_state_dict(model)}
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizer, template["optimizer"])
    for held, p in zip(template["model"].values(), model.state_dict().values(), strict=True):
        assert torch.equal(held, p)
    assert all(int(entry.get("step", 3)) == 3 for entry in optimizer.state.values())


def read_unconsolidated() -> str:
    model, optimizer = replica("lean", True)
    train(model, optimizer, 0, 1)
    with pytest.raises(oplora.OPLoRAError) as raised:
        get_optimizer_state_dict(model, optimizer)
    return str(raised.value)


def test_share_alone_is_refused_with_the_remedy(ranks: Ranks) -> None:
    for said in ranks.run(read_unconsolidated):
        assert "consolidate_state_dict(to=" in said and "to=None" in said
