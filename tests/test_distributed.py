"""oplora.AdamW in two processes: under DDP, accelerate, FSDP2 and DeepSpeed, with its generators whole and sharded.

A test hands a function of this module to both processes of a pair, and gets what each of them returns.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import adapter_types
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, DistributedType
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin, set_seed
from conftest import assert_same_bits, batches, options_of
from peft import LoraConfig, get_peft_model
from ranks import WORLD, Ranks, join_group, leave_it_to_accelerate
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import oplora
from oplora import engines
from oplora.adapters import find_layers
from oplora.engines import memory
from oplora.optim import refusals
from oplora.watching.plot import Run

WIDTH = 12
PRELOADED = ("accelerate", "peft", "torch.distributed.fsdp")
Bits = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

every_state = pytest.mark.parametrize("state", ["lean", "exact", "auto"])
whole_and_sharded = pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])


# ---- two processes ----


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pair = Ranks(join_group, PRELOADED)
    yield pair
    pair.stop(wait=True)


@pytest.fixture(scope="module")
def later_ranks() -> Iterator[Ranks]:
    """Processes that have seen nothing of what `ranks` did."""
    pair = Ranks(leave_it_to_accelerate, PRELOADED)
    yield pair
    pair.stop(wait=True)


# ---- what they train ----


def make_chain(widths: tuple[int, ...] = (WIDTH,) * 5, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """LoRA on linear layers one behind the other, always from the same seed; four equal ones unless told otherwise."""
    torch.manual_seed(0)
    linears = [nn.Linear(*pair) for pair in pairwise(widths)]
    chain = nn.Sequential(*(layer for linear in linears for layer in (linear, nn.Tanh())))
    settings = {"r": 3, "target_modules": [str(2 * i) for i in range(len(linears))], **config}
    return get_peft_model(chain.to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def make_biased() -> nn.Module:
    """Of three layers two have factors, all have trained biases, and the last is trained whole."""
    model = make_chain((WIDTH,) * 4, target_modules=["0", "2"], modules_to_save=["4"], bias="all")
    unused = model.base_model.model[4].original_module.bias
    unused.requires_grad_(False)  # DDP would wait for its gradient
    return model


def set_up(make: Callable[[], nn.Module], **settings: Any) -> tuple[nn.Module, oplora.AdamW, nn.Module]:
    """The model, its optimizer, and the model under DDP."""
    model = make()
    optimizer = oplora.AdamW(model, lr=1e-2, **settings)
    return model, optimizer, DistributedDataParallel(model)


def data(steps: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    return list(batches(steps, dtype, (WIDTH, WIDTH)))


def part(batch: Batch, rank: int) -> Batch:
    x, y = batch
    return x[rank::WORLD], y[rank::WORLD]


def backward(forward: nn.Module, batch: Batch) -> None:
    x, y = batch
    (forward(x) - y).square().mean().backward()


def train(forward: nn.Module, optimizer: torch.optim.Optimizer, some: Iterable[Batch]) -> None:
    """Each rank on its half of every batch."""
    for batch in some:
        optimizer.zero_grad()
        backward(forward, part(batch, dist.get_rank()))
        optimizer.step()


def trained(model: nn.Module) -> Bits:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_under_ddp(make: Callable[[], nn.Module], state: str, shard: bool = False, steps: int = 50) -> Bits:
    model, optimizer, ddp = set_up(make, **options_of(state), shard=shard)
    train(ddp, optimizer, data(steps))
    return trained(model)


def generators(optimizer: oplora.AdamW) -> Bits:
    states = optimizer._stepper.states
    return {f"{s.name}.{key}": piece.clone() for s in states for key, piece in s.pieces().items()}


def message_of(call: Callable[[], Any]) -> str:
    """Of the error of oplora that the call raises."""
    with pytest.raises(oplora.OPLoRAError) as raised:
        call()
    return str(raised.value)


# ---- DDP ----


@every_state
@pytest.mark.parametrize("make", [make_chain, make_biased])
def test_replicas_stay_bit_equal_on_different_data(ranks: Ranks, make: Callable[[], nn.Module], state: str) -> None:
    assert_same_bits(*ranks.run(train_under_ddp, make, state))


def train_on_mean_gradients(make: Callable[[], nn.Module], state: str) -> Bits:
    """In one process, which averages the gradients of the halves of a batch itself."""
    model = make()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    for batch in data(50):
        optimizer.zero_grad()
        for rank in range(WORLD):
            backward(model, part(batch, rank))
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= WORLD
        optimizer.step()
    return trained(model)


@every_state
@pytest.mark.parametrize("make", [make_chain, make_biased])
def test_ddp_equals_one_process_with_the_mean_gradient(ranks: Ranks, make: Callable[[], nn.Module], state: str) -> None:
    alone, _ = ranks.run(train_on_mean_gradients, make, state)
    assert_same_bits(ranks.run(train_under_ddp, make, state)[0], alone)


def accumulate(state: str, pieces: int) -> Bits:
    """Each rank's half of a batch in pieces, of which only the last is reduced."""
    model, optimizer, ddp = set_up(lambda: make_chain(dtype=torch.float64), **options_of(state))
    for batch in data(10, torch.float64):
        x, y = part(batch, dist.get_rank())
        *first, last = zip(x.chunk(pieces), y.chunk(pieces), strict=True)
        optimizer.zero_grad()
        with ddp.no_sync():
            for piece in first:
                backward(ddp, piece)
        backward(ddp, last)
        for p in optimizer.param_groups[0]["params"]:
            p.grad /= pieces
        optimizer.step()
    return trained(model)


