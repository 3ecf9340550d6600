"""OP-LoRA as autograd runs it, with what the package leaves out because nobody should train that way: for ablations.

    h = ReLU(W1 z + c1),  [A | B] = W2 h + c2,  all five stepped by any torch optimizer, from A's and B's gradients

To first order in the rate an SGD step moves v = [A | B] by (arXiv 2412.10362, section 3.2)

    -lr ||h||^2 g   through W2: a learning rate that is trained      -lr J J^T g   through h: a line search

and with one of the two switched off c2 takes back, after every step, what that one has done to v; W2 and h still move,
so that the other sees the same generator.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import oplora


def pairs(model: nn.Module) -> list[list[nn.Parameter]]:
    """A (r, in) and B (out, r) of every layer."""
    parameters = dict(model.named_parameters())
    return [
        [A, parameters[name.replace(".lora_A.", ".lora_B.")]] for name, A in parameters.items() if ".lora_A." in name
    ]


class Generator(nn.Module):
    """One MLP; its latent is given, so that several layers can share it."""

    def __init__(
        self, shapes: list[torch.Size], random: list[bool], H: int, Z: int, generator: torch.Generator, linear: bool
    ) -> None:
        super().__init__()
        self.shapes, self.linear = shapes, linear
        uniform = lambda *size: 2 * torch.rand(size, generator=generator) - 1  # noqa: E731
        self.W1 = nn.Parameter(uniform(H, Z) / Z**0.5)
        self.c1 = nn.Parameter(torch.zeros(H))
        rows = [
            uniform(shape.numel(), H) / H**0.5 if starts_random else torch.zeros(shape.numel(), H)
            for shape, starts_random in zip(shapes, random, strict=True)
        ]
        self.W2 = nn.Parameter(torch.cat(rows))
        self.c2 = nn.Parameter(torch.zeros(len(self.W2)))

    def hidden(self, z: Tensor) -> Tensor:
        h = self.W1 @ z + self.c1
        return h if self.linear else h.relu()

    def forward(self, z: Tensor) -> Tensor:
        if self.linear:
            return self.W2 @ self.hidden(z) + self.c2
        return oplora.generate(z, self.W1, self.c1, self.W2, self.c2)

    def cut(self, v: Tensor, shapes: Iterable[torch.Size]) -> list[Tensor]:
        """v into the tensors of one layer, of which a shared generator predicts as much as they need."""
        pieces = v.split([shape.numel() for shape in self.shapes])
        return [
            piece.view(whole)[tuple(slice(n) for n in shape)]
            for piece, whole, shape in zip(pieces, self.shapes, shapes, strict=True)
        ]


class EagerOPLoRA(Optimizer):
    """torch.optim.Optimizer of a model with LoRA adapters; every other trainable parameter stays as it is.

    share: "layer" (a generator a layer), "factor" (one for A and one for B), "model" (one for all layers, each with
        a latent of its own).
    linear: no ReLU.
    frozen: of z, W1, c1, W2, c2 what is not trained.
    only: None, "trainable rate" or "line search".
    keep: A and B keep the start that they have, and the generator adds to it (from 0 on).
    zero_start: W2 starts at 0 also in the rows that predict A; by default where A is kept, as in oplora.AdamW.
    hidden_lr_ratio: the rate of z, W1 and c1 is lr times this; or hidden_lr, whatever lr is.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        seed: int = 0,
        *,
        optimizer: Callable[..., Optimizer] = AdamW,
        hidden_width: int = 32,
        latent_width: int = 128,
        latent_std: float = 0.01,
        share: str = "layer",
        linear: bool = False,
        frozen: tuple[str, ...] = (),
        only: str | None = None,
        keep: bool = False,
        zero_start: bool | None = None,
        hidden_lr_ratio: float = 1.0,
        hidden_lr: float | None = None,
        **settings: Any,
    ) -> None:
        zero_start = keep if zero_start is None else zero_start
        rng = torch.Generator().manual_seed(seed)
        self.only = only
        self.jobs: list[tuple[Generator, nn.Parameter, list[nn.Parameter]]] = []
        layers = pairs(model)

        def new(tensors: list[list[nn.Parameter]], random: list[bool]) -> Generator:
            alike = zip(*tensors, strict=True)
            shapes = [torch.Size(map(max, zip(*(p.shape for p in some), strict=True))) for some in alike]
            random = [r and not zero_start for r in random]
            return Generator(shapes, random, hidden_width, latent_width, rng, linear)

        def latent() -> nn.Parameter:
            return nn.Parameter(latent_std * torch.randn(latent_width, generator=rng))

        shared = new(layers, [True, False]) if share == "model" else None
        for tensors in layers:
            if share == "factor":
                for tensor, random in zip(tensors, (True, False), strict=True):
                    self.jobs.append((new([[tensor]], [random]), latent(), [tensor]))
            else:
                self.jobs.append((shared or new([tensors], [True, False]), latent(), tensors))
        parameters = {"z": [z for _, z, _ in self.jobs]}
        generators = list(dict.fromkeys(generator for generator, _, _ in self.jobs))
        for name in ("W1", "c1", "W2", "c2"):
            parameters[name] = [getattr(generator, name) for generator in generators]
        for name in frozen:
            for parameter in parameters[name]:
                parameter.requires_grad_(False)
        groups = []
        of_hidden = hidden_lr_ratio * lr if hidden_lr is None else hidden_lr
        for names, rate in ((("z", "W1", "c1"), of_hidden), (("W2", "c2"), lr)):
            if some := [p for name in names for p in parameters[name] if p.requires_grad]:
                groups.append({"params": some, "lr": rate})
        self.inner = optimizer(groups, lr=lr, **settings)
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.factors = [p for tensors in layers for p in tensors]
        with torch.no_grad():
            pieces = [piece for job in self.jobs for piece in self.generated(*job)]
            starts = zip(self.factors, pieces, strict=True)
            self.bases = [p - piece if keep else torch.zeros_like(p) for p, piece in starts]
        self.write()

    def generated(self, generator: Generator, z: Tensor, tensors: list[nn.Parameter]) -> list[Tensor]:
        return generator.cut(generator(z), [p.shape for p in tensors])

    def write(self) -> None:
        with torch.no_grad():
            pieces = [piece for job in self.jobs for piece in self.generated(*job)]
            for tensor, base, piece in zip(self.factors, self.bases, pieces, strict=True):
                tensor.copy_(base + piece)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in self.factors):
            raise oplora.errors.OPLoRARuntimeError("a gradient is not finite")
        self.inner.zero_grad()
        with torch.enable_grad():
            for job in self.jobs:
                torch.autograd.backward(self.generated(*job), [p.grad for p in job[2]])
        before = []
        if self.only:
            before = [(g.hidden(z).detach(), g.W2.detach().clone(), g.c2.detach().clone()) for g, z, _ in self.jobs]
        self.inner.step()
        with torch.no_grad():
            for (generator, z, _), (h, W2, c2) in zip(self.jobs, before, strict=False):
                moved = generator.hidden(z)
                wanted = generator.W2 @ h + generator.c2 if self.only == "trainable rate" else W2 @ moved + c2
                generator.c2.copy_(wanted - generator.W2 @ moved)
        self.write()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.factors:
            parameter.grad = None
