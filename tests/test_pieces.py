"""oplora.AdamW on the pieces that DeepSpeed's ZeRO hands over, cut here by hand (zero.py).
tests/trainers/test_deepspeed.py does the same with DeepSpeed.

A test hands a function of this module to all processes of a group, and gets what each of them returns.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from ranks import Ranks, join_group
from test_fsdp2 import LONG, STEPS, Batch, Bits, assert_close, backward, data, make_chain, part, train_alone, trained
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from zero import Zero, cut

import oplora
from oplora import engines
from oplora.optim import refusals

SMALL = {"target_modules": ["0", "2"]}  # 93 entries, which neither 2 nor 3 processes divide


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    group = Ranks(join_group, ("peft", "accelerate"), request.param)
    yield group
    group.stop(wait=True)


# ---- what is handed over ----


def of_model(model: nn.Module, **options: Any) -> oplora.AdamW:
    return oplora.AdamW(model, **options)


def of_list(model: nn.Module) -> oplora.AdamW:
    """Factors and biases in one group."""
    return oplora.AdamW([p for p in model.parameters() if p.requires_grad])


def of_loraplus(model: nn.Module) -> oplora.AdamW:
    """A and B in groups of their own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    down = [(name, p) for name, p in named if "lora_B" not in name]
    up = [(name, p) for name, p in named if "lora_B" in name]
    return oplora.AdamW([{"params": down, "lr": 1e-3}, {"params": up, "lr": 4e-3}])


def of_loraplus_turned(model: nn.Module) -> oplora.AdamW:
    """The same, B first."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    down = [(name, p) for name, p in named if "lora_B" not in name]
    up = [(name, p) for name, p in named if "lora_B" in name]
    return oplora.AdamW([{"params": up, "lr": 4e-3}, {"params": down, "lr": 1e-3}])


def train(model: nn.Module, zero: Any, some: list[Batch]) -> None:
    for batch in some:
        backward(model, part(batch, dist.get_rank(), dist.get_world_size()))
        zero.step()
        model.zero_grad()


def run_in_pieces(make: Callable[..., oplora.AdamW], config: str, options: dict[str, Any], steps: int) -> Bits:
    model = make_chain(**CONFIGS[config])
    train(model, cut(make(model), **options), data(steps))
    return trained(model)


CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "padded": SMALL,
    "DoRA": {"use_dora": True},
    "biases and a head": {"bias": "all", **SMALL, "modules_to_save": ["4"]},
}
WAYS: dict[str, dict[str, Any]] = {
    "group by group": {},
    "at once": {"at_once": True},
    "in turn": {"round_robin": True},
    "stage 3": {"stage": 3},
}
every_stage = pytest.mark.parametrize("stage", [1, 3])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_training_in_pieces_equals_one_process(ranks: Ranks, config: str, way: str) -> None:
    alone, steps = make_chain(**CONFIGS[config]), LONG if config == "LoRA" else STEPS
    train_alone(alone, oplora.AdamW(alone), data(steps), ranks.world)
    for bits in ranks.run(run_in_pieces, of_model, config, WAYS[way], steps):
        assert_close(bits, trained(alone), torch.float32)


@pytest.mark.parametrize("make", [of_list, of_loraplus, of_loraplus_turned])
@pytest.mark.parametrize("way", WAYS)
def test_groups_of_any_kind_train_as_in_one_process(ranks: Ranks, make: Callable[..., Any], way: str) -> None:
    config = "biases and a head"
    alone = make_chain(**CONFIGS[config])
    train_alone(alone, make(alone), data(STEPS), ranks.world)
    for bits in ranks.run(run_in_pieces, make, config, WAYS[way], STEPS):
        assert_close(bits, trained(alone), torch.float32)


def run_half(world: int | None = None) -> Bits:
    """bfloat16, whose gradients are averaged in float32; in one process if `world` says how many there would be."""
    model = make_chain(torch.bfloat16)
    optimizer = oplora.AdamW(model)
    if world is None:
        zero = Zero(optimizer)
        train(model, zero, data(STEPS, torch.bfloat16))
        assert {p.dtype for p in zero.parts} == {torch.float32}
        return trained(model)
    for batch in data(STEPS, torch.bfloat16):
        parts = []
        for rank in range(world):
            optimizer.zero_grad()
            backward(model, part(batch, rank, world))
            parts.append([p.grad.float() for p in model.parameters() if p.grad is not None])
        for p, *some in zip((p for p in model.parameters() if p.requires_grad), *parts, strict=True):
            p.grad, p.grad_dtype = None, None
            p.grad = torch.stack(some).sum(0) / world
        optimizer.step()
    return trained(model)


def test_bfloat16_model_trains_by_float32_pieces_as_by_masters(ranks: Ranks) -> None:
    alone = run_half(ranks.world)
    for bits in ranks.run(run_half):
        for name, tensor in bits.items():
            torch.testing.assert_close(tensor, alone[name], rtol=0.02, atol=1e-3)


# ---- what is kept, and what is sent ----


def kept_here() -> tuple[int, int]:
    """Entries of this process without padding, and bytes of the state's arenas beyond one zero for a missing tensor."""
    model = make_chain(**SMALL)
    optimizer = oplora.AdamW(model)
    zero = Zero(optimizer)
    train(model, zero, data(1))
    kept = [piece for s in optimizer._stepper.states for key, piece in s.pieces().items() if key != "found"]
    missing = sum(run.size == 0 for layer in optimizer._stepper.layers for run in layer.runs)
    return zero.parts[0].numel() - zero.paddings[0], sum(piece.nbytes for piece in kept) - 8 * missing


