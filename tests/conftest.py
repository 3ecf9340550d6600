"""What many tests share: small models with adapters, the paper's generator written for autograd, one training loop."""

import gc
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from captured import Device
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from oplora import engines
from oplora.optim import adamw, refusals

ROOT = Path(__file__).parents[1]
HOST = torch.device("cpu:0")  # the CPU when it is not taken for a GPU


# Files that take longest begin, so that no worker is left alone with one at the end.
LONG = (
    *("test_fsdp2", "test_package", "test_example_finetune_diffusion", "test_killed_saving", "test_benchmarks"),
    *("test_distributed", "test_transformers_and_trl", "test_notebook", "test_example_finetune_vlm"),
    *("test_example_finetune_llm", "test_exact_trajectory", "test_export", "test_lean_trajectory"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """What imports made stays to the end. Looked through at each collection it took 29 of test_capture's 36 seconds."""
    gc.collect()
    gc.freeze()


def options_of(kind: str) -> dict[str, str]:
    """What makes oplora.AdamW keep its generators so: in a state, or with preset "auto"."""
    return {"preset": "auto"} if kind == "auto" else {"state": kind}


class EagerGenerator(nn.Module):
    """A generator as the paper describes it: autograd makes the whole of dW2, and any torch optimizer steps it."""

    def __init__(self, parameters: dict[str, Tensor], shapes: Sequence[torch.Size]) -> None:
        super().__init__()
        for name in ("z", "W1", "c1", "W2", "c2"):
            setattr(self, name, nn.Parameter(parameters[name].detach().clone(memory_format=torch.contiguous_format)))
        self.shapes = list(shapes)

    def forward(self) -> list[Tensor]:
        v = self.W2 @ torch.relu(self.W1 @ self.z + self.c1) + self.c2
        pieces = v.split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


class Net(nn.Module):
    """Two linear layers of odd sizes with a nonlinearity between them."""

    def __init__(self, sizes: Sequence[int] = (13, 21, 5)) -> None:
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.second = nn.Linear(sizes[1], sizes[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def make_model(dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    """Net with LoRA on both layers, always from the same seed."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"], **config}
    return get_peft_model(Net().to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def batches(steps: int, dtype: torch.dtype, sizes: tuple[int, int] = (13, 5)) -> Iterator[tuple[Tensor, Tensor]]:
    """The same random regression data for every dtype."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        pair = [torch.randn(8, size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
        yield pair[0], pair[1]


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The loss of each step."""
    losses = []
    for x, y in pairs:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, dtype: torch.dtype = torch.float32
) -> list[float]:
    return train_on(model, optimizer, batches(steps, dtype))


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(1234)
    environment = dict(os.environ)
    yield
    os.environ.clear()  # PEFT's BOFT sets CC and CXX, with which nothing in C++ links any more
    os.environ.update(environment)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_on_cpu() -> Path:
    """The CUDA library whose kernels the CPU executes."""
    library = ROOT / "build/cuda/liboplora_cuda_on_cpu.so"
    made = subprocess.run(["make", str(library.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library


@pytest.fixture
def as_device(cuda_on_cpu: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """From then on factors on the CPU are treated as on a GPU, or no longer."""

    def set_device(on: bool) -> None:
        for module in (engines, refusals):
            monkeypatch.setattr(module, "runs_on_device", lambda device: on and device != HOST)
        torch.set_flush_denormal(on)  # as the kernels do; the core has its own mode whatever the process has

    monkeypatch.setenv("OPLORA_CUDA_LIBRARY", str(cuda_on_cpu))
    set_device(True)
    yield set_device
    torch.set_flush_denormal(False)


@pytest.fixture
def device(as_device: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The CPU taken for a GPU whose steps can be captured."""
    with Device() as mode:
        for module in (engines.device, adamw):
            monkeypatch.setattr(module, "is_capturing", lambda device: mode.graph is not None)
        # a replay tells no version, and fingerprints do not tell on a GPU
        monkeypatch.setattr(engines.engine, "marks", lambda tensors: [(t.data_ptr(), t._version) for t in tensors])
        yield mode


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
