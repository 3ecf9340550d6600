"""What oplora.AdamW(model) costs beside plain LoRA: bytes of an entry of A and B, and the time of `optimizer.step()`.

    python benchmarks/bench_cost.py                          to benchmarks/results/bench_cost.json
    python benchmarks/bench_cost.py --quick --output /tmp/cost.json

The presets as they are made without another argument, beside torch's fused AdamW on the same factors, on 8 layers of
width 1024 with r = 64 (1.0 M entries). Bytes are measured as bench_lean.py measures them, in a process of their own;
steps take turns. README.md explains the columns.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import bench_lean
import bench_step
import harness
import torch
from bench_step import LR, Inputs, LoRA
from harness import Contender, Row

import oplora


def preset(inputs: Inputs, name: str) -> LoRA:
    return LoRA(inputs, oplora.AdamW(inputs.model, lr=LR, preset=name))


LORA_ALONE = "lora, AdamW fused"
PRESETS = {f"oplora {name}": partial(preset, name=name) for name in ("auto", "flat", "paper")}
METHODS: bench_step.Methods = {LORA_ALONE: bench_step.METHODS[LORA_ALONE], **PRESETS}
ROUNDS = 40
RESULT = Path(__file__).parent / "results" / "bench_cost.json"


def measure(quick: bool) -> Iterator[Row]:
    size = bench_lean.layers(1, width=64, r=4) if quick else bench_lean.layers(8)
    optimizers = {name: bench_step.with_gradients(build, size) for name, build in METHODS.items()}
    steps = {name: Contender(optimizer.step) for name, optimizer in optimizers.items()}
    seconds = harness.in_turns(steps, 3 if quick else ROUNDS, limit_s=60)
    for name, build in METHODS.items():
        held = harness.in_own_process(bench_step.measure_memory, build, size, torch.get_num_threads())["held_bytes"]
        yield {
            "kind": "cost",
            **size.columns(),
            "contender": name,
            "rounds": len(seconds[name]),
            **harness.time_columns(seconds[name]),
            **harness.ratio_columns(seconds[name], over=seconds[LORA_ALONE]),
            "over": LORA_ALONE,
            "bytes_per_entry": held / bench_lean.numbers(size) + 4,  # with the entry itself
        }


def main() -> None:
    parser = harness.Command(__doc__, RESULT, "a toy size, three rounds")
    arguments = parser.options()
    environment = harness.environment()
    rows = []
    for row in measure(arguments.quick):
        rows.append({"benchmark": "cost", **row, "allocator": "default", **environment})
        print(f"{row['contender']}: {row['bytes_per_entry']:.1f} bytes an entry, {row['ms']:.2f} ms", flush=True)
    harness.write_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
