"""What one optimizer step costs on a GPU: time, GB/s beside what a copy reaches, and memory.

    python benchmarks/bench_gpu.py             LLaMA-7B's shapes and smaller ones, to benchmarks/results/bench_gpu.json
    python benchmarks/bench_gpu.py --quick --output /tmp/gpu.json

The contenders: oplora.AdamW with nothing chosen (preset auto), in state lean (its start drawn or kept) and exact,
OP-LoRA the eager way, and plain LoRA, on layers without the base model. Those whose state does not fit into the GPU's
free memory are named in rows of kind "left out". A turn ends when the device is done. README.md explains the columns.
"""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_step
import harness
import torch
from bench_step import Inputs, LoRA, Methods, Size
from harness import Contender, Row

import oplora

LLAMA_7B = 32 * ((4096, 4096), (4096, 4096), (4096, 4096), (4096, 11008), (11008, 4096))  # q, k, v, up, down
SIZES = {
    "llama-7b": Size("LLaMA-7B (q, k, v, up, down), r = 32", LLAMA_7B, 32),
    "smollm2-r32": bench_step.SIZES["smollm2-r32"],
}
RESULT = Path(__file__).parent / "results" / "bench_gpu.json"
COPY_BYTES = 2**30

AUTO, KEPT = "oplora auto", "oplora lean, kept start"
LEAN, LEAN_UNIFORM, EXACT = "oplora lean", "oplora lean, uniform start", "oplora exact"
EAGER, LORA = "eager, AdamW fused", "lora, AdamW fused"
METHODS: Methods = {
    AUTO: lambda inputs: LoRA(inputs, oplora.AdamW(inputs.model)),
    KEPT: lambda inputs: LoRA(inputs, oplora.AdamW(inputs.model, preset="flat")),
    LEAN: lambda inputs: bench_step.oplora_in(inputs, "lean"),
    LEAN_UNIFORM: lambda inputs: bench_step.oplora_in(inputs, "lean", start="uniform"),
    EXACT: lambda inputs: bench_step.oplora_in(inputs, "exact"),
    EAGER: bench_step.eager_fused,
    LORA: bench_step.lora_fused,
}
OURS = (AUTO, KEPT, LEAN, LEAN_UNIFORM, EXACT)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def state_bytes(name: str, size: Size) -> int:
    """What a contender holds beside the factors, at the least."""
    N = sum(size.factor_sizes)
    if name in (KEPT, LEAN, LEAN_UNIFORM):
        return (20 if name == KEPT else 16) * N
    if name == AUTO:
        return 8 * N
    return {EXACT: 12, EAGER: 16, LORA: 8}[name] * (N if name == LORA else N * (size.hidden_width + 1))


def bytes_moved(name: str, size: Size, live: float) -> int | None:
    """What a step has to read and write (docs/cuda.md); live: the share of columns that move."""
    N, H = sum(size.factor_sizes), size.hidden_width
    if name in (LEAN, LEAN_UNIFORM):
        return 64 * N
    if name == KEPT:
        return 68 * N
    if name == AUTO:  # g is measured, and of B what else tells of the rate
        return 32 * N + 12 * size.r * sum(out_features for _, out_features in size.layers)
    if name == EXACT:
        return int(N * (4 + (4 * H * live + 4) + 24 * (H * live + 1) + 8))
    return 28 * N if name == LORA else None


def free_bytes(device: str) -> int:
    return int(torch.cuda.mem_get_info()[0]) if device != "cpu" else 2**40


# ---- rows ----


def bandwidth_row(device: str, rounds: int) -> Row:
    """GB/s of torch's copy: bytes read and written."""
    numbers = COPY_BYTES // 4 if device != "cpu" else 2**16
    x, y = (torch.ones(numbers, device=device) for _ in range(2))

    def copy() -> None:
        y.copy_(x)
        wait(device)

    seconds = harness.in_turns({"copy": Contender(copy)}, rounds)["copy"]
    rate = 8 * numbers / harness.quantiles(seconds)[1] / 1e9
    return {"kind": "bandwidth", "copy_gbps": rate, **harness.time_columns(seconds)}


def contender_of(method: bench_step.Method, device: str) -> Contender:
    """A micro-batch's gradients, the step, and what it takes to begin the next."""
    whole = bench_step.full_step(method, 1)

    def run() -> None:
        whole.run()
        wait(device)

    return Contender(run, whole.before)


