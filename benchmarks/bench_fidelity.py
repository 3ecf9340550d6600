"""Does the lean state train what the exact one trains? Final losses of both from the same numbers, seed by seed.

    python benchmarks/bench_fidelity.py                     all tasks, to benchmarks/results/bench_fidelity.json
    python benchmarks/bench_fidelity.py --tasks digits      one of them
    python benchmarks/bench_fidelity.py --starts uniform sign
    python benchmarks/bench_fidelity.py --ranks             lean alone at other ranks, to results/bench_ranks.json
    python benchmarks/bench_fidelity.py --quick --output /tmp/fidelity.json

The tasks are in tasks.py. A run that was cut short continues where it was: rows that the file has are not measured
again, unless with --fresh. Plain LoRA under torch.optim.AdamW runs beside, with the same seeds and rates.

    exact   oplora.AdamW(state="exact"): all of W2 and both its moments
    lean    oplora.AdamW(state="lean")
    lora    torch.optim.AdamW on A and B, from PEFT's start

What to expect of "the same": two states round differently, and at high rates a training amplifies any difference, so
losses agree no better than those of two seeds do. plot.py gives the difference of the means in units of exact's
standard deviation over the seeds. README.md explains the columns.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import harness
import tasks
from tasks import DEFAULT_START, TASKS, TOYS, Case, lora_case, oplora_case, task_of

STATES = ("exact", "lean")
STARTS = ("sign", "uniform")
RANKS = ((1, 1), (2, 1), (3, 2), (4, 2), (8, 4))  # weight_rank, moment_rank
RANK_TASKS = ("factorisation", "digits")
RESULT = Path(__file__).parent / "results" / "bench_fidelity.json"
RANK_RESULT = RESULT.with_name("bench_ranks.json")


def plan(names: Iterable[str], starts: Sequence[str], seeds: int | None) -> Iterator[Case]:
    for name in names:
        task = task_of(name)
        count = task.seeds if seeds is None else seeds
        lora_seeds = count if task.lora_seeds is None else min(count, task.lora_seeds)
        for lr in dict.fromkeys(rate.lr for rate in task.rates):
            yield from (lora_case(name, lr, seed) for seed in range(lora_seeds))
        for rate in task.rates:
            for start in starts:
                for state in STATES:
                    yield from (oplora_case(name, state, start, rate, seed) for seed in range(count))


def rank_plan(names: Iterable[str], start: str, seeds: int | None) -> Iterator[Case]:
    for name in names:
        task = task_of(name)
        for rate in task.rates:
            for ranks in RANKS:
                for seed in range(task.seeds if seeds is None else seeds):
                    yield oplora_case(name, "lean", start, rate, seed, ranks=ranks)


def main() -> None:
    parser = harness.Command(__doc__, None, "toy tasks, two seeds")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[DEFAULT_START])
    parser.add_argument("--seeds", type=int, help="of every task; by default a task's own number, 3 to 12")
    parser.add_argument("--ranks", action="store_true", help=f"{' and '.join(RANK_TASKS)} alone, with state lean alone")
    parser.add_argument("--fresh", action="store_true", help="measure also what the output file has")
    arguments = parser.options()
    names, seeds = (TOYS, 2) if arguments.quick else (arguments.tasks, arguments.seeds)
    output = arguments.output or (RANK_RESULT if arguments.ranks else RESULT)
    common = {"benchmark": "fidelity", **harness.environment()}
    begin = time.perf_counter()
    if arguments.ranks:
        cases = rank_plan(names if arguments.quick else RANK_TASKS, DEFAULT_START, seeds)
    else:
        cases = plan(names, arguments.starts, seeds)
    rows = tasks.run_all(cases, output, common, arguments.threads, fresh=arguments.fresh, apart=not arguments.quick)
    print(f"{len(rows)} rows in {output}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
