"""oplora.AdamW on tensors that processes divide: FSDP2's fully_shard, tensor parallelism, and checkpoints across them.

A test hands a function of this module to all processes of a group, and gets what each of them returns.
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import adapter_types
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import HOST, assert_same_bits, batches
from peft import LoraConfig, get_peft_model
from ranks import Ranks, join_group
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import oplora
from oplora import engines
from oplora.optim import refusals

WIDTHS = (12, 7, 5, 12)  # of which neither 2 nor 3 processes get even shares
PRELOADED = ("accelerate", "peft", "torch.distributed.fsdp", "torch.distributed.checkpoint")
Bits = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
RELATIVE = {torch.float32: 1e-6, torch.float64: 1e-12}
# State lean's moments are bfloat16 beside float32 factors. Where sums differ in their last bit one in ten thousand is
# rounded the other way, by 2^-8, and its entry's next steps with it; test_shares.c has them to the bit.
ROUNDED = 1e-3
# ways to make the optimizer: the presets, and state exact
KINDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact": {"state": "exact"},
    "lean": {"state": "lean"},
    "flat": {"preset": "flat"},
}
GENERATORS = tuple(kind for kind in KINDS if kind != "auto")
STEPS = 15
LONG = 50  # once for each kind, as what differs grows with the steps
every_kind = pytest.mark.parametrize("kind", ["auto", "exact", "lean"])


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    group = Ranks(join_group, PRELOADED, request.param)
    yield group
    group.stop(wait=True)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    made = {world: Ranks(join_group, PRELOADED, world) for world in (2, 3)}
    yield made
    for group in made.values():
        group.stop(wait=True)


# ---- what they train ----


def make_chain(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """LoRA on three linear layers, always from the same seed."""
    torch.manual_seed(0)
    linears = [nn.Linear(*pair) for pair in pairwise(WIDTHS)]
    chain = nn.Sequential(*(layer for linear in linears for layer in (linear, nn.Tanh())))
    settings = {"r": 3, "target_modules": ["0", "2", "4"], **config}
    return get_peft_model(chain.to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def data(steps: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    return list(batches(steps, dtype, (WIDTHS[0], WIDTHS[-1])))


def part(batch: Batch, rank: int, world: int) -> Batch:
    x, y = batch
    return x[rank::world], y[rank::world]


def divide(model: nn.Module, mesh: Any = None, **options: Any) -> nn.Module:
    """As scripts do, a layer by itself, then what is left: two groups, as messages take most of these tests' time."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(model.base_model.model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def backward(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, some: list[Batch]) -> list[float]:
    """Each process on its part of every batch; the mean of all losses of each step."""
    losses = []
    for batch in some:
        optimizer.zero_grad()
        losses.append(backward(model, part(batch, dist.get_rank(), dist.get_world_size())))
        optimizer.step()
    means = torch.stack(losses)
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, some: list[Batch], world: int) -> list[float]:
    """The same in one process, which averages the gradients itself."""
    losses = []
    for batch in some:
        optimizer.zero_grad()
        losses.append(sum(backward(model, part(batch, rank, world)).item() for rank in range(world)) / world)
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= world
        optimizer.step()
    return losses


def whole(tensor: Any) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def trained(model: nn.Module) -> Bits:
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def assert_close(ours: Bits, theirs: Bits, dtype: torch.dtype, most: float | None = None) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).norm() / theirs[name].norm()
        assert error <= (RELATIVE[dtype] if most is None else most), f"{name}: {error}"


def run_divided(dtype: torch.dtype, config: str, options: dict[str, Any], kind: str = "auto") -> Bits:
    model = divide(make_chain(dtype, **CONFIGS[config]), **options)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    train(model, optimizer, data(steps_of(config), dtype))
    return trained(model)


def run_alone(dtype: torch.dtype, config: str, world: int, kind: str = "auto") -> Bits:
    model = make_chain(dtype, **CONFIGS[config])
    train_alone(model, oplora.AdamW(model, **KINDS[kind]), data(steps_of(config), dtype), world)
    return trained(model)


def steps_of(config: str) -> int:
    return LONG if config == "LoRA" else STEPS


CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "biases and a head": {"bias": "all", "target_modules": ["0", "2"], "modules_to_save": ["4"]},
}


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_divided_training_equals_one_process(ranks: Ranks, config: str, dtype: torch.dtype) -> None:
    alone = run_alone(dtype, config, ranks.world)
    for bits in ranks.run(run_divided, dtype, config, {}):
        assert_close(bits, alone, dtype)


def test_shards_that_stay_gathered_train_as_in_one_process(ranks: Ranks) -> None:
    alone = run_alone(torch.float64, "DoRA", ranks.world)
    for bits in ranks.run(run_divided, torch.float64, "DoRA", {"reshard_after_forward": False}):
        assert_close(bits, alone, torch.float64)


def test_offloaded_shards_train_as_in_one_process(ranks: Ranks) -> None:
    alone = run_alone(torch.float64, "biases and a head", ranks.world)
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    for bits in ranks.run(run_divided, torch.float64, "biases and a head", policy):
        assert_close(bits, alone, torch.float64)


