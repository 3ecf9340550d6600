"""What a row costs in each of the core's inner loops, on one thread, and what bounds it.

    python benchmarks/bench_loops.py                          to benchmarks/results/bench_loops.json
    python benchmarks/bench_loops.py --quick --output /tmp/loops.json

Compiles loops.c with the core's own flags and runs it, in turns with the memory's bandwidth. README.md explains the
columns.
"""

import json
import os
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import harness
from harness import Row

HERE = Path(__file__).parent
RESULT = HERE / "results" / "bench_loops.json"
CORE = HERE.parent / "csrc" / "core"
FLAGS = "-std=c11 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp-simd -D_POSIX_C_SOURCE=199309L"


def build(directory: Path) -> Path:
    """The program; its own loops, square roots and divisions, in the widest registers that this processor has."""
    compile_it = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS.split()]
    kernels, program = directory / "dispatch.o", directory / "loops"
    subprocess.run([*compile_it, "-c", str(CORE / "dispatch.c"), "-o", str(kernels)], check=True)
    sources = [str(HERE / "loops.c"), str(kernels)]
    subprocess.run([*compile_it, "-march=native", *sources, "-lm", "-o", str(program)], check=True)
    return program


def measure(rounds: int, turns: int, array_bytes: int) -> Iterator[Row]:
    bandwidth = harness.Bandwidth(array_bytes)
    runs: list[list[Row]] = []
    with tempfile.TemporaryDirectory() as directory:
        command = [str(build(Path(directory))), str(turns)]

        def run() -> None:
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append([json.loads(line) for line in text.splitlines()])

        seconds = harness.in_turns({"loops": harness.Contender(run), **bandwidth.contenders()}, rounds, limit_s=120)
    rates = bandwidth.columns(seconds)
    for rows in zip(*runs, strict=True):
        row = {**rows[0], **{name: statistics.median(r[name] for r in rows) for name in ("ns", "divider_ns")}, **rates}
        yield {**row, "rounds": len(rows), "memory_ns": row["bytes"] / rates["bandwidth_gbps"], "bound": bound(row)}


def bound(row: Row) -> str:
    """The memory where it takes longer than the loop in the caches; else the divider where it takes most of that."""
    if row["bytes"] / row["bandwidth_gbps"] > row["ns"]:
        return "memory"
    return "divider" if row["divider_ns"] >= 0.7 * row["ns"] else "arithmetic"


def main() -> None:
    parser = harness.Command(__doc__, RESULT, "a few turns")
    parser.set_defaults(threads=1)  # its figures are of one
    arguments = parser.options()
    environment = harness.environment()
    rows = []
    array_bytes = 2**24 if arguments.quick else max(2**28, 8 * harness.last_level_cache_bytes())
    for row in measure(*((1, 2) if arguments.quick else (10, 200)), array_bytes):
        rows.append({"benchmark": "loops", **environment, **row})
        print(f"{row['loop']}: {row['ns']:.3f} ns a row, memory {row['memory_ns']:.3f}, bound: {row['bound']}")
    harness.write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
