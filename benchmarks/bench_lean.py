"""What the lean state costs: bytes and time of a step against the width H and against the number of factor entries N.

    python benchmarks/bench_lean.py                         all kinds, to benchmarks/results/bench_lean.json
    python benchmarks/bench_lean.py --kinds memory growth   some; the file's rows of the others stay
    python benchmarks/bench_lean.py --quick --output /tmp/lean.json

    memory    bytes held and at the peak, each contender in a process of its own: lean at every H, all at H = 32
    growth    optimizer.step() alone, in turns, for N from 1e5 to 3e7 at H = 32 and for H from 8 to 2048 at N = 1e6
    step      a step with its micro-batches on the sizes of bench_step.py
    roofline  what bounds a step, whole and as clipping cuts it in two: the memory, the arithmetic, or the calls

The contenders are those of bench_step.py, and oplora.AdamW(state="lean") from both starts. README.md explains the
columns.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import bench_step
import harness
import torch
from bench_step import LATENT_WIDTH, Methods, Size, with_gradients
from harness import Contender, Row
from tasks import DEFAULT_START, MOMENT_RANK, WEIGHT_RANK
from torch.optim import Optimizer

LEAN = {
    f"oplora lean, {start}": partial(bench_step.oplora_in, state="lean", start=start) for start in ("sign", "uniform")
}
OURS = f"oplora lean, {DEFAULT_START}"
EXACT, EAGER, LORA = bench_step.OURS, "eager, AdamW fused", "lora, AdamW fused"
KEPT = "oplora lean, kept"  # A and B keep their start, as preset "flat" has it: no random numbers
METHODS: Methods = {**LEAN, **{name: bench_step.METHODS[name] for name in (EXACT, EAGER, LORA)}}
KINDS = ("memory", "growth", "step", "roofline")
WIDTHS = (8, 32, 128, 512, 2048)
EXACT_LIMIT_BYTES = 6e9  # state exact runs where it needs less,
EAGER_LIMIT = 33 * 1.1e6  # the eager way where W2 and c2 have fewer numbers
# What is read and written of an entry at d = 2, k = 1. ||g||^2 reads g; the first pass g, U (8 bytes), A, R (2 each);
# the second those, m, S and the factor, and writes all but g. A measurement reads g twice and U; the step after it is
# spared ||g||^2 and W2^T g, but not the first pass' other sums.
PART_BYTES = {"step": 64, "measuring": 16, "step after measuring": 60}
RESULT = Path(__file__).parent / "results" / "bench_lean.json"


def layers(count: int, hidden_width: int = 32, width: int = 1024, r: int = 64) -> Size:
    """`count` equal layers: N = 131,072 each, unless of another width or r."""
    title = f"{count} layer{'s' if count > 1 else ''} of width {width}, r = {r}"
    return Size(title, count * ((width, width),), r, hidden_width)


def numbers(size: Size) -> int:
    return sum(size.factor_sizes)


# ---- memory ----


def memory_row(name: str, size: Size) -> Row:
    """Measured. What a step needs for an entry is what it holds and the entry itself, which belongs to the model."""
    measured = harness.in_own_process(bench_step.measure_memory, METHODS[name], size, torch.get_num_threads())
    row = {"kind": "memory", **size.columns(), "contender": name, **measured, "measured": True}
    return {
        **row,
        "bytes_per_entry": row["held_bytes"] / numbers(size) + 4,
        "peak_per_entry": row["peak_bytes"] / numbers(size) + 4,
        "hidden_path_per_entry": hidden_path_bytes(name, size) / numbers(size),
    }


def hidden_path_bytes(name: str, size: Size) -> int:
    """What all layers keep of z, W1 and c1 and, in state lean, of Q, B and r: what grows with H and not with N. In
    state exact two moments beside each number, in the eager way a gradient too."""
    H, Z, d, k = size.hidden_width, LATENT_WIDTH, WEIGHT_RANK, MOMENT_RANK
    if name in LEAN:
        return len(size.layers) * (4 * (H * (2 * d + k + 2) + Z * (d + k + 4)) + 2 * H * (k + 3) + 32)
    copies = {EAGER: 4, LORA: 0}.get(name, 3)
    return copies * 4 * len(size.layers) * (H * Z + H + Z)


def memory_rows(quick: bool) -> Iterator[Row]:
    size = layers(2, width=64, r=4) if quick else layers(16)
    for H in WIDTHS[:2] if quick else WIDTHS:
        yield memory_row(OURS, dataclasses.replace(size, hidden_width=H))
    for name in METHODS:
        if name != OURS:
            yield memory_row(name, size)


# ---- growth ----


def fits(name: str, size: Size) -> bool:
    rows_of_state = (size.hidden_width + 1) * numbers(size)
    return not (name == EXACT and 12 * rows_of_state > EXACT_LIMIT_BYTES) and not (
        name == EAGER and rows_of_state > EAGER_LIMIT
    )


def growth_sizes(quick: bool) -> list[Size]:
    if quick:
        return [layers(1, width=64, r=4), layers(1, 8, width=64, r=4)]
    counts = (1, 2, 8, 23, 76, 229)  # N = 1.3e5, 2.6e5, 1.0e6, 3.0e6, 1.0e7, 3.0e7
    return [layers(count) for count in counts] + [layers(8, H) for H in WIDTHS if H != 32]


def growth_rows(rounds: int, quick: bool) -> Iterator[Row]:
    for size in growth_sizes(quick):
        optimizers = {name: with_gradients(build, size) for name, build in METHODS.items() if fits(name, size)}
        seconds = harness.in_turns({name: Contender(it.step) for name, it in optimizers.items()}, rounds)
        for name, times in seconds.items():
            columns = {**harness.time_columns(times), **harness.ratio_columns(times, over=seconds[OURS])}
            per_entry = 1e6 * columns["ms"] / numbers(size)
            row = {"kind": "growth", **size.columns(), "contender": name, "rounds": len(times), **columns}
            yield {**row, "over": OURS, "ns_per_entry": per_entry}
        del optimizers
        harness.release_freed_memory()


# ---- steps with their micro-batches ----


def step_rows(sizes: dict[str, Size], rounds: int) -> Iterator[Row]:
    rivals = {name: build for name, build in METHODS.items() if name != OURS}
    for size in sizes.values():
        for row in bench_step.time_pairs(size, rounds, rivals, OURS, METHODS[OURS]):
            yield {**size.columns(), **row, "over": OURS}


# ---- what bounds it ----


def parts(optimizer: Optimizer) -> dict[str, Contender]:
    """The step, and the two halves that clipping cuts it into: measuring the gradients' norm, and the step after it,
    which takes what was measured. Each runs once before it is timed: a small layer is then in the caches."""

    def measure() -> None:
        optimizer._clipped = None  # type: ignore[attr-defined]  # it would not measure the same gradients again
        optimizer.clip_grad_norm_(math.inf)  # type: ignore[attr-defined]

    return {
        "step": Contender(optimizer.step, before=optimizer.step),
        "measuring": Contender(measure, before=measure),
        "step after measuring": Contender(optimizer.step, before=measure),
    }


def layers_in_caches(hidden_width: int) -> Size:
    """Eight of them, so that they are stepped as the many are that don't fit: by a thread each."""
    training_bytes = min(2**23, harness.last_level_cache_bytes() // 4)
    return layers(8, hidden_width, r=max(1, training_bytes // (8 * 24 * 2048)))


def roofline_rows(rounds: int, quick: bool, array_bytes: int) -> Iterator[Row]:
    sizes = [layers(1, width=64, r=4)] if quick else [layers(76), layers(76, 512)]
    bandwidth = harness.Bandwidth(array_bytes)
    for size in sizes:
        cached = layers_in_caches(size.hidden_width)
        tiny, few = (Size("tiny", len(x.layers) * ((8, 8),), 1, size.hidden_width) for x in (size, cached))
        for name, build in {**LEAN, KEPT: partial(bench_step.oplora_in, state="lean", init="keep")}.items():
            contenders = {
                f"{where} {part}": contender
                for where, there in (("memory", size), ("cached", cached), ("call", tiny), ("few calls", few))
                for part, contender in parts(with_gradients(build, there)).items()
            }
            seconds = harness.in_turns({**contenders, **bandwidth.contenders()}, rounds, limit_s=30)
            for part, entry_bytes in PART_BYTES.items():
                row = {
                    "kind": "roofline",
                    **size.columns(),
                    "contender": name,
                    "part": part,
                    "rounds": len(seconds[f"memory {part}"]),
                    **harness.time_columns(seconds[f"memory {part}"]),
                    "bytes_needed": entry_bytes * numbers(size),
                    **bandwidth.columns(seconds),
                    "cached_gbps": entry_bytes
                    * numbers(cached)
                    / bench_step.beside_a_call(seconds[f"cached {part}"], seconds[f"few calls {part}"])
                    / 1e9,
                    "call_ms": 1e3 * median(seconds[f"call {part}"]),
                }
                yield {**row, **bench_step.bound_columns(row)}
            del contenders
            harness.release_freed_memory()


def median(seconds: list[float]) -> float:
    return harness.quantiles(seconds)[1]


# ---- all of it ----


def measure(kinds: list[str], sizes: dict[str, Size], rounds: int, quick: bool) -> Iterator[Row]:
    array_bytes = 2**24 if quick else max(2**28, 8 * harness.last_level_cache_bytes())
    if "memory" in kinds:
        yield from memory_rows(quick)
    if "growth" in kinds:
        yield from growth_rows(rounds, quick)
    if "step" in kinds:
        yield from step_rows(sizes, rounds)
    if "roofline" in kinds:
        yield from roofline_rows(rounds, quick, array_bytes)


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"{row['kind']}: {row['size']}, H {row['hidden_width']}: {row['contender']}: "
    if row["kind"] == "memory":
        held = (
            f"{row['bytes_per_entry']:.1f} bytes an entry, {row['hidden_path_per_entry']:.1f} of them the hidden path"
        )
        return text + f"{held}, at the peak {row['peak_per_entry']:.1f}"
    text += f"{row['part']}: " if row["kind"] == "roofline" else ""
    text += f"{row['ms']:.3f} ms ({row['ms_20']:.3f} to {row['ms_80']:.3f})"
    if row["kind"] == "roofline":
        return text + f", {row['gbps']:.1f} of {row['bandwidth_gbps']:.1f} GB/s, bound: {row['bound']}"
    return text + f", ratio {row['ratio']:.3f} ({row['ratio_20']:.3f} to {row['ratio_80']:.3f})"


def main() -> None:
    parser = harness.Command(__doc__, RESULT, "toy sizes, three rounds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sizes", nargs="+", choices=bench_step.SIZES, default=list(bench_step.SIZES), help="of step")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.options()
    sizes = bench_step.QUICK if arguments.quick else {name: bench_step.SIZES[name] for name in arguments.sizes}
    rounds = 3 if arguments.quick else arguments.rounds
    environment = harness.environment()
    there = harness.read_rows(arguments.output) if arguments.output.exists() else []
    rows = [row for row in there if row["kind"] not in arguments.kinds]
    begin = time.perf_counter()
    for row in measure(arguments.kinds, sizes, rounds, arguments.quick):
        rows.append({"benchmark": "lean", **row, "allocator": "default", **environment})
        print(line(row), flush=True)
        harness.write_rows(arguments.output, rows)
    print(f"{len(rows)} rows in {arguments.output}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