@pytest.mark.parametrize(
    ("config", "dtype"), [("LoRA", torch.float32), *((config, torch.float64) for config in CONFIGS)], ids=str
)
@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_divided_layers_train_as_in_one_process(
    ranks: Ranks, kind: str, config: str, dtype: torch.dtype
) -> None:
    alone = run_alone(dtype, config, ranks.world, kind)
    is_rounded = dtype == torch.float32 and kind != "exact"
    for bits in ranks.run(run_divided, dtype, config, {}, kind):
        assert_close(bits, alone, dtype, ROUNDED if is_rounded else None)


# ---- what is kept ----


def entries_and_bytes() -> tuple[int, int, int]:
    """Factor entries of this process and of the model, and bytes of the state's arenas here."""
    model = divide(make_chain())
    optimizer = oplora.AdamW(model)
    every = [p for p in model.parameters() if p.requires_grad]
    pieces = [piece for s in optimizer._stepper.states for key, piece in s.pieces().items() if key != "found"]
    return sum(p.to_local().numel() for p in every), sum(p.numel() for p in every), sum(p.nbytes for p in pieces)


def test_process_keeps_the_state_of_its_entries_alone(ranks: Ranks) -> None:
    results = ranks.run(entries_and_bytes)
    assert sum(here for here, _, _ in results) == results[0][1]
    for here, _, kept in results:
        assert kept == 8 * here


def bytes_of_generators(kind: str, is_divided: bool) -> tuple[int, int, int]:
    """Factor entries of this process (one stands for none), bytes of the state's arenas, and of what does not grow with
    the entries."""
    model = make_chain()
    optimizer = oplora.AdamW(divide(model) if is_divided else model, **KINDS[kind])
    every = [p.to_local() if is_divided else p for p in model.parameters() if p.requires_grad]
    rest = ("hidden", "hidden_moments", "scalars", "hidden_exp_avg", "hidden_exp_avg_sq", "decay", "moving")
    entries = optimizer.state.values()
    kept = sum(piece.nbytes for s in optimizer._stepper.states for piece in s.pieces().values())
    fixed = sum(entry[name].nbytes for entry in entries for name in rest if name in entry)
    return sum(max(p.numel(), 1) for p in every), kept, fixed


@pytest.mark.parametrize("kind", GENERATORS)
def test_process_keeps_its_rows_of_generators_and_every_hidden_path(ranks: Ranks, kind: str) -> None:
    entries, kept, fixed = bytes_of_generators(kind, False)
    an_entry = (kept - fixed) / entries
    assert an_entry == (12 * 33 if kind == "exact" else 16)
    for own, own_kept, own_fixed in ranks.run(bytes_of_generators, kind, True):
        assert own < entries and own_fixed == fixed
        assert own_kept == fixed + an_entry * own


PLACED = {
    "auto": {"generated": 0, "exp_avg_sq": 0, "master": 0},  # how many dimensions come before the parameter's
    "exact": {"weight": 1, "exp_avg": 1, "exp_avg_sq": 1},
    "lean": {"weight_change": 1, "exp_avg": 1, "exp_avg_sq": 1, "master": 0},
}


def placements_of_state(kind: str) -> list[bool]:
    model = divide(make_chain(torch.bfloat16))
    optimizer = oplora.AdamW(model, **KINDS[kind])
    train(model, optimizer, data(1, torch.bfloat16))
    found = []
    for p, entry in optimizer.state.items():
        for name, before in PLACED[kind].items():
            value = entry[name]
            found.append([place.dim - before for place in value.placements] == [place.dim for place in p.placements])
            found.append(value.shape[before:] == p.shape and value.to_local().shape[before:] == p.to_local().shape)
            found.append(value.full_tensor().shape[before:] == p.shape)
    return found


@pytest.mark.parametrize("kind", PLACED)
def test_state_is_placed_as_its_parameter(ranks: Ranks, kind: str) -> None:
    for found in ranks.run(placements_of_state, kind):
        assert len(found) == 6 * 3 * len(PLACED[kind]) and all(found)


# ---- one message a step, and the same bits ----


# State lean's first sums decide what its second are of (docs/loops.md).
MESSAGES = {"auto": 1, "exact": 1, "lean": 2, "flat": 2}


def count_messages(config: dict[str, Any], max_grad_norm: float | None, kind: str) -> list[int]:
    model = divide(make_chain(**config))
    optimizer = oplora.AdamW(model, max_grad_norm=max_grad_norm, **KINDS[kind])
    counts = []
    for batch in data(4):
        backward(model, part(batch, dist.get_rank(), dist.get_world_size()))
        with CommDebugMode() as messages:
            optimizer.step()
            optimizer.zero_grad()
        counts.append(messages.get_total_counts())
    return counts


@pytest.mark.parametrize("config", CONFIGS)
@every_kind
def test_step_sends_one_message_and_two_of_state_lean(ranks: Ranks, kind: str, config: str) -> None:
    assert ranks.run(count_messages, CONFIGS[config], None, kind) == [[MESSAGES[kind]] * 4] * ranks.world


@every_kind
def test_clipping_takes_one_more_message(ranks: Ranks, kind: str) -> None:
    sent = [MESSAGES[kind] + 1] * 4
    assert ranks.run(count_messages, CONFIGS["biases and a head"], 0.1, kind) == [sent] * ranks.world