@every_state
def test_accumulation_under_no_sync_keeps_replicas_bit_equal(ranks: Ranks, state: str) -> None:
    assert_same_bits(*ranks.run(accumulate, state, 2))


@every_state
def test_accumulation_under_no_sync_equals_one_big_batch(ranks: Ranks, state: str) -> None:
    (pieces, _), (whole, _) = (ranks.run(accumulate, state, count) for count in (2, 1))
    for name, tensor in pieces.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-9, atol=1e-12)


def start_apart(state: str) -> tuple[Bits, Bits]:
    """A rank's own start, to which its generators are tied before DDP overwrites it, and what was trained."""
    model = make_chain()
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    start = trained(model)
    _, optimizer, ddp = set_up(lambda: model, **options_of(state), init="keep")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="oplora: the factors of")
        train(ddp, optimizer, data(10))
    return start, trained(model)


@every_state
def test_replicas_that_start_apart_train_as_one(ranks: Ranks, state: str) -> None:
    (start, first), (other_start, second) = ranks.run(start_apart, state)
    assert not any(torch.equal(tensor, other_start[name]) for name, tensor in start.items())
    assert_same_bits(first, second)


def meet_nan(state: str, shard: bool, where: str) -> tuple[str, Bits, Bits]:
    """The error of a step on NaN, and all that the optimizer steps and keeps, before that step and after it."""
    model, optimizer, ddp = set_up(make_chain, **options_of(state), shard=shard)
    *good, (x, y) = data(4)
    train(ddp, optimizer, good)
    before = trained(model) | generators(optimizer)
    optimizer.zero_grad()
    if where == "data of rank 1":
        x[1] = float("nan")
    backward(ddp, part((x, y), dist.get_rank()))
    if where == "first layer":
        optimizer.param_groups[0]["params"][0].grad[0, 0] = float("nan")
    return message_of(optimizer.step), before, trained(model) | generators(optimizer)


@every_state
@whole_and_sharded
def test_nan_in_the_data_of_one_rank_stops_every_rank(ranks: Ranks, state: str, shard: bool) -> None:
    assert all("NaN or infinity" in message for message, _, _ in ranks.run(meet_nan, state, shard, "data of rank 1"))


