"""What one optimizer step costs: time and memory of everything outside the model's own forward and backward.

    python benchmarks/bench_step.py                     all sizes, to benchmarks/results/bench_step.json
    python benchmarks/bench_step.py --sizes width1024   one of them
    python benchmarks/bench_step.py --quick --output /tmp/step.json

Three ways to train the factors A and B of a model's LoRA layers from their gradients g of each micro-batch:

    oplora   g adds up in A.grad and B.grad; oplora.AdamW steps the generators and writes the next A and B
    eager    OP-LoRA as its paper runs it: each layer's generator is an nn.Sequential, evaluated in every
             forward, with its own backward in every backward (so once a micro-batch, and with all of dW2),
             and torch.optim.AdamW on its parameters
    lora     plain LoRA: g adds up in A.grad and B.grad; torch.optim.AdamW

README.md explains the columns.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Contender, PeakMemory, Row
from torch import Tensor, nn
from torch.optim import Optimizer

import oplora

LATENT_WIDTH = 128
LR = 1e-6  # so small that no unit crosses its ReLU on the way: the work of a step is the same in every round
MICRO_BATCHES = (1, 8)
RESULT = Path(__file__).parent / "results" / "bench_step.json"


# ---- what is adapted ----


@dataclass(frozen=True)
class Size:
    """The adapted Linear layers of a model, (in_features, out_features) each, their rank, and H."""

    title: str
    layers: tuple[tuple[int, int], ...]
    r: int
    hidden_width: int = 32

    @property
    def factor_sizes(self) -> list[int]:
        """N of each layer."""
        return [self.r * (in_features + out_features) for in_features, out_features in self.layers]

    @property
    def w2_numbers(self) -> int:
        return sum(self.factor_sizes) * self.hidden_width

    def columns(self) -> Row:
        return {
            "size": self.title,
            "layers": len(self.layers),
            "r": self.r,
            "hidden_width": self.hidden_width,
            "latent_width": LATENT_WIDTH,
            "factor_numbers": sum(self.factor_sizes),
            "w2_numbers": self.w2_numbers,
        }


SMOLLM2_135M = 30 * ((576, 576), (576, 192), (576, 192), (576, 576))  # q, k, v, o
SIZES = {
    "width1024": Size("8 layers of width 1024, r = 16", 8 * ((1024, 1024),), 16),
    "smollm2-r8": Size("SmolLM2-135M (q, k, v, o), r = 8", SMOLLM2_135M, 8),
    "smollm2-r32": Size("SmolLM2-135M (q, k, v, o), r = 32", SMOLLM2_135M, 32),
    "w2-200m": Size("24 layers of width 2048, r = 64", 24 * ((2048, 2048),), 64),
}
QUICK = {"quick": Size("2 layers of width 64, r = 4", 2 * ((64, 64),), 4)}


class Linears(nn.Module):
    """The layers of a Size. Their frozen weights are views of one zero, and take no memory."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_linear_without_memory(*shape) for shape in size.layers)


def _linear_without_memory(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.zeros(()).expand(out_features, in_features), requires_grad=False)
    return linear


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class Inputs:
    """What a contender finds: a PEFT model, and for each layer g (N,), the same in every micro-batch."""

    def __init__(self, size: Size, device: str = "cpu") -> None:
        from peft import LoraConfig, get_peft_model

        generator = torch.Generator().manual_seed(0)
        self.size = size
        with torch.device(device):
            self.model = get_peft_model(Linears(size), LoraConfig(r=size.r, target_modules=r"layers\.\d+"))
        numbers = (torch.randn(N, generator=generator, device="cpu") for N in size.factor_sizes)
        self.gradients = [1e-3 * g.to(device) for g in numbers]


# ---- the contenders ----