def run_twice(dtype: torch.dtype, kind: str) -> tuple[Bits, Bits, Bits]:
    """What is trained, twice, and what every process has of the generators or the rate."""
    runs = []
    for _ in range(2):
        model = divide(make_chain(dtype))
        optimizer = oplora.AdamW(model, **KINDS[kind])
        train(model, optimizer, data(STEPS, dtype))
        runs.append(trained(model))
    common = {
        f"{i} {name}": value.clone()
        for i, entry in enumerate(optimizer.state.values())
        for name, value in entry.items()
        if isinstance(value, Tensor) and not isinstance(value, DTensor)
    }
    return runs[0], runs[1], common


@every_kind
def test_runs_of_as_many_processes_are_equal_to_the_bit(ranks: Ranks, kind: str) -> None:
    results = ranks.run(run_twice, torch.float32, kind)
    for one, two, common in results:
        assert_same_bits(one, two)
        assert_same_bits(common, results[0][2])


# ---- how they are divided ----


def make_narrow() -> nn.Module:
    """Of its factors some have one row."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(12, 1), nn.Tanh(), nn.Linear(1, 12)).double()
    return get_peft_model(chain, LoraConfig(r=1, target_modules=["0"]), autocast_adapter_dtype=False)


def run_narrow(kind: str, alone: int | None = None) -> Bits:
    model = make_narrow()
    if alone is None:
        optimizer = oplora.AdamW(fully_shard(model), **KINDS[kind])
        assert dist.get_rank() == 0 or not any(p.to_local().numel() for p in optimizer.state)
        train(model, optimizer, data(STEPS, torch.float64))
    else:
        train_alone(model, oplora.AdamW(model, **KINDS[kind]), data(STEPS, torch.float64), alone)
    return trained(model)


@every_kind
def test_process_without_any_row_trains_along(ranks: Ranks, kind: str) -> None:
    alone = run_narrow(kind, ranks.world)
    for bits in ranks.run(run_narrow, kind):
        assert_close(bits, alone, torch.float64)


def run_mixed(kind: str) -> tuple[Bits, list[float]]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = divide(make_chain(), mp_policy=policy)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    losses = []
    for step in range(2 * STEPS):
        losses += train(model, optimizer, [data(1)[0]] if step else data(1))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return trained(model), losses


@every_kind
def test_mixed_precision_trains_float32_shards(ranks: Ranks, kind: str) -> None:
    results = ranks.run(run_mixed, kind)
    for bits, losses in results:
        assert_same_bits(bits, results[0][0])
        assert losses[-1] < 0.95 * losses[0]


def run_half(kind: str, alone: int | None = None) -> Bits:
    model = make_chain(torch.bfloat16)
    if alone is None:
        train(divide(model), oplora.AdamW(model, **KINDS[kind]), data(STEPS, torch.bfloat16))
    else:
        train_alone(model, oplora.AdamW(model, **KINDS[kind]), data(STEPS, torch.bfloat16), alone)
    return trained(model)


@every_kind
def test_bfloat16_shards_keep_their_masters(ranks: Ranks, kind: str) -> None:
    alone = run_half(kind, ranks.world)
    for bits in ranks.run(run_half, kind):
        for name, tensor in bits.items():
            torch.testing.assert_close(tensor, alone[name], rtol=0.05, atol=0.01)


def run_list(names: bool, alone: int | None = None) -> Bits:
    """From parameters instead of the model."""
    model = make_chain(torch.float64)
    if alone is None:
        divide(model)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = oplora.AdamW(named if names else [p for _, p in named])
    if alone is None:
        train(model, optimizer, data(STEPS, torch.float64))
    else:
        train_alone(model, optimizer, data(STEPS, torch.float64), alone)
    return trained(model)


@pytest.mark.parametrize("names", [True, False], ids=["named", "nameless"])
def test_lists_of_divided_parameters_train_as_the_model(ranks: Ranks, names: bool) -> None:
    alone = run_list(names, ranks.world)
    for bits in ranks.run(run_list, names):
        assert_close(bits, alone, torch.float64)


def run_late(steps_before: int, kind: str, alone: int | None = None) -> Bits:
    """fully_shard after the optimizer, and after some of its steps."""
    model = make_chain(torch.float64, bias="all")
    optimizer = oplora.AdamW(model, **KINDS[kind])
    world = dist.get_world_size() if alone is None else alone
    some = data(STEPS, torch.float64)
    train_alone(model, optimizer, some[:steps_before], world)
    if alone is None:
        divide(model)
        train(model, optimizer, some[steps_before:])
        assert all(hasattr(p, "full_tensor") for group in optimizer.param_groups for p in group["params"])
    else:
        train_alone(model, optimizer, some[steps_before:], world)
    return trained(model)


@pytest.mark.parametrize("steps_before", [0, 5])
@every_kind
def test_optimizer_made_before_the_tensors_are_divided_goes_on(ranks: Ranks, kind: str, steps_before: int) -> None:
    alone = run_late(steps_before, kind, ranks.world)
    for bits in ranks.run(run_late, steps_before, kind):
        assert_close(bits, alone, torch.float64)


def run_gathered(between: bool) -> Bits:
    """The optimizer is made, and zero_grad() called, while the root holds what was gathered for a forward pass."""
    model = fully_shard(make_chain())
    if between:
        with torch.no_grad():
            model(data(1)[0][0])
    optimizer = oplora.AdamW(model)
    for batch in data(10):
        x, y = part(batch, dist.get_rank(), dist.get_world_size())
        if not between:
            optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if between:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return trained(model)


def test_zero_grad_between_forward_and_backward_changes_no_bit(ranks: Ranks) -> None:
    for bits, others in zip(ranks.run(run_gathered, True), ranks.run(run_gathered, False), strict=True):
        assert_same_bits(bits, others)


def run_partly(kind: str, alone: int | None = None) -> Bits:
    """The first layer alone is divided; of the others the script averages the gradients."""
    model = make_chain(torch.float64)
    some, world = data(STEPS, torch.float64), dist.get_world_size() if alone is None else alone
    if alone is not None:
        train_alone(model, oplora.AdamW(model, **KINDS[kind]), some, world)
        return trained(model)
    fully_shard(model.base_model.model[0])
    optimizer = oplora.AdamW(model, **KINDS[kind])
    whole_ones = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
    for batch in some:
        optimizer.zero_grad()
        backward(model, part(batch, dist.get_rank(), world))
        for p in whole_ones:
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
    return trained(model)


@every_kind
def test_whole_tensors_beside_divided_ones_count_once(ranks: Ranks, kind: str) -> None:
    alone = run_partly(kind, ranks.world)
    for bits in ranks.run(run_partly, kind):
        assert_close(bits, alone, torch.float64)


def watch(folder: Path, kind: str) -> dict[str, dict[str, float]]:
    model = divide(make_chain(torch.float64))
    optimizer = oplora.AdamW(model, **KINDS[kind])
    monitor = oplora.Monitor(folder, optimizer, every=1)
    for batch in data(3, torch.float64):
        train(model, optimizer, [batch])
        monitor(1.0)
    monitor.close()
    return oplora.stats(optimizer)


@pytest.mark.parametrize("kind", ["auto", "exact", "lean"])
def test_numbers_to_watch_are_of_all_processes_and_written_once(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    model = make_chain(torch.float64)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    train_alone(model, optimizer, data(3, torch.float64), ranks.world)
    for numbers in ranks.run(watch, tmp_path, kind):
        for name, expected in oplora.stats(optimizer).items():
            for key in expected.keys() - {"norm_A", "norm_B", "norm_BA"}:
                assert numbers[name][key] == pytest.approx(expected[key], rel=1e-9, nan_ok=True), key
    assert [file.name for file in tmp_path.glob("monitor*.jsonl")] == ["monitor.jsonl"]


def shard_as_well() -> str:
    model = divide(make_chain())
    with pytest.raises(oplora.OPLoRAError) as raised:
        oplora.AdamW(model, shard=True)
    return str(raised.value)


def test_shard_is_refused_where_the_tensors_are_divided(ranks: Ranks) -> None:
    assert all("Leave shard out" in message for message in ranks.run(shard_as_well))


# ---- the kernels that a GPU would run, executed on the CPU ----


def run_on_device(library: Path | None, nan_in: int | None) -> tuple[Bits, list[float], list[bool]]:
    """With a NaN in the rows of one process before one of the steps: what is trained, what was found, and whether each
    step raised."""
    with pytest.MonkeyPatch.context() as patch:
        if library is not None:
            patch.setenv("OPLORA_CUDA_LIBRARY", str(library))
            for module in (engines, refusals):
                patch.setattr(module, "runs_on_device", lambda _: True)
        torch.set_flush_denormal(True)
        model = divide(make_chain(torch.float32, **CONFIGS["biases and a head"]))
        optimizer, raised = oplora.AdamW(model, max_grad_norm=0.1), []
        for step, batch in enumerate(data(10)):
            optimizer.zero_grad()
            backward(model, part(batch, dist.get_rank(), dist.get_world_size()))
            if step == nan_in and dist.get_rank() == 1:
                next(iter(optimizer.state)).grad.to_local().view(-1)[0] = float("nan")
            try:
                optimizer.step()
                raised.append(False)
            except oplora.OPLoRAError:
                raised.append(True)
        torch.set_flush_denormal(False)
    return trained(model), optimizer._stepper.found.tolist(), raised


def test_divided_tensors_train_on_a_device_as_on_the_host(ranks: Ranks, cuda_on_cpu: Path) -> None:
    on_device, on_host = (ranks.run(run_on_device, library, None) for library in (cuda_on_cpu, None))
    for (bits, found, raised), (others, expected, _) in zip(on_device, on_host, strict=True):
        assert not any(raised) and found == on_device[0][1] == pytest.approx(expected, rel=1e-6)
        for name, tensor in bits.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-7)


def test_refusal_on_a_device_is_told_in_the_same_step_by_all(ranks: Ranks, cuda_on_cpu: Path) -> None:
    results = ranks.run(run_on_device, cuda_on_cpu, 4)
    for bits, _, raised in results:
        assert [step for step, some in enumerate(raised) if some] == [5]
        assert_same_bits(bits, results[0][0])


def run_beside_a_gpu(kind: str, dtype: torch.dtype, is_gpu: bool) -> tuple[Bits, str]:
    """With the factors where a GPU's memory is taken to be: what is trained, and of which kind the engine is."""
    with pytest.MonkeyPatch.context() as patch:
        if is_gpu:
            patch.setattr(refusals, "HOST_MEMORY", HOST)
            for module in (engines, refusals):
                patch.setattr(module, "runs_on_device", lambda device: device != HOST)
        model = divide(make_chain(dtype, **CONFIGS["biases and a head"]))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            optimizer = oplora.AdamW(model, max_grad_norm=0.1, **KINDS[kind])
        assert any("host memory" in str(warning.message) for warning in told) == is_gpu
        for step, batch in enumerate(data(10, dtype)):
            train(model, optimizer, [batch])
            if step == 5:
                with torch.no_grad():
                    next(iter(optimizer.state)).to_local().mul_(0.5)  # what others write is gone on from
    return trained(model), type(optimizer._stepper.engines[0]).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.filterwarnings("ignore:.*were changed since the last step")