@every_state
@whole_and_sharded
def test_nan_in_the_data_of_one_rank_changes_nothing(ranks: Ranks, state: str, shard: bool) -> None:
    for _, before, after in ranks.run(meet_nan, state, shard, "data of rank 1"):
        assert_same_bits(before, after)


def train_every_type(shard: bool) -> dict[str, Bits]:
    """A few steps of every adapter type in both states; with `shard` of those that have a layer for each process."""
    found = {}
    for case in adapter_types.CASES:
        for state in ("lean", "exact", "auto"):
            torch.manual_seed(0)
            model = adapter_types.make(case, torch.float32)
            if shard and len(find_layers(model)) < WORLD:
                continue
            optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state), shard=shard)
            ddp = DistributedDataParallel(model, find_unused_parameters=True)
            train(ddp, optimizer, adapter_types.data(case, 3, torch.float32))
            found[f"{case}, {state}"] = {name: p for name, p in trained(model).items() if p.numel()}
    return found


def test_every_adapter_type_stays_bit_equal_across_ranks_whole_and_sharded(ranks: Ranks) -> None:
    whole, other = ranks.run(train_every_type, False)
    sharded, other_sharded = ranks.run(train_every_type, True)
    assert len(whole) == 3 * len(adapter_types.CASES) and len(sharded) > len(whole) // 2
    for case, bits in whole.items():
        assert_same_bits(bits, other[case])
    for case, bits in sharded.items():
        assert_same_bits(bits, whole[case])
        assert_same_bits(bits, other_sharded[case])


# ---- sharded generators ----


@every_state
@pytest.mark.parametrize("make", [make_chain, make_biased])
def test_sharding_changes_no_bit(ranks: Ranks, make: Callable[[], nn.Module], state: str) -> None:
    whole, _ = ranks.run(train_under_ddp, make, state)
    for shared in ranks.run(train_under_ddp, make, state, True):
        assert_same_bits(shared, whole)


def bytes_kept(state: str, shard: bool) -> int:
    """Of the memory that the generators' tensors are in."""
    optimizer = oplora.AdamW(make_chain(), **options_of(state), shard=shard)
    memory = [piece.untyped_storage() for s in optimizer._stepper.states for piece in s.pieces().values()]
    return sum({piece.data_ptr(): piece.nbytes() for piece in memory}.values())


@every_state
def test_each_of_two_ranks_keeps_half_the_state_of_four_equal_layers(ranks: Ranks, state: str) -> None:
    whole, _ = ranks.run(bytes_kept, state, False)
    # of the rate that is found every process has its own
    assert ranks.run(bytes_kept, state, True) == pytest.approx(
        [whole / 2, whole / 2], rel=0.03 if state == "auto" else 0
    )


def entries_kept(widths: tuple[int, ...]) -> dict[str, int]:
    optimizer = oplora.AdamW(make_chain(widths), shard=True)
    return {s.name: sum(p.numel() for p in s.factors.layer.parameters()) for s in optimizer._stepper.states}


@pytest.mark.parametrize("widths", [(5, 90, 7, 30, 30, 4), (100, 3, 3, 3), (3, 3, 100)])
def test_unequal_layers_are_divided_by_their_entries(ranks: Ranks, widths: tuple[int, ...]) -> None:
    first, second = ranks.run(entries_kept, widths)
    assert len(first | second) == len(first) + len(second) == len(widths) - 1
    assert abs(sum(first.values()) - sum(second.values())) <= max((first | second).values())


@every_state
def test_nan_in_a_layer_of_one_share_stops_every_rank(ranks: Ranks, state: str) -> None:
    assert all("NaN or infinity" in message for message, _, _ in ranks.run(meet_nan, state, True, "first layer"))