def test_process_keeps_the_state_of_its_entries_alone(ranks: Ranks) -> None:
    results = ranks.run(kept_here)
    assert sum(here for here, _ in results) == 93
    assert all(kept == 8 * here for here, kept in results)


def count_messages(make: Callable[..., oplora.AdamW], options: dict[str, Any]) -> list[int]:
    model = make_chain(**CONFIGS["biases and a head"])
    zero = Zero(make(model, **options))
    own = len(zero.parts) * 2  # of Zero itself
    counts = []
    for batch in data(4):
        backward(model, part(batch, dist.get_rank(), dist.get_world_size()))
        with CommDebugMode() as messages:
            zero.step()
        counts.append(messages.get_total_counts() - own)
        model.zero_grad()
    return counts[1:]  # the first step finds out where the starts are


@pytest.mark.parametrize("make", [of_model, of_loraplus])
def test_step_sends_one_message(ranks: Ranks, make: Callable[..., Any]) -> None:
    assert ranks.run(count_messages, make, {}) == [[1] * 3] * ranks.world


def test_clipping_step_sends_two_messages(ranks: Ranks) -> None:
    assert ranks.run(count_messages, of_model, {"max_grad_norm": 0.1}) == [[2] * 3] * ranks.world


def run_clipped() -> Bits:
    model = make_chain(**CONFIGS["biases and a head"])
    train(model, Zero(oplora.AdamW(model, max_grad_norm=0.1)), data(STEPS))
    return trained(model)


def test_clipping_trains_as_in_one_process(ranks: Ranks) -> None:
    alone = make_chain(**CONFIGS["biases and a head"])
    train_alone(alone, oplora.AdamW(alone, max_grad_norm=0.1), data(STEPS), ranks.world)
    for bits in ranks.run(run_clipped):
        assert_close(bits, trained(alone), torch.float32)


def run_on_device(library: Path | None, make: Callable[..., oplora.AdamW], stage: int) -> tuple[Bits, list[float]]:
    """By the kernels that a GPU would run, executed on the CPU, which meet runs at odd addresses."""
    with pytest.MonkeyPatch.context() as patch:
        if library is not None:
            patch.setenv("OPLORA_CUDA_LIBRARY", str(library))
            for module in (engines, refusals):
                patch.setattr(module, "runs_on_device", lambda _: True)
        torch.set_flush_denormal(True)
        model = make_chain(**CONFIGS["biases and a head"])
        optimizer = make(model)
        train(model, cut(optimizer, stage), data(10))
        torch.set_flush_denormal(False)
    return trained(model), optimizer._stepper.found.tolist()


@pytest.mark.parametrize("make", [of_model, of_loraplus])
@every_stage
def test_pieces_train_on_a_device_as_on_the_host(ranks: Ranks, cuda_on_cpu: Path, make: Any, stage: int) -> None:
    on_device, on_host = (ranks.run(run_on_device, library, make, stage) for library in (cuda_on_cpu, None))
    for (bits, found), (others, expected) in zip(on_device, on_host, strict=True):
        assert found == on_device[0][1] == pytest.approx(expected, rel=1e-6)
        for name, tensor in bits.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-7)


# ---- refusals ----


def poison(make: Callable[..., oplora.AdamW], stage: int, skip: bool) -> tuple[str, Bits, Bits]:
    """Infinity in the gradient of one entry of the last tensor; what the step says, and two steps after it."""
    clean, model = make_chain(**SMALL), make_chain(**SMALL)
    others, optimizer = cut(make(clean), stage), make(model)
    optimizer.skip_nonfinite = skip
    zero, (first, second, third) = cut(optimizer, stage), data(3)
    train(clean, others, [first, third])
    train(model, zero, [first])
    before, message = trained(model), ""
    backward(model, part(second, dist.get_rank(), dist.get_world_size()))
    [p for p in model.parameters() if p.requires_grad][-1].grad.view(-1)[-1] = torch.inf
    try:
        zero.step()
    except oplora.OPLoRAError as error:
        message = str(error)
    model.zero_grad()
    if not skip:
        assert_same_bits(trained(model), before)
    train(model, zero, [third])
    return message, trained(model), trained(clean)