def test_generators_beside_a_gpu_step_in_host_memory_with_the_same_bits(
    ranks: Ranks, kind: str, dtype: torch.dtype
) -> None:
    beside, alone = (ranks.run(run_beside_a_gpu, kind, dtype, is_gpu) for is_gpu in (True, False))
    for (bits, engine), (others, _) in zip(beside, alone, strict=True):
        assert engine == "StagedEngine"
        assert_same_bits(bits, others)


# ---- clipping and refusals ----


def clip(config: dict[str, Any], kind: str, alone: int | None = None) -> tuple[float, Bits, Bits]:
    """The norm, the clipped gradients, and what is trained by an optimizer that clips."""
    model, other = make_chain(torch.float64, **config), make_chain(torch.float64, **config)
    world = dist.get_world_size() if alone is None else alone
    if alone is None:
        divide(model), divide(other)
    optimizer, clipping = oplora.AdamW(model, **KINDS[kind]), oplora.AdamW(other, max_grad_norm=0.1, **KINDS[kind])
    for batch in data(3, torch.float64):
        optimizer.zero_grad()
        if alone is None:
            backward(model, part(batch, dist.get_rank(), world))
        else:
            for rank in range(world):
                backward(model, part(batch, rank, world))
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= world
        norm = optimizer.clip_grad_norm_(0.1)
        clipped = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    if alone is None:
        train(other, clipping, data(3, torch.float64))
    else:
        train_alone(other, clipping, data(3, torch.float64), world)
    return norm.item(), clipped, trained(other)


