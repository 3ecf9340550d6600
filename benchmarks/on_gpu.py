"""All that a GPU is needed for, in one command and at most eight minutes, with nothing but a Python that has torch.

    python3 benchmarks/on_gpu.py --output results-of-today        all parts, the most valuable first
    python3 benchmarks/on_gpu.py --parts build steps --sizes smollm2-r32     a second look at one kernel

Nothing is downloaded and no environment is made: the kernels are built for the card that is there, beside the sources,
with the python that runs this. Every part has a time limit of its own, and its output and results are in the folder as
soon as they are there; summary.json says how each ended. tests need pytest and peft, training peft and transformers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    command: list[str]
    limit_s: int
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program


def parts(output: Path, arch: str, sizes: list[str]) -> dict[str, Part]:
    python = sys.executable
    some = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1"]
    picked = ["--sizes", *sizes] if sizes else []
    build = {"OPLORA_CUDA": "1", "OPLORA_CUDA_ARCHS": arch}
    return {
        "build": Part([python, "setup.py", "build_clib", "build_ext", "--inplace"], 110, build),
        "tests": Part(some, 90),
        "steps": Part([python, "benchmarks/bench_gpu.py", "--output", str(output / "bench_gpu.json"), *picked], 120),
        "training": Part([python, "benchmarks/bench_training.py", "--output", str(output / "bench_training.json")], 90),
        "memcheck": Part([*sanitizer, "--tool", "memcheck", *some, "-k", "cores_bits"], 40, needs="compute-sanitizer"),
        "racecheck": Part(
            [*sanitizer, "--tool", "racecheck", *some, "-k", "cores_bits"], 30, needs="compute-sanitizer"
        ),
    }


def run(name: str, part: Part, output: Path) -> dict[str, object]:
    """How it ended; its output is in NAME.log."""
    if part.needs is not None and shutil.which(part.needs) is None:
        return {"ended": f"left out: there is no {part.needs}"}
    paths = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.environment}
    begin = time.monotonic()
    with (output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit status {process.wait(part.limit_s)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers too
            process.wait()
            ended = f"stopped after {part.limit_s} s"
    return {"ended": ended, "seconds": round(time.monotonic() - begin, 1)}


def card() -> tuple[str, str]:
    """The GPU's name, and its architecture as nvcc has it."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("on_gpu: torch sees no CUDA GPU. Nothing was run.")
    return torch.cuda.get_device_name(), "{}{}".format(*torch.cuda.get_device_capability())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(parts(Path(), "90", []))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--parts", nargs="+", choices=every, default=every)
    parser.add_argument("--sizes", nargs="+", default=[], help="bench_gpu's")
    options = parser.parse_args(arguments)
    name, arch = card()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, object] = {"gpu": name, "architecture": arch}
    good = True
    for part, how in parts(output, arch, options.sizes).items():
        if part not in options.parts:
            continue
        summary[part] = ended = run(part, how, output)
        print(part, ended, flush=True)
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        good &= ended["ended"] == "exit status 0" or how.needs is not None
        if part == "build" and not good:
            break  # what follows would measure other sources
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