@pytest.mark.parametrize("make", [of_model, of_loraplus, of_loraplus_turned])
@pytest.mark.parametrize("skip", [False, True], ids=["raised", "skipped"])
@every_stage
def test_infinity_in_one_process_is_refused_by_all_and_changes_nothing(
    ranks: Ranks, make: Callable[..., Any], stage: int, skip: bool
) -> None:
    for message, bits, clean in ranks.run(poison, make, stage, skip):
        assert ("holds NaN or infinity" in message) is not skip
        assert_same_bits(bits, clean)


def message_of(options: dict[str, Any]) -> str:
    model = make_chain()
    zero = Zero(oplora.AdamW(model, **options))
    backward(model, part(data(1)[0], dist.get_rank(), dist.get_world_size()))
    try:
        zero.step()
    except oplora.OPLoRAError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preset": "flat"}, "preset='auto'"),
        ({"state": "exact"}, "preset='auto'"),
        ({"shard": True}, "Leave shard out"),
    ],
)
def test_other_ways_to_keep_generators_are_refused(ranks: Ranks, options: dict[str, Any], told: str) -> None:
    for message in ranks.run(message_of, options):
        assert "DeepSpeed" in message and told in message


# ---- what was saved, and other hands ----


def resume(make: Callable[..., oplora.AdamW], stage: int) -> tuple[Bits, Bits]:
    """Ten steps; and five, saved and gone on from in another model, whose pieces are loaded as DeepSpeed does."""
    config = CONFIGS["biases and a head"]
    whole, early, late = (make_chain(**config) for _ in range(3))
    some = data(10)
    train(whole, cut(make(whole), stage), some)
    first = cut(make(early), stage)
    train(early, first, some[:5])
    saved = [first.state_dict(), early.state_dict(), [p.detach().clone() for p in first.parts]]
    second = cut(make(late), stage)
    late.load_state_dict(saved[1])
    second.load_state_dict(saved[0])
    for mine, theirs in zip(second.parts, saved[2], strict=True):
        mine.data.copy_(theirs)
    train(late, second, some[5:])
    return trained(late), trained(whole)


@pytest.mark.parametrize("make", [of_model, of_list, of_loraplus])
@every_stage
def test_run_goes_on_from_what_each_process_saved(ranks: Ranks, make: Callable[..., Any], stage: int) -> None:
    for resumed, whole in ranks.run(resume, make, stage):
        assert_same_bits(resumed, whole)


def cut_late(stage: int, world: int | None = None) -> Bits:
    """Whole tensors for ten steps, pieces afterwards."""
    model = make_chain(**CONFIGS["biases and a head"])
    optimizer, some = oplora.AdamW(model), data(2 * STEPS)
    count = dist.get_world_size() if world is None else world
    train_alone(model, optimizer, some[:10], count)
    model.zero_grad()
    if world is None:
        train(model, cut(optimizer, stage), some[10:])
    else:
        train_alone(model, optimizer, some[10:], count)
    return trained(model)


@every_stage
def test_tensors_that_are_cut_after_some_steps_go_on(ranks: Ranks, stage: int) -> None:
    alone = cut_late(stage, ranks.world)
    for bits in ranks.run(cut_late, stage):
        assert_close(bits, alone, torch.float32)


def move_parts() -> tuple[Bits, Bits]:
    """The parts' memory is another one after five steps, as after DeepSpeed's offload_states and reload_states."""
    runs = []
    for moved in (False, True):
        model = make_chain(**SMALL)
        zero = Zero(oplora.AdamW(model))
        train(model, zero, data(10)[:5])
        for p in zero.parts if moved else ():
            p.data = p.data.clone()
        train(model, zero, data(10)[5:])
        runs.append(trained(model))
    return runs[0], runs[1]


def test_moved_parts_are_followed(ranks: Ranks) -> None:
    for stayed, moved in ranks.run(move_parts):
        assert_same_bits(moved, stayed)


def told() -> tuple[float, dict[str, dict[str, float]]]:
    model = make_chain(**SMALL)
    optimizer = oplora.AdamW(model)
    train(model, Zero(optimizer), data(3))
    return optimizer.found_lr, oplora.stats(optimizer)


def test_numbers_to_watch_are_of_all_processes(ranks: Ranks) -> None:
    alone = make_chain(**SMALL)
    optimizer = oplora.AdamW(alone)
    train_alone(alone, optimizer, data(3), ranks.world)
    expected = oplora.stats(optimizer)
    for found, stats in ranks.run(told):
        assert found == pytest.approx(optimizer.found_lr, rel=1e-5)
        assert stats.keys() == expected.keys()
        for name, mine in stats.items():
            assert mine["norm_g"] == pytest.approx(expected[name]["norm_g"], rel=1e-5)