@pytest.mark.parametrize("config", ["LoRA", "biases and a head"])
@every_kind
def test_clipping_scales_by_the_norm_of_all_gradients(ranks: Ranks, kind: str, config: str) -> None:
    norm, clipped, bits = clip(CONFIGS[config], kind, ranks.world)
    for their_norm, theirs, their_bits in ranks.run(clip, CONFIGS[config], kind):
        assert their_norm == pytest.approx(norm, rel=1e-12)
        assert_close(theirs, clipped, torch.float64)
        assert_close(their_bits, bits, torch.float64)


def clip_by_torch(alone: int | None = None) -> Bits:
    model = make_chain(torch.float64, **CONFIGS["biases and a head"])
    world = dist.get_world_size() if alone is None else alone
    if alone is None:
        divide(model)
    optimizer = oplora.AdamW(model)
    for batch in data(10, torch.float64):
        optimizer.zero_grad()
        for rank in range(world) if alone else (dist.get_rank(),):
            backward(model, part(batch, rank, world))
        held = [p for p in model.parameters() if p.grad is not None]
        if alone:
            for p in held:
                p.grad /= world
        torch.nn.utils.clip_grad_norm_(held, 0.1)
        optimizer.step()
    return trained(model)


def test_clipping_by_torch_trains_as_in_one_process(ranks: Ranks) -> None:
    alone = clip_by_torch(ranks.world)
    for bits in ranks.run(clip_by_torch):
        assert_close(bits, alone, torch.float64)


def meet_nan(where: str, kind: str) -> tuple[str, Bits, Bits]:
    model = divide(make_chain(**CONFIGS["biases and a head"]))
    optimizer = oplora.AdamW(model, **KINDS[kind])
    train(model, optimizer, data(2))
    before = state_of(model, optimizer)
    optimizer.zero_grad()
    backward(model, part(data(3)[2], dist.get_rank(), dist.get_world_size()))
    named = dict(model.named_parameters())
    of = next(p for name, p in named.items() if (where in name) and p.grad is not None)
    if dist.get_rank() == 1:
        of.grad.to_local().view(-1)[0] = float("nan")
    with pytest.raises(oplora.OPLoRAError) as raised:
        optimizer.step()
    return str(raised.value), before, state_of(model, optimizer)