@every_state
def test_nan_in_a_layer_of_one_share_changes_nothing(ranks: Ranks, state: str) -> None:
    for _, before, after in ranks.run(meet_nan, state, True, "first layer"):
        assert_same_bits(before, after)


def skip_a_step(state: str) -> Bits:
    model, optimizer, ddp = set_up(make_chain, **options_of(state), shard=True, skip_nonfinite=True)
    some = data(6)
    train(ddp, optimizer, some[:3])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    p.grad[0, 0] = float("nan")
    optimizer.step()
    train(ddp, optimizer, some[3:])
    return trained(model)


@every_state
def test_step_that_one_share_skips_is_skipped_by_all(ranks: Ranks, state: str) -> None:
    undisturbed, _ = ranks.run(train_under_ddp, make_chain, state, False, 6)
    for bits in ranks.run(skip_a_step, state):
        assert_same_bits(bits, undisturbed)


def clip(state: str, shard: bool) -> tuple[list[float], Bits]:
    model, optimizer, ddp = set_up(make_biased, **options_of(state), shard=shard)
    norms = []
    for batch in data(10):
        optimizer.zero_grad()
        backward(ddp, part(batch, dist.get_rank()))
        norms.append(optimizer.clip_grad_norm_(0.1).item())
        optimizer.step()
    return norms, trained(model)


@every_state
def test_sharded_clip_norm_is_the_unsharded_one_to_the_bit(ranks: Ranks, state: str) -> None:
    (whole, _), _ = ranks.run(clip, state, False)
    assert [norms for norms, _ in ranks.run(clip, state, True)] == [whole, whole]


@every_state
def test_sharded_clipped_steps_are_the_unsharded_ones_to_the_bit(ranks: Ranks, state: str) -> None:
    (norms, whole), _ = ranks.run(clip, state, False)
    assert min(norms) > 0.1
    for _, shared in ranks.run(clip, state, True):
        assert_same_bits(shared, whole)


def clip_layers_at_random(shard: bool) -> list[float]:
    """Norms of steps in which some layers have gradients, of layers of two dtypes."""
    model = make_chain((WIDTH,) * 15)
    for layer in model.base_model.model[::6]:
        layer.double()
    optimizer = oplora.AdamW(model, lr=1e-2, shard=shard)
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(20):
        optimizer.zero_grad()
        for i in torch.randperm(14, generator=generator)[:9]:
            for p in model.base_model.model[2 * i].parameters():
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        norms.append(optimizer.clip_grad_norm_(0.1).item())
        optimizer.step()
    return norms


def test_sharded_clip_norm_of_some_layers_is_the_unsharded_one_to_the_bit(ranks: Ranks) -> None:
    whole, _ = ranks.run(clip_layers_at_random, False)
    assert ranks.run(clip_layers_at_random, True) == [whole, whole]


def merge_a_layer(state: str) -> str:
    model, optimizer, ddp = set_up(make_chain, **options_of(state), shard=True)
    train(ddp, optimizer, data(1))
    model.base_model.model[0].merge()
    return message_of(optimizer.step)


@every_state
def test_merged_layer_of_one_share_stops_every_rank(ranks: Ranks, state: str) -> None:
    assert all("merged" in message for message in ranks.run(merge_a_layer, state))


def shard_one_layer() -> str:
    return message_of(lambda: oplora.AdamW(make_chain((WIDTH, WIDTH)), shard=True))


def test_fewer_layers_than_processes_are_not_sharded(ranks: Ranks) -> None:
    assert all("1 adapted layers are too few for 2 processes" in message for message in ranks.run(shard_one_layer))


def test_sharding_without_a_process_group_names_what_starts_one() -> None:
    with pytest.raises(oplora.OPLoRAError, match="torchrun or `accelerate launch`"):
        oplora.AdamW(make_chain(), shard=True)


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_state
def test_sharded_in_one_process_is_the_unsharded(group_of_one: None, state: str) -> None:
    saved = []
    for shard in (False, True):
        _, optimizer, ddp = set_up(make_biased, **options_of(state), shard=shard)
        train(ddp, optimizer, data(5))
        saved.append(leaves(optimizer.state_dict()))
    assert_same_leaves(*saved)