def step_alone(method: LoRA, device: str) -> Contender:
    def run() -> None:
        method.optimizer.step()
        wait(device)

    return Contender(run)


def captured_step(method: LoRA) -> Contender:
    """The step as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        method.optimizer.step()

    def run() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return Contender(run)


def host_ms(method: LoRA, device: str) -> float:
    """How long step() keeps the host."""
    times = []
    for _ in range(10):
        wait(device)
        begin = time.perf_counter()
        method.optimizer.step()
        times.append(1e3 * (time.perf_counter() - begin))
    wait(device)
    return harness.quantiles(times)[1]


def peak_row(name: str, size: Size, device: str) -> Row:
    """The device's memory above what model, factors and gradients take, at its highest in three steps."""
    inputs = Inputs(size, device)
    if device == "cpu":
        return {"kind": "memory", "contender": name, "peak_mb": None}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = bench_step.full_step(METHODS[name](inputs), 1)
    for _ in range(3):
        step.before()
        step.run()
    wait(device)
    return {"kind": "memory", "contender": name, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_rows(names: list[str], size: Size, device: str, rounds: int, copy_gbps: float) -> Iterator[Row]:
    methods = {name: METHODS[name](Inputs(size, device)) for name in names}
    seconds = harness.in_turns({name: contender_of(m, device) for name, m in methods.items()}, rounds, limit_s=60)
    for name in names:
        over = LORA if name != LORA else None
        ratio = harness.ratio_columns(seconds[name], seconds[over]) if over in seconds else {}
        yield {"kind": "step with gradients", "contender": name, **harness.time_columns(seconds[name]), **ratio}
    alone: dict[str, Contender] = {}
    for name in names:
        method = methods[name]
        if isinstance(method, LoRA):
            method.micro_batch()
            method.optimizer.step()
            alone[name] = step_alone(method, device)
            yield {"kind": "host", "contender": name, "host_ms": host_ms(method, device)}
    if device != "cpu":
        alone |= {f"{name}, captured": captured_step(methods[name]) for name in names if name in OURS}
    for name, turns in harness.in_turns(alone, rounds, limit_s=60).items():
        method = methods[name.removesuffix(", captured")]
        live = bench_step.live_fraction(method.optimizer) if name.startswith(EXACT) else 0.0
        moved = bytes_moved(name.removesuffix(", captured"), size, live)
        gbps = moved / harness.quantiles(turns)[1] / 1e9 if moved else None
        columns = {"bytes": moved, "gbps": gbps, "of_copy": gbps / copy_gbps if gbps else None, "live": live}
        yield {"kind": "step", "contender": name, **harness.time_columns(turns), **columns}


def rows_of(size: Size, device: str, rounds: int, copy_gbps: float) -> Iterator[Row]:
    """First all contenders that fit beside each other, in turns; then the memory of each."""
    fitting: list[str] = []
    room = free_bytes(device)
    for name in sorted(METHODS, key=lambda name: state_bytes(name, size)):
        needed = state_bytes(name, size) + 3 * 4 * sum(size.factor_sizes)
        if needed > 0.9 * room:
            yield {"kind": "left out", "contender": name, "needs_mb": needed / 1e6, "free_mb": room / 1e6}
            continue
        room -= needed
        fitting.append(name)
    yield from step_rows(fitting, size, device, rounds, copy_gbps)
    for name in fitting:
        release()
        yield peak_row(name, size, device)
    release()


def environment(device: str) -> Row:
    return {**harness.environment(), "device": torch.cuda.get_device_name() if device != "cpu" else "none"}


def main(arguments: list[str] | None = None, print_row: Callable[[Row], object] = print) -> None:
    parser = harness.Command(__doc__, RESULT, "a toy size")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with --quick")
    options = parser.options(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch sees no CUDA GPU; nothing was measured and nothing written.")
    sizes = bench_step.QUICK if options.quick else {name: SIZES[name] for name in options.sizes}
    rounds = 3 if options.quick else options.rounds
    about = {"benchmark": "bench_gpu", **environment(options.device)}
    bandwidth = bandwidth_row(options.device, rounds)
    rows = [{**about, **bandwidth}]
    release()
    for size in sizes.values():
        for row in rows_of(size, options.device, rounds, bandwidth["copy_gbps"]):
            rows.append({**about, **size.columns(), **row})
            print_row({key: row[key] for key in row if row[key] is not None})
            harness.write_rows(options.output, rows)


if __name__ == "__main__":
    main()