def state_of(model: nn.Module, optimizer: oplora.AdamW) -> Bits:
    kept = {
        f"{i} {name}": whole(value)
        for i, entry in enumerate(optimizer.state.values())
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    return trained(model) | kept


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "bias"])
@every_kind
def test_nan_in_the_rows_of_one_process_is_refused_by_all_and_changes_nothing(
    ranks: Ranks, kind: str, where: str
) -> None:
    for message, before, after in ranks.run(meet_nan, where, kind):
        assert "NaN or infinity" in message
        assert_same_bits(before, after)


def leave_one_out(kind: str) -> str:
    """A layer that rank 0 alone has no gradient of: what would be replicated goes apart."""
    model = divide(make_chain())
    optimizer = oplora.AdamW(model, **KINDS[kind])
    backward(model, part(data(1)[0], dist.get_rank(), dist.get_world_size()))
    for name, p in model.named_parameters():
        if dist.get_rank() == 0 and ".model.2." in name:
            p.grad = None
    before = trained(model)
    with pytest.raises(oplora.OPLoRAError) as raised:
        optimizer.step()
    assert_same_bits(before, trained(model))
    return str(raised.value)


@pytest.mark.parametrize("kind", ["exact", "lean"])
def test_layer_that_steps_in_some_processes_alone_is_refused_by_all(ranks: Ranks, kind: str) -> None:
    assert all("layer 1 has a gradient in some" in message for message in ranks.run(leave_one_out, kind))


def precondition_divided() -> str:
    with pytest.raises(oplora.OPLoRAError) as raised:
        oplora.AdamW(divide(make_chain()), precondition=1e-6)
    return str(raised.value)


def test_precondition_of_divided_factors_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(precondition_divided):
        assert "FSDP2" in message and "leave it out" in message and "ignored_params" in message


# ---- every adapter type, and other meshes ----


def run_type(case: str, kind: str, alone: int | None = None) -> Bits:
    torch.manual_seed(0)
    model = adapter_types.make(case)
    world = dist.get_world_size() if alone is None else alone
    if alone is None:
        fully_shard(model)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    some = adapter_types.data(case, 5)
    losses = train(model, optimizer, some) if alone is None else train_alone(model, optimizer, some, world)
    assert losses
    return {name: p for name, p in trained(model).items() if p.numel()}


AMPLIFIED = {"DeLoRA": 1e-9}  # which divides by the norm of B, and B starts at zero
NOT_TAKEN = {"LoRA, MultiheadAttention"}  # PEFT takes Parameters out of the module tree, which fully_shard refuses


@pytest.mark.parametrize("case", [case for case in adapter_types.CASES if case not in NOT_TAKEN])
@every_kind
def test_every_adapter_type_that_fully_shard_takes_trains_as_in_one_process(
    groups: dict[int, Ranks], kind: str, case: str
) -> None:
    alone = run_type(case, kind, 3)
    for bits in groups[3].run(run_type, case, kind):
        assert_close(bits, alone, torch.float64, None if kind == "auto" else AMPLIFIED.get(case))


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    group = Ranks(join_group, PRELOADED, 4)
    yield group
    group.stop(wait=True)