def lack_memory(state: str) -> str:
    """The error where the share of rank 1 alone does not fit."""
    with pytest.MonkeyPatch.context() as patch:
        free = 1 if dist.get_rank() == 1 else 1 << 40
        patch.setattr(memory, "free_memory", lambda _: free)
        return message_of(lambda: oplora.AdamW(make_chain(), **options_of(state), shard=True))


@every_state
def test_share_that_does_not_fit_stops_every_rank(ranks: Ranks, state: str) -> None:
    messages = ranks.run(lack_memory, state)
    assert "another process refuses" in messages[0] and "the generators need" in messages[1]


def train_on_device(library: Path, state: str, shard: bool, nan_in: int | None = None) -> tuple[Bits, list[bool]]:
    """Steps of the kernels that a GPU would run, executed on the CPU, and whether each step raised; before one of them
    there is a NaN in a layer, and nothing at all in those of the other rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPLORA_CUDA_LIBRARY", str(library))
        for module in (engines, refusals):
            patch.setattr(module, "runs_on_device", lambda _: True)
        torch.set_flush_denormal(True)
        model, optimizer, ddp = set_up(make_chain, **options_of(state), shard=shard)
        raised = []
        for step, batch in enumerate(data(5)):
            optimizer.zero_grad()
            backward(ddp, part(batch, dist.get_rank()))
            if step == nan_in:
                for owner, layer in zip(engines.Shards([1] * 4).owners, optimizer._stepper.layers, strict=True):
                    for parameter in layer.parameters():
                        parameter.grad = torch.full_like(parameter, torch.nan) if owner == 0 else None
            try:
                optimizer.step()
                raised.append(False)
            except oplora.OPLoRAError:
                raised.append(True)
        torch.set_flush_denormal(False)
    return trained(model), raised


@every_state
def test_sharding_on_a_device_changes_no_bit(ranks: Ranks, cuda_on_cpu: Path, state: str) -> None:
    (whole, _), _ = ranks.run(train_on_device, cuda_on_cpu, state, False)
    for shared, _ in ranks.run(train_on_device, cuda_on_cpu, state, True):
        assert_same_bits(shared, whole)


@every_state
def test_refusal_on_a_device_is_told_in_the_same_step_on_every_rank(
    ranks: Ranks, cuda_on_cpu: Path, state: str
) -> None:
    (bits, raised), (other_bits, other_raised) = ranks.run(train_on_device, cuda_on_cpu, state, True, 2)
    assert raised == other_raised == [False, False, False, True, False]
    assert_same_bits(bits, other_bits)


# ---- saving sharded generators ----


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What nested dicts and lists hold, by where it is."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, item in items for name, leaf in leaves(item, f"{path}.{key}").items()}
    return {path: value}


def assert_same_leaves(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name


def consolidate(state: str, shard: bool) -> dict[str, Any]:
    _, optimizer, ddp = set_up(make_biased, **options_of(state), shard=shard)
    train(ddp, optimizer, data(3))
    optimizer.consolidate_state_dict(to=1)
    return leaves(optimizer.state_dict()) if dist.get_rank() == 1 else {}


@every_state
def test_consolidated_state_is_the_unsharded_one(ranks: Ranks, state: str) -> None:
    assert_same_leaves(*(ranks.run(consolidate, state, shard)[1] for shard in (True, False)))


def refuses_to_save(optimizer: oplora.AdamW) -> bool:
    try:
        optimizer.state_dict()
    except oplora.OPLoRAError as error:
        return "consolidate_state_dict" in str(error)
    return False


def save_shares(state: str) -> list[bool]:
    """Whether state_dict() is refused: after a step, after the shares were gathered on rank 0, after another step."""
    _, optimizer, ddp = set_up(make_chain, **options_of(state), shard=True)
    train(ddp, optimizer, data(1))
    refused = [refuses_to_save(optimizer)]
    optimizer.consolidate_state_dict(to=0)
    refused.append(refuses_to_save(optimizer))
    train(ddp, optimizer, data(1))
    return [*refused, refuses_to_save(optimizer)]


@every_state
def test_share_alone_or_of_an_earlier_step_is_not_given_as_the_state(ranks: Ranks, state: str) -> None:
    assert ranks.run(save_shares, state) == [[True, False, True], [True, True, True]]


def resume(state: str, saved_sharded: bool, shard: bool, path: Path) -> Bits:
    some = data(10)
    model, optimizer, ddp = set_up(make_biased, **options_of(state), shard=saved_sharded)
    train(ddp, optimizer, some[:5])
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    dist.barrier()
    model, optimizer, ddp = set_up(make_biased, **options_of(state), shard=shard)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(ddp, optimizer, some[5:])
    return trained(model)


@every_state
@pytest.mark.parametrize(
    ("saved_sharded", "shard"),
    [(True, False), (True, True), (False, True)],
    ids=["to whole", "to sharded", "from whole"],
)
def test_resume_of_sharded_runs_is_bit_for_bit(
    ranks: Ranks, tmp_path: Path, state: str, saved_sharded: bool, shard: bool
) -> None:
    uninterrupted, _ = ranks.run(train_under_ddp, make_biased, state, False, 10)
    for bits in ranks.run(resume, state, saved_sharded, shard, tmp_path / "saved.pt"):
        assert_same_bits(bits, uninterrupted)


def resume_and_save(state: str) -> bool:
    """Whether the state is refused that a process would give, of its share, after all of it was loaded."""
    _, whole, ddp = set_up(make_chain, **options_of(state))
    train(ddp, whole, data(1))
    optimizer = oplora.AdamW(make_chain(), **options_of(state), shard=True)
    optimizer.load_state_dict(whole.state_dict())
    return refuses_to_save(optimizer)


@every_state
def test_resumed_share_alone_is_not_given_as_the_state(ranks: Ranks, state: str) -> None:
    assert ranks.run(resume_and_save, state) == [True, True]


def load_other_settings(state: str) -> tuple[Bits, Bits]:
    """All that the optimizer steps and keeps, before and after the refusal: one layer, which one process owns, was
    saved with another rank."""
    other = oplora.AdamW(make_chain(rank_pattern={"0": 2}), **options_of(state))
    model, optimizer, _ = set_up(make_chain, **options_of(state), shard=True)
    before = trained(model) | generators(optimizer)
    message_of(lambda: optimizer.load_state_dict(other.state_dict()))
    return before, trained(model) | generators(optimizer)


@every_state
def test_state_that_one_share_refuses_changes_nothing_on_any_rank(ranks: Ranks, state: str) -> None:
    for before, after in ranks.run(load_other_settings, state):
        assert_same_bits(before, after)


# ---- accelerate ----


def prepare(**settings: Any) -> tuple[Accelerator, nn.Module, Any, Any, Any]:
    """As a script does it: dropout and shuffling draw random numbers, and two batches make a step."""
    set_seed(3)
    config = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=config)
    model = make_chain(lora_dropout=0.2)
    optimizer = oplora.AdamW(model, lr=1e-2, **settings)
    x, y = (torch.cat(tensors) for tensors in zip(*data(8), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=30)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train_prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, loader: Iterable[Batch], scheduler: Any
) -> Iterator[float]:
    """The loss of every batch."""
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        yield loss.item()


def train_and_save(state: str, folder: Path) -> tuple[list[float], Bits]:
    """Saves after two of eight batches of the first of two epochs; the losses of those that come after."""
    accelerator, model, optimizer, loader, scheduler = prepare(**options_of(state))
    losses = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for i, loss in enumerate(train_prepared(accelerator, model, optimizer, loader, scheduler)):
            losses.append(loss)
            if (epoch, i) == (0, 1):
                accelerator.save_state(folder)
    return losses[2:], trained(accelerator.unwrap_model(model))


def train_from_saved(state: str, folder: Path) -> tuple[list[float], Bits]:
    accelerator, model, optimizer, loader, scheduler = prepare(**options_of(state))
    accelerator.load_state(folder)
    losses = []
    for epoch, left in ((0, skip_first_batches(loader, 2)), (1, loader)):
        left.set_epoch(epoch)
        losses += train_prepared(accelerator, model, optimizer, left, scheduler)
    return losses, trained(accelerator.unwrap_model(model))


@pytest.fixture(scope="module", params=["lean", "exact", "auto"])
def interrupted(
    request: pytest.FixtureRequest, ranks: Ranks, later_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], list[Any]]:
    """Losses and factors of each rank, of an uninterrupted run and of one resumed in new processes."""
    folder = tmp_path_factory.mktemp("saved")
    uninterrupted = ranks.run(train_and_save, request.param, folder)
    return uninterrupted, later_ranks.run(train_from_saved, request.param, folder)


def test_accelerate_resumes_the_losses_bit_for_bit_in_new_processes(interrupted: tuple[list[Any], list[Any]]) -> None:
    for (losses, _), (resumed, _) in zip(*interrupted, strict=True):
        assert resumed == losses


def test_accelerate_resumes_the_factors_bit_for_bit_in_new_processes(interrupted: tuple[list[Any], list[Any]]) -> None:
    for (_, factors), (_, resumed) in zip(*interrupted, strict=True):
        assert_same_bits(resumed, factors)


def train_through_accelerate(state: str, shard: bool) -> Bits:
    accelerator, model, optimizer, loader, scheduler = prepare(**options_of(state), shard=shard)
    list(train_prepared(accelerator, model, optimizer, loader, scheduler))
    return trained(accelerator.unwrap_model(model))


@every_state
def test_accelerate_prepares_sharded_generators(ranks: Ranks, state: str) -> None:
    whole, _ = ranks.run(train_through_accelerate, state, False)
    for shared in ranks.run(train_through_accelerate, state, True):
        assert_same_bits(shared, whole)


def save_sharded(state: str, folder: Path) -> Bits:
    """An epoch, the state of which is saved, and another."""
    accelerator, model, optimizer, loader, scheduler = prepare(**options_of(state), shard=True)
    accelerator.register_save_state_pre_hook(lambda *_: optimizer.optimizer.consolidate_state_dict(to=None))
    list(train_prepared(accelerator, model, optimizer, loader, scheduler))
    accelerator.save_state(folder)
    loader.set_epoch(1)
    list(train_prepared(accelerator, model, optimizer, loader, scheduler))
    return trained(accelerator.unwrap_model(model))


def load_sharded(state: str, folder: Path) -> Bits:
    accelerator, model, optimizer, loader, scheduler = prepare(**options_of(state), shard=True)
    accelerator.load_state(folder)
    loader.set_epoch(1)
    list(train_prepared(accelerator, model, optimizer, loader, scheduler))
    return trained(accelerator.unwrap_model(model))


@every_state
def test_accelerate_saves_and_resumes_sharded_generators(ranks: Ranks, tmp_path: Path, state: str) -> None:
    uninterrupted, _ = ranks.run(save_sharded, state, tmp_path)
    for bits in ranks.run(load_sharded, state, tmp_path):
        assert_same_bits(bits, uninterrupted)


# ---- FSDP2 ----


def flatten_by_fsdp1(how: str) -> str:
    model = make_chain()
    if how == "optimizer first":
        optimizer = oplora.AdamW(model)
    if how == "flat":  # FSDP1 lays together what is trained alike
        model.requires_grad_(True)
    flat = FullyShardedDataParallel(model, use_orig_params=how != "flat", device_id=torch.device("cpu"))
    if how != "optimizer first":
        return message_of(lambda: oplora.AdamW(flat))
    backward(flat, part(data(1)[0], dist.get_rank()))
    return message_of(optimizer.step)


@pytest.mark.parametrize("how", ["flat", "original", "optimizer first"])
def test_factors_flattened_by_fsdp1_are_refused(ranks: Ranks, how: str) -> None:
    for message in ranks.run(flatten_by_fsdp1, how):
        assert "FSDP1" in message and "fully_shard" in message


def train_averaging(model: nn.Module, optimizer: torch.optim.Optimizer, adapter: list[nn.Parameter]) -> None:
    for batch in data(10):
        optimizer.zero_grad()
        backward(model, part(batch, dist.get_rank()))
        for p in adapter:
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        optimizer.step()


def shard_the_base_alone(state: str) -> Bits:
    model = make_chain()
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    adapter = [p for p in model.parameters() if p.requires_grad]  # in one order on all ranks, unlike a set
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for layer in model.base_model.model[::2]:
        fully_shard(layer, mesh=mesh, ignored_params=set(adapter))
    fully_shard(model, mesh=mesh, ignored_params=set(adapter))
    train_averaging(model, optimizer, adapter)
    return trained(model)


@every_state
def test_adapter_kept_out_of_fsdp2_trains_as_under_ddp(ranks: Ranks, state: str) -> None:
    under_ddp, _ = ranks.run(train_under_ddp, make_chain, state, False, 10)
    for bits in ranks.run(shard_the_base_alone, state):
        assert_same_bits(bits, under_ddp)


def shard_the_base_by_accelerate(state: str) -> Bits:
    accelerator = Accelerator()
    accelerator.state.distributed_type = DistributedType.FSDP  # which accelerate would choose on GPUs only
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, ignored_modules=r".*\.lora_[AB]\.default", auto_wrap_policy="no_wrap"
    )
    model = make_chain()
    model, optimizer = accelerator.prepare(model, oplora.AdamW(model, lr=1e-2, **options_of(state)))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {type(p).__name__ for p in model.parameters() if not p.requires_grad} == {"DTensor"}
    train_averaging(model, optimizer.optimizer, [p for p in model.parameters() if p.requires_grad])
    return trained(model)


@every_state
def test_adapter_kept_out_of_accelerates_fsdp2_trains_as_under_ddp(ranks: Ranks, state: str) -> None:
    under_ddp, _ = ranks.run(train_under_ddp, make_chain, state, False, 10)
    for bits in ranks.run(shard_the_base_by_accelerate, state):
        assert_same_bits(bits, under_ddp)


# ---- watching ----


def watch_under_ddp(folder: Path, shard: bool) -> dict[str, dict[str, float]]:
    _, optimizer, ddp = set_up(make_chain, shard=shard)
    monitor = oplora.Monitor(folder, optimizer, every=3)
    for batch in data(3):
        train(ddp, optimizer, [batch])
        monitor(1.0)
    monitor.close()
    return oplora.stats(optimizer)


@whole_and_sharded
def test_monitor_writes_every_layer_once(ranks: Ranks, tmp_path: Path, shard: bool) -> None:
    numbers = ranks.run(watch_under_ddp, tmp_path, shard)
    run = Run.read(tmp_path)
    everything = {**numbers[0], **numbers[1]}
    assert sorted(run.layers) == sorted(everything) and len(run.layers) == 4
    for name, values in zip(run.layers, run.tables["norm_g"][-1], strict=True):
        assert values == pytest.approx(everything[name]["norm_g"], rel=1e-5)
    assert len(list(tmp_path.glob("monitor*.jsonl"))) == (2 if shard else 1)
