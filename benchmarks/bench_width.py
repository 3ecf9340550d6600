"""How wide should a generator be, when its width costs no memory? Final losses against H and the learning rate.

    python benchmarks/bench_width.py                        to benchmarks/results/bench_width.json
    python benchmarks/bench_width.py --tasks digits --seeds 3
    python benchmarks/bench_width.py --quick --output /tmp/width.json

The tasks are the small ones of tasks.py. State lean at every width; state exact where that is still small, which is
also what the eager way would reach, as it trains the same; and plain LoRA. Beside them the bytes that each needs for an
entry of the factors, on one layer of width 1024 with r = 64: measured, but for states that would take gigabytes for
this one layer, whose bytes are counted. Runs that the file has are not repeated, unless with --fresh. README.md
explains the columns.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import harness
import tasks
from bench_lean import EAGER, EXACT, LORA, OURS, WIDTHS, hidden_path_bytes, layers, memory_row, numbers
from bench_step import Size
from harness import Row
from tasks import DEFAULT_START, Case, Rate, lora_case, oplora_case

RATES = {
    "factorisation": (3e-4, 1e-3, 3e-3, 1e-2),
    "digits": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
QUICK_RATES = {"toy factorisation": (3e-3, 1e-2), "toy digits": (3e-3,)}
QUICK_WIDTHS = (8, 32)
EXACT_WIDEST = 512
RESULT = Path(__file__).parent / "results" / "bench_width.json"


def plan(rates: dict[str, tuple[float, ...]], widths: Iterable[int], seeds: int) -> Iterator[Case]:
    for name, lrs in rates.items():
        for lr in lrs:
            yield from (lora_case(name, lr, seed) for seed in range(seeds))
            for H in widths:
                for state in ("exact", "lean") if H <= EXACT_WIDEST else ("lean",):
                    yield from (oplora_case(name, state, DEFAULT_START, Rate(lr), s, H) for s in range(seeds))


def counted_row(name: str, size: Size) -> Row:
    """As memory_row, from counts: W2 and c2 with two moments and the gradients of A and B; in the eager way with two
    moments and a gradient of their own."""
    H, N = size.hidden_width, numbers(size)
    copies, gradients = {EXACT: (3, 1), EAGER: (4, 0)}[name]
    held = copies * 4 * (H + 1) * N + 4 * gradients * N + hidden_path_bytes(name, size)
    return {
        "kind": "memory",
        **size.columns(),
        "contender": name,
        "held_bytes": held,
        "measured": False,
        "bytes_per_entry": held / N + 4,
        "hidden_path_per_entry": hidden_path_bytes(name, size) / N,
    }


def memory_rows(widths: Iterable[int], quick: bool) -> Iterator[Row]:
    def size(H: int) -> Size:
        return layers(1, H, width=64, r=4) if quick else layers(1, H)

    yield memory_row(LORA, size(32))
    for H in widths:
        yield memory_row(OURS, size(H))
        for name in (EXACT, EAGER):
            yield memory_row(name, size(H)) if H <= EXACT_WIDEST else counted_row(name, size(H))


def memory_line(row: Row) -> str:
    """A row for the terminal."""
    how = "measured" if row["measured"] else "counted"
    return f"H {row['hidden_width']}: {row['contender']}: {row['bytes_per_entry']:.1f} bytes an entry, {how}"


def main() -> None:
    parser = harness.Command(__doc__, RESULT, "toy tasks, two widths")
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="run also what the output file has")
    arguments = parser.options()
    rates = QUICK_RATES if arguments.quick else {name: RATES[name] for name in arguments.tasks}
    widths = QUICK_WIDTHS if arguments.quick else WIDTHS
    common = {"benchmark": "width", **harness.environment()}
    begin = time.perf_counter()
    there = harness.read_rows(arguments.output) if arguments.output.exists() else []
    memory: list[Row] = []
    for row in memory_rows(widths, arguments.quick):
        memory.append({**common, **row})
        print(memory_line(row), flush=True)
    harness.write_rows(arguments.output, memory + [row for row in there if row["kind"] == "run"])
    cases = plan(rates, widths, arguments.seeds)
    settings = {"fresh": arguments.fresh, "apart": not arguments.quick}
    rows = tasks.run_all(cases, arguments.output, common, arguments.threads, **settings)
    print(f"{len(memory) + len(rows)} rows in {arguments.output}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