class LoRA:
    """A and B as leaves of the model, and the optimizer that steps them."""

    def __init__(self, inputs: Inputs, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.factors = trainable(inputs.model)  # A, B, A, B, ...
        self.gradients = [
            piece.view(factor.shape)
            for g, A, B in zip(inputs.gradients, self.factors[::2], self.factors[1::2], strict=True)
            for piece, factor in zip(g.split([A.numel(), B.numel()]), (A, B), strict=True)
        ]

    def micro_batch(self) -> None:
        """What autograd does with the gradient of a leaf: keep it (a copy here, as it is wanted again), or add
        it to the one that is there, tensor by tensor and in C++, as _foreach_add_ does on a CPU. Not by
        torch.autograd.backward: checking 240 roots in Python takes longer."""
        with torch.no_grad():
            if self.factors[0].grad is None:
                for factor, g in zip(self.factors, self.gradients, strict=True):
                    factor.grad = g.clone()
            else:
                torch._foreach_add_([factor.grad for factor in self.factors], self.gradients)

    def bytes_held(self) -> int:
        """What lives beside the model, to which A and B belong, while the optimizer steps."""
        gradients = [p.grad for p in self.factors]
        return harness.bytes_held((gradients, self.optimizer.state_dict()), by_others=self.factors)


class Eager:
    """A generator a layer, run by autograd."""

    def __init__(self, inputs: Inputs, **implementation: bool) -> None:
        H, Z, sizes = inputs.size.hidden_width, LATENT_WIDTH, inputs.size.factor_sizes
        with inputs.gradients[0].device:
            self.latents = nn.ParameterList(0.01 * torch.randn(1, Z) for _ in sizes)
            self.generators = nn.ModuleList(nn.Sequential(nn.Linear(Z, H), nn.ReLU(), nn.Linear(H, N)) for N in sizes)
        self.parameters = [*self.latents, *self.generators.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, **implementation)
        self.gradients = [g.view(1, -1) for g in inputs.gradients]

    def micro_batch(self) -> None:
        """The factors as the forward makes them, then their gradients as the backward brings them. Left out,
        in this contender's favour: cutting v into A and B, and joining their gradients."""
        factors = [generator(z) for generator, z in zip(self.generators, self.latents, strict=True)]
        torch.autograd.backward(factors, self.gradients)

    def bytes_held(self) -> int:
        gradients = [p.grad for p in self.parameters]
        return harness.bytes_held((self.parameters, gradients, self.optimizer.state_dict()))


Method = LoRA | Eager
Methods = dict[str, Callable[[Inputs], Method]]


def oplora_in(inputs: Inputs, state: str, **start: str) -> LoRA:
    """oplora.AdamW with a state; of choice its start, which is the state's own otherwise, and init."""
    widths = {"hidden_width": inputs.size.hidden_width, "latent_width": LATENT_WIDTH}
    return LoRA(inputs, oplora.AdamW(inputs.model, lr=LR, state=state, **widths, **start))


def oplora_exact(inputs: Inputs) -> LoRA:
    return oplora_in(inputs, "exact")


def oplora_all_units(inputs: Inputs) -> LoRA:
    """The most a step can cost: with c1 = 1 every unit is on, so every column of W2 has moments."""
    contender = oplora_exact(inputs)
    for tensors in generators_of(contender.optimizer, "parameters"):
        tensors["c1"].fill_(1)
    return contender


def eager_fused(inputs: Inputs) -> Eager:
    return Eager(inputs, fused=True)


def eager_foreach(inputs: Inputs) -> Eager:
    return Eager(inputs, foreach=True)


def lora_fused(inputs: Inputs) -> LoRA:
    return LoRA(inputs, torch.optim.AdamW(trainable(inputs.model), lr=LR, fused=True))


def lora_default(inputs: Inputs) -> LoRA:
    return LoRA(inputs, torch.optim.AdamW(trainable(inputs.model), lr=LR))


OURS = "oplora exact"
ALL_UNITS = "oplora exact, all units on"
EAGER: Methods = {
    "eager, AdamW fused": eager_fused,
    "eager, AdamW foreach": eager_foreach,
}
RIVALS: Methods = {
    ALL_UNITS: oplora_all_units,
    **EAGER,
    "lora, AdamW fused": lora_fused,
    "lora, AdamW default": lora_default,
}
METHODS: Methods = {OURS: oplora_exact, **RIVALS}


def generators_of(optimizer: Optimizer, key: str) -> Iterator[dict[str, Tensor]]:
    """z, W1, c1, W2, c2 of every generator in oplora's optimizer, of its "parameters" or of a moment."""
    from oplora.engines.settings import views

    for layer in optimizer._stepper.states:
        settings = layer.engine.state.settings
        yield views(layer.pieces()[key], settings.hidden_width, settings.latent_width)


def live_fraction(optimizer: Optimizer) -> float:
    """The share of W2 in columns that have moments. The others are not touched by a step."""
    live = total = 0
    for moment in generators_of(optimizer, "exp_avg_sq"):
        N, H = moment["W2"].shape
        live += N * int((moment["W2"] != 0).any(dim=0).sum())
        total += N * H
    return live / total


# ---- time ----


def full_step(method: Method, micro_batches: int) -> Contender:
    def run() -> None:
        for _ in range(micro_batches):
            method.micro_batch()
        method.optimizer.step()
        method.optimizer.zero_grad()

    return Contender(run)


def time_pairs(
    size: Size,
    rounds: int,
    rivals: Methods,
    ours_name: str = OURS,
    ours_build: Callable[[Inputs], Method] = oplora_exact,
) -> Iterator[Row]:
    """Each rival in turns with ours, a pair at a time: only two states are in memory."""
    ours_seconds: dict[int, list[float]] = {n: [] for n in MICRO_BATCHES}
    for name, build in rivals.items():
        ours, rival = ours_build(Inputs(size)), build(Inputs(size))
        for n in MICRO_BATCHES:
            seconds = harness.in_turns({ours_name: full_step(ours, n), name: full_step(rival, n)}, rounds)
            ours_seconds[n] += seconds[ours_name]
            yield step_row(name, n, seconds[name], seconds[ours_name])
        del ours, rival
        harness.release_freed_memory()
    for n in MICRO_BATCHES:
        yield step_row(ours_name, n, ours_seconds[n], ours_seconds[n])


def step_row(contender: str, micro_batches: int, seconds: Sequence[float], ours: Sequence[float]) -> Row:
    return {
        "kind": "step",
        "contender": contender,
        "micro_batches": micro_batches,
        "rounds": len(seconds),
        **harness.time_columns(seconds),
        **harness.time_columns(ours, "oplora_"),
        **harness.ratio_columns(seconds, over=ours),
    }


# ---- memory ----


def measure_memory(build: Callable[[Inputs], Method], size: Size, threads: int) -> Row:
    """For a process of its own: what the contender holds when its optimizer steps, and its peak over three
    steps of two micro-batches, above the model with A and B and the micro-batches' gradients."""
    torch.set_num_threads(threads)
    two_micro_batches(build(Inputs(QUICK["quick"])))  # loads libraries, starts threads
    inputs = Inputs(size)
    with PeakMemory() as peak:
        method = build(inputs)
        for _ in range(3):
            held = two_micro_batches(method)
    return {"held_bytes": held, "peak_bytes": peak.bytes}


def two_micro_batches(method: Method) -> int:
    method.micro_batch()
    method.micro_batch()
    held = method.bytes_held()
    method.optimizer.step()
    method.optimizer.zero_grad()
    return held


def memory_rows(size: Size, methods: Methods) -> Iterator[Row]:
    for name, build in methods.items():
        measured = harness.in_own_process(measure_memory, build, size, torch.get_num_threads())
        yield {"kind": "memory", "contender": name, **measured}


# ---- what bounds oplora's step ----


def bytes_needed(size: Size, live: float) -> float:
    """Read and written by a step: 28 bytes a number in W2's live columns (W2 for dh; W2 and its two moments,
    read and written), 32 a factor entry (its g; c2 and its two moments, read and written; its next value)."""
    return 28 * live * size.w2_numbers + 32 * sum(size.factor_sizes)


def with_gradients(build: Callable[[Inputs], Method], size: Size) -> Optimizer:
    method = build(Inputs(size))
    method.micro_batch()
    return method.optimizer


def roofline(size: Size, rounds: int, array_bytes: int) -> Iterator[Row]:
    """optimizer.step() alone, in turns with what could bound it: the memory's bandwidth, the arithmetic (a
    layer whose state is in the caches), the cost of a call (as many layers, all tiny)."""
    state_bytes = min(2**23, harness.last_level_cache_bytes() // 4)
    in_caches = Size("in the caches", ((1024, 1024),), max(1, state_bytes // (12 * 32 * 2048)))
    tiny, one = (Size("tiny", n * ((8, 8),), 1, size.hidden_width) for n in (len(size.layers), 1))
    cached, call, one_call = (with_gradients(oplora_all_units, small) for small in (in_caches, tiny, one))
    bandwidth = harness.Bandwidth(array_bytes)
    for name, build in ((OURS, oplora_exact), (ALL_UNITS, oplora_all_units)):
        optimizer = with_gradients(build, size)
        contenders = {
            "step": Contender(optimizer.step),
            "cached": Contender(cached.step, before=cached.step),
            "call": Contender(call.step),
            "one call": Contender(one_call.step),
            **bandwidth.contenders(),
        }
        seconds = harness.in_turns(contenders, rounds)
        live = live_fraction(optimizer)
        row = {
            "kind": "roofline",
            "contender": name,
            "rounds": len(seconds["step"]),
            **harness.time_columns(seconds["step"]),
            "live_fraction": live,
            "bytes_needed": bytes_needed(size, live),
            **bandwidth.columns(seconds),
            "cached_gbps": bytes_needed(in_caches, 1) / beside_a_call(seconds["cached"], seconds["one call"]) / 1e9,
            "call_ms": 1e3 * harness.quantiles(seconds["call"])[1],
        }
        yield {**row, **bound_columns(row)}


def beside_a_call(cached: Sequence[float], tiny: Sequence[float]) -> float:
    """Seconds of layers in the caches without what as many tiny ones take, which is no arithmetic."""
    seconds, call = (harness.quantiles(times)[1] for times in (cached, tiny))
    return max(seconds - call, seconds / 10)


def bound_columns(row: Row) -> Row:
    """The memory bounds a step that reaches 70% of its bandwidth; any other the longest of its parts."""
    gbps = row["bytes_needed"] / row["ms"] / 1e6
    times_ms = {
        "memory": row["bytes_needed"] / row["bandwidth_gbps"] / 1e6,
        "arithmetic": row["bytes_needed"] / row["cached_gbps"] / 1e6,
        "calls": row["call_ms"],
    }
    share = gbps / row["bandwidth_gbps"]
    bound = "memory" if share >= 0.7 else max(times_ms, key=times_ms.__getitem__)
    return {"gbps": gbps, "share_of_bandwidth": share, "bound": bound}


# ---- the training step around it ----


def llama(quick: bool) -> nn.Module:
    """A LLaMA of 20 million parameters (quick: 0.1) with PEFT's LoRA of r = 8 on q, k, v, o."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (64, 2, 256) if quick else (384, 8, 8192)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
    )
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=targets))


def forward_backward(model: nn.Module, optimizer: Optimizer, tokens: Tensor) -> Contender:
    """The optimizer's step before each turn is not timed, but what it leaves in the caches counts."""

    def optimize() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contender(lambda: model(input_ids=tokens, labels=tokens).loss.backward(), before=optimize)


def time_training(rounds: int, quick: bool) -> Iterator[Row]:
    """The model's own forward and backward have to cost under oplora.AdamW what they cost plain LoRA."""
    tokens = torch.randint(256, (2, 128), generator=torch.Generator().manual_seed(0))
    ours, plain = llama(quick), llama(quick)
    parameters = sum(p.numel() for p in ours.parameters() if not p.requires_grad)
    seconds = harness.in_turns(
        {
            "ours": forward_backward(ours, oplora.AdamW(ours, lr=LR, state="lean"), tokens),
            "plain": forward_backward(plain, torch.optim.AdamW(trainable(plain), lr=LR), tokens),
        },
        rounds,
    )
    yield {
        "kind": "forward and backward",
        "size": f"LLaMA of {parameters / 1e6:.1f} M parameters, 2 x 128 tokens",
        "contender": OURS,
        "rounds": len(seconds["ours"]),
        **harness.time_columns(seconds["ours"]),
        **harness.time_columns(seconds["plain"], "lora_"),
        **harness.ratio_columns(seconds["ours"], over=seconds["plain"]),
    }


# ---- all of it ----


def measure(sizes: dict[str, Size], rounds: int, quick: bool) -> Iterator[Row]:
    array_bytes = 2**24 if quick else max(2**28, 8 * harness.last_level_cache_bytes())
    allocator = {"allocator": "default"}
    for size in sizes.values():
        for rows in (memory_rows(size, METHODS), time_pairs(size, rounds, RIVALS), roofline(size, rounds, array_bytes)):
            yield from ({**size.columns(), **row, **allocator} for row in rows)
    yield from ({**row, **allocator} for row in time_training(rounds, quick))
    harness.keep_freed_memory()  # once and for all: the eager way as fast as it can be made
    for size in sizes.values():
        for row in time_pairs(size, rounds, EAGER):
            yield {**size.columns(), **row, "allocator": "keeping"}


def line(row: Row) -> str:
    """A row for the terminal."""
    text = f"{row['size']}: {row['kind']}, {row['contender']}: "
    if row["kind"] == "memory":
        return text + f"holds {row['held_bytes'] / 1e6:.1f} MB, peak {row['peak_bytes'] / 1e6:.1f} MB"
    text += f"{row['ms']:.3f} ms ({row['ms_20']:.3f} to {row['ms_80']:.3f})"
    if row["kind"] == "roofline":
        rates = f"{row['gbps']:.1f} of {row['bandwidth_gbps']:.1f} GB/s"
        return text + f", {row['live_fraction']:.0%} live, {rates}, bound: {row['bound']}"
    return text + f", ratio {row['ratio']:.3f} ({row['ratio_20']:.3f} to {row['ratio_80']:.3f})"


def main() -> None:
    parser = harness.Command(__doc__, RESULT, "a toy size, three rounds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.options()
    sizes = QUICK if arguments.quick else {name: SIZES[name] for name in arguments.sizes}
    environment = harness.environment()
    rows: list[Row] = []
    begin = time.perf_counter()
    for row in measure(sizes, 3 if arguments.quick else arguments.rounds, arguments.quick):
        rows.append({"benchmark": "step", **row, **environment})
        print(line(row), flush=True)
        harness.write_rows(arguments.output, rows)
    print(f"{len(rows)} rows in {arguments.output}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