def run_hybrid(kind: str) -> tuple[Bits, Any, int]:
    """Two replicas, each divided among two processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = divide(make_chain(torch.float64, **CONFIGS["biases and a head"]), mesh)
    optimizer = oplora.AdamW(model, max_grad_norm=0.1, **KINDS[kind])
    train(model, optimizer, data(STEPS, torch.float64))
    kept = sum(piece.numel() for s in optimizer._stepper.states for key, piece in s.pieces().items() if key != "found")
    return trained(model), optimizer.found_lr, kept


@every_kind
def test_hybrid_mesh_counts_every_entry_once(four: Ranks, kind: str) -> None:
    model = make_chain(torch.float64, **CONFIGS["biases and a head"])
    optimizer = oplora.AdamW(model, max_grad_norm=0.1, **KINDS[kind])
    train_alone(model, optimizer, data(STEPS, torch.float64), 4)
    entries = sum(p.numel() for p in optimizer._stepper.listing.generated())
    results = four.run(run_hybrid, kind)
    for bits, rate, _ in results:
        assert_close(bits, trained(model), torch.float64)
        assert kind != "auto" or rate == results[0][1] == pytest.approx(optimizer.found_lr, rel=1e-9)
    assert kind != "auto" or sum(kept for _, _, kept in results) == 2 * 2 * entries


def parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """By hand what tensor parallelism does: of one layer the rows of B are divided, of the next the columns of A."""
    divided = {(0, "lora_B"): Shard(0), (2, "lora_A"): Shard(1), (4, "lora_B"): Shard(0)}
    for name, parameter in list(model.named_parameters()):
        *path, last = name.split(".")
        place = next((p for (i, part), p in divided.items() if f"model.{i}." in name and part in name), Replicate())
        new = distribute_tensor(parameter.detach(), mesh, [place])
        setattr(model.get_submodule(".".join(path)), last, nn.Parameter(new, requires_grad=parameter.requires_grad))
    return model


def run_parallel(data_parallel: bool, kind: str) -> tuple[Bits, float]:
    """Every process sees all data; with `data_parallel` half of it, and the factors are divided by fully_shard too."""
    if data_parallel:
        meshes = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        mesh, rank = meshes["tp"], meshes["dp"].get_local_rank()
    else:
        mesh, rank = dist.init_device_mesh("cpu", (dist.get_world_size(),)), None
    model = parallel(make_chain(torch.float64), mesh)
    if data_parallel:
        model = divide(model, meshes["dp"])
    optimizer = oplora.AdamW(model, max_grad_norm=0.1, **KINDS[kind])
    for batch in data(STEPS, torch.float64):
        optimizer.zero_grad()
        x, y = (DTensor.from_local(t, mesh, [Replicate()]) for t in (batch if rank is None else part(batch, rank, 2)))
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return trained(model), optimizer.found_lr


def run_clipped_alone(world: int, kind: str) -> tuple[Bits, float]:
    model = make_chain(torch.float64)
    optimizer = oplora.AdamW(model, max_grad_norm=0.1, **KINDS[kind])
    train_alone(model, optimizer, data(STEPS, torch.float64), world)
    return trained(model), optimizer.found_lr


@every_kind
def test_rows_and_columns_of_tensor_parallelism_train_as_in_one_process(ranks: Ranks, kind: str) -> None:
    alone, rate = run_clipped_alone(1, kind)
    for bits, found in ranks.run(run_parallel, False, kind):
        assert_close(bits, alone, torch.float64)
        assert found == pytest.approx(rate, rel=1e-9, nan_ok=True)


@every_kind
def test_tensor_parallelism_under_fully_shard_trains_as_in_one_process(four: Ranks, kind: str) -> None:
    alone, rate = run_clipped_alone(2, kind)
    for bits, found in four.run(run_parallel, True, kind):
        assert_close(bits, alone, torch.float64)
        assert found == pytest.approx(rate, rel=1e-9, nan_ok=True)


def tiny_llama(folder: Path, divided: bool) -> Any:
    """As transformers and PEFT divide it: of a layer's pair one is divided and one is whole. (PEFT 0.21.2 runs layers
    alone that are divided by their outputs.)"""
    made = DistributedConfig(tp_plan="auto", tp_size=dist.get_world_size()) if divided else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=made)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"])
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def run_llama(folder: Path, kind: str) -> tuple[list[float], list[float], bool]:
    """The losses of tensor parallelism and of one process that starts from the same values."""
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    runs, start = [], Bits()
    for divided in (True, False):
        model = tiny_llama(folder, divided)
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = start or {name: whole(p) for name, p in factors.items()}
        if not divided:
            for name, p in factors.items():
                p.data.copy_(start[name])
        kinds = {hasattr(p, "full_tensor") for p in factors.values()}
        optimizer, losses = oplora.AdamW(model, **KINDS[kind]), []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append((losses, len(kinds) == 2))
    return runs[0][0], runs[1][0], runs[0][1]


@pytest.mark.parametrize("kind", ["auto", "exact", "lean"])
def test_pefts_tensor_parallel_layers_train_as_in_one_process(
    groups: dict[int, Ranks], tmp_path: Path, kind: str
) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for losses, alone, are_mixed in groups[2].run(run_llama, tmp_path, kind):
        assert are_mixed and losses == pytest.approx(alone, rel=1e-9)
        assert losses[-1] < losses[0] - 0.05


# ---- checkpoints that other numbers of processes go on with ----

SAVED = 6  # steps before saving


def train_whole(model: nn.Module, optimizer: torch.optim.Optimizer, some: list[Batch]) -> list[float]:
    """On the whole of every batch in every process, so that the number of processes does not matter."""
    losses = []
    for batch in some:
        optimizer.zero_grad()
        losses.append(backward(model, batch).item())
        optimizer.step()
    return losses


def started(kept: bool) -> nn.Module:
    """A model; with `kept` factors of its own, which tell the rate against a start that is kept."""
    model = make_chain(torch.float64, bias="all")
    if kept:
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    return model


def resumed(kept: bool, folder: Path, steps: int, form: str, kind: str = "auto") -> list[float]:
    """With a folder that is there the losses after what was saved in it; else those after it was made."""
    model = started(kept)
    if dist.is_initialized():
        divide(model)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    some, options = data(steps, torch.float64), FORMS[form]
    begin = not folder.exists()
    if begin:
        train_whole(model, optimizer, some[:SAVED])
    else:
        train_whole(model, optimizer, some[:1])  # what is loaded into is not as new
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    state = {"model": of_model, "optimizer": of_optimizer}
    if begin:
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
    return train_whole(model, optimizer, some[SAVED:])


FORMS = {"nested": StateDictOptions(), "flattened": StateDictOptions(flatten_optimizer_state_dict=True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [False, True], ids=["from zero", "from a start"])
@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 3), (2, 3), (3, 2)])
def test_run_goes_on_with_another_number_of_processes(
    groups: dict[int, Ranks], tmp_path: Path, saving: int, loading: int, kept: bool, form: str
) -> None:
    def call(world: int) -> list[list[float]]:
        arguments = kept, tmp_path / "saved", 12, form
        return [resumed(*arguments)] if world == 1 else groups[world].run(resumed, *arguments)

    losses = call(saving)[0]
    for others in call(loading):
        assert others == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [False, True], ids=["from zero", "from a start"])
@pytest.mark.parametrize(("saving", "loading"), [(2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("kind", ["exact", "lean"])
def test_generators_go_on_with_another_number_of_processes(
    groups: dict[int, Ranks], tmp_path: Path, kind: str, saving: int, loading: int, kept: bool, form: str
) -> None:
    def call(world: int) -> list[list[float]]:
        arguments = kept, tmp_path / "saved", 12, form, kind
        return [resumed(*arguments)] if world == 1 else groups[world].run(resumed, *arguments)

    losses = call(saving)[0]
    for others in call(loading):
        assert others == pytest.approx(losses, rel=1e-12)


def full_state(path: Path, kind: str) -> list[float]:
    """As rank 0 saves it in one file, and every rank loads it."""
    model = divide(started(False))
    optimizer = oplora.AdamW(model, **KINDS[kind])
    some, options = data(12, torch.float64), StateDictOptions(full_state_dict=True, cpu_offload=True)
    train_whole(model, optimizer, some[:SAVED])
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"model": of_model, "optimizer": of_optimizer}, path)
    losses = train_whole(model, optimizer, some[SAVED:])
    dist.barrier()
    fresh = divide(started(False))
    other, saved = oplora.AdamW(fresh, **KINDS[kind]), torch.load(path, weights_only=True)
    set_state_dict(fresh, other, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)
    assert train_whole(fresh, other, some[SAVED:]) == losses
    return losses


@every_kind
def test_full_state_of_one_file_goes_on_divided_and_whole(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    losses = ranks.run(full_state, tmp_path / "saved.pt", kind)[0]
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    model = started(False)
    optimizer = oplora.AdamW(model, **KINDS[kind])
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert train_whole(model, optimizer, data(12, torch.float64)[SAVED:]) == pytest.approx(losses, rel=1e-12)


def refuse_other_rank(kind: str) -> tuple[Bits, Bits, list[str]]:
    """Of a checkpoint of another rank: what was there before and after the refusal, and whether all refuse."""
    other = oplora.AdamW(divide(make_chain(r=2)), **KINDS[kind])
    model = divide(make_chain())
    optimizer = oplora.AdamW(model, **KINDS[kind])
    train(model, optimizer, data(1))
    before = state_of(model, optimizer)
    with pytest.raises(oplora.OPLoRAError) as raised:
        optimizer.load_state_dict(other.state_dict())
    return before, state_of(model, optimizer), [str(raised.value)]


@every_kind
def test_checkpoint_that_does_not_fit_changes_nothing_in_any_process(ranks: Ranks, kind: str) -> None:
    for before, after, (message,) in ranks.run(refuse_other_rank, kind):
        assert "shapes" in message or "another process" in message
        assert_same_bits(before, after)


# ---- accelerate ----


def prepare(optimizer_of: str, kind: str) -> tuple[Accelerator, nn.Module, Any]:
    """As a script does it, with accelerate's plugin for FSDP2, which it takes on GPUs only unless told."""
    accelerator = Accelerator()
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    model = make_chain(torch.float64, **CONFIGS["biases and a head"])
    params: Any = model if optimizer_of == "model" else [p for p in model.parameters() if p.requires_grad]
    return accelerator, *accelerator.prepare(model, oplora.AdamW(params, **KINDS[kind]))


