"""What a whole training step costs on a GPU, and what memory it takes: forward, backward and the optimizer.

    python benchmarks/bench_training.py            a LLaMA of 1.2 billion random weights, to results/bench_training.json
    python benchmarks/bench_training.py --quick --device cpu --output /tmp/training.json

The base is bfloat16, r = 16 on all linear layers, factors in float32 as PEFT makes them, batches of 4 x 1024 tokens,
gradient checkpointing. Every contender adapts the same base, one after the other, since two do not fit beside each
other; plain LoRA runs first and last, and the two tell how much the machine drifts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from bench_step import trainable
from harness import Row
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

import oplora

RESULT = Path(__file__).parent / "results" / "bench_training.json"
LR = 1e-4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    name: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    r: int = 16

    def make(self, device: str) -> nn.Module:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
        )
        with torch.device(device):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()  # type: ignore[no-any-return]


LLAMA = Size("LLaMA, 1.2 billion", 2048, 5632, 22, 32000, 4, 1024)
QUICK = Size("toy", 64, 96, 2, 128, 2, 16)

Make = Callable[[nn.Module], Any]


def eight_bits(model: nn.Module) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(trainable(model), lr=LR)


LORA = "plain LoRA, AdamW fused"
CONTENDERS: dict[str, Make] = {
    LORA: lambda model: AdamW(trainable(model), lr=LR, fused=True),
    "plain LoRA, bitsandbytes AdamW8bit": eight_bits,
    "oplora auto": oplora.AdamW,
    "oplora lean": lambda model: oplora.AdamW(model, preset="flat", lr=LR),
    "oplora exact": lambda model: oplora.AdamW(model, preset="flat", lr=LR, state="exact"),
    "OP-LoRA the eager way, AdamW fused": lambda model: oplora.create_oplora_optimizer(
        model, AdamW, lr=LR, preset="flat", fused=True
    ),
}
AGAIN = f"{LORA}, again"


def measure(base: nn.Module, size: Size, make: Make, device: str, steps: int) -> Row:
    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    config = LoraConfig(r=size.r, lora_alpha=size.r, target_modules=LINEAR)
    model = get_peft_model(base, config)  # type: ignore[arg-type]
    model.enable_input_require_grads()
    try:
        optimizer = make(model)
        batches = [torch.randint(size.vocabulary, (size.batch, size.length), device=device) for _ in range(4)]
        whole, alone, host = [], [], []
        for step in range(3 + steps):  # three warm up, and make the optimizer's state
            seconds = one_step(model, optimizer, batches[step % 4], on_gpu)
            for times, some in zip((whole, alone, host), seconds, strict=True):
                times.append(some)
        entries = sum(p.numel() for p in trainable(model))
        return {
            "entries": entries,
            **harness.time_columns(whole[3:]),
            **harness.time_columns(alone[3:], "step_"),
            **harness.time_columns(host[3:], "host_"),
            "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
        }
    finally:
        model.unload()


def one_step(model: nn.Module, optimizer: Any, ids: Tensor, on_gpu: bool) -> tuple[float, float, float]:
    """Seconds of all of it, of step() until the device is done, and of step() as the host sees it."""

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    model(input_ids=ids, labels=ids).loss.backward()
    middle = now()
    optimizer.step()
    returned = time.perf_counter()
    end = now()
    optimizer.zero_grad()
    return now() - begin, end - middle, returned - middle


def main(arguments: list[str] | None = None, print_row: Callable[[Row], object] = print) -> None:
    parser = harness.Command(__doc__, RESULT, "a toy")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda", help="cpu tries the script out, with --quick")
    options = parser.options(arguments)
    on_gpu = options.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("bench_training: torch sees no CUDA GPU; nothing was measured and nothing written.")
    size = QUICK if options.quick else LLAMA
    torch.manual_seed(0)
    base = size.make(options.device)
    about = {
        "benchmark": "bench_training",
        **harness.environment(),
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "dtype": "bfloat16",
        "size": size.name,
        "base_parameters": sum(p.numel() for p in base.parameters()),
        "batch": size.batch,
        "length": size.length,
        "r": size.r,
    }
    rows: list[Row] = []
    for name, make in {**CONTENDERS, AGAIN: CONTENDERS[LORA]}.items():
        try:
            row = measure(base, size, make, options.device, options.steps)
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            row = {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        rows.append({**about, "contender": name, **row})
        print_row({"contender": name, **row})
        harness.write_rows(options.output, rows)


if __name__ == "__main__":
    main()