def run_accelerate(optimizer_of: str, kind: str, folder: Path) -> tuple[Bits, list[float], list[float]]:
    """What is trained, and the losses after save_state, of that run and of one that loads it."""
    some, resumed_losses = data(12, torch.float64), []
    accelerator, model, optimizer = prepare(optimizer_of, kind)
    for batch in some[:SAVED]:
        step_accelerated(accelerator, model, optimizer, batch)
    accelerator.save_state(folder)
    losses = [step_accelerated(accelerator, model, optimizer, batch) for batch in some[SAVED:]]
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, fresh, optimizer = prepare(optimizer_of, kind)
    accelerator.load_state(folder)
    resumed_losses = [step_accelerated(accelerator, fresh, optimizer, batch) for batch in some[SAVED:]]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(hasattr(p, "full_tensor") for group in optimizer.param_groups for p in group["params"])
    return trained(model), losses, resumed_losses


def step_accelerated(accelerator: Accelerator, model: nn.Module, optimizer: Any, batch: Batch) -> float:
    x, y = part(batch, dist.get_rank(), dist.get_world_size())
    loss = (model(x) - y).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    ("optimizer_of", "kind"), [("model", "auto"), ("parameters", "auto"), ("model", "exact"), ("parameters", "lean")]
)
def test_accelerates_plugin_trains_saves_and_resumes(
    ranks: Ranks, tmp_path: Path, optimizer_of: str, kind: str
) -> None:
    model = make_chain(torch.float64, **CONFIGS["biases and a head"])
    train_alone(model, oplora.AdamW(model, **KINDS[kind]), data(12, torch.float64), ranks.world)
    for bits, losses, resumed_losses in ranks.run(run_accelerate, optimizer_of, kind, tmp_path / "saved"):
        assert resumed_losses == losses
        assert_close({k.replace("_orig_mod.", ""): v for k, v in bits.items()}, trained(model), torch.float64)
