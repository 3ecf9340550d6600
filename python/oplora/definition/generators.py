"""The general path: the generators as an nn.Module of ordinary Parameters, on any device.

It forms the gradient of W2 in full, as autograd would: a copy of W2's size that oplora.AdamW does without.
generator_optimizer.py has the optimizer over it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..adapters import find_layers, refuse_to_step
from ..engines import Factors, Settings, keep_starts, warn_adopted
from ..engines.memory import allocate
from ..engines.settings import count_parameters, start_parameters, views
from ..errors import OPLoRAValueError
from ..kernels import has_kernels

__all__ = ["Generator", "Generators"]


class Generator(nn.Module):
    """One layer's generator: z (Z,), W1 (H, Z), c1 (H,), W2 (N, H) kept as H columns, c2 (N,)."""

    z: nn.Parameter
    W1: nn.Parameter
    c1: nn.Parameter
    W2: nn.Parameter
    c2: nn.Parameter

    def __init__(self, factors: Factors, settings: Settings) -> None:
        super().__init__()
        self.factors = factors
        self.report: dict[str, Tensor] = {}  # of the last backward(), for stats
        flat = allocate(count_parameters(factors, settings), factors.dtype, huge_pages=True)
        start_parameters(flat, factors, settings)
        device = factors.layer.parameters()[0].device
        for name, view in views(flat, settings.hidden_width, settings.latent_width).items():
            setattr(self, name, nn.Parameter(view.to(device).clone()))

    def generate(self) -> list[Tensor]:
        """v, a piece for each factor, without their bases."""
        generate = reference.generate if self._lacks_kernels() else ops.generate
        v = generate(self.z, self.W1, self.c1, self.W2, self.c2)
        return list(v.detach().split(self.factors.sizes))

    def refresh(self) -> None:
        parameters, v = self.factors.layer.parameters(), self.generate()
        is_trained = any(parameter.requires_grad for parameter in parameters)
        for f, parameter in enumerate(parameters):
            if is_trained and not parameter.requires_grad:  # frozen since, beside others: no torch optimizer moves it
                self.factors.keep_value(f, parameter, v[f])
        for parameter, value in zip(parameters, self.factors.values(v), strict=True):
            if parameter.requires_grad or not is_trained:
                parameter.detach().copy_(value)
        self.factors.remember_written(parameters)

    def push(self) -> None:
        """Adds the factors' gradients, if there are any, to this module's."""
        parameters = self.factors.layer.parameters()
        gradients = self.factors.gradients(parameters)
        if gradients is None:
            return
        g = torch.cat([gradient.flatten() for gradient in gradients])
        plain = self._lacks_kernels()
        generate_backward = reference.generate_backward if plain else torch.ops.oplora.generate_backward
        grad_z, grad_W1, grad_c1, h = generate_backward(g, self.z, self.W1, self.c1, self.W2)
        grads = {"z": grad_z, "W1": grad_W1, "c1": grad_c1, "W2": torch.outer(h, g).t(), "c2": g}
        for name, grad in grads.items():
            parameter = getattr(self, name)
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self.report = {"h": h, "g": g, "hidden": torch.cat([grad_z, grad_W1.flatten(), grad_c1])}

    def follow_move(self) -> None:
        """The model was moved (model.to(device), accelerator.prepare): the generator goes where its factors are now."""
        device = self.factors.layer.parameters()[0].device
        if self.factors.placed != device:
            self.to(device)
            self.factors.move(device, device)

    def _lacks_kernels(self) -> bool:
        """On a GPU without the CUDA library plain PyTorch computes, as on devices that have no kernels at all."""
        return self.W2.device.type == "cuda" and not has_kernels()

    def get_extra_state(self) -> dict[str, Any]:
        return self.factors.state_dict()

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.factors.check_state(state)
        self.factors.load_state(state)


class Generators(nn.Module):
    """The generators behind a model's LoRA factors, with their parameters as ordinary Parameters.

    Parameter names are the layer's name and the adapter's, then .z (Z,), .W1 (H, Z), .c1 (H,), .W2 (N, H), .c2 (N,).
    The start is the one of oplora.AdamW with the same arguments, and so are the trajectories under torch.optim.AdamW.
    Making it writes the start into the factors (init="paper") or leaves them as they are (init="keep").

        generators = oplora.Generators(model)
        optimizer = torch.optim.SGD(generators.parameters(), lr=0.1)
        loss.backward()            # fills the gradients of A and B
        generators.backward()      # moves them into the generators' parameters
        optimizer.step()
        generators.refresh()       # writes the next A and B

    Args and errors: as of oplora.AdamW. The module is no part of the model, so nothing of it is saved with the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        hidden_width: int = 32,
        latent_width: int = 128,
        latent_std: float = 0.01,
        init: str = "paper",
        adapter_name: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        settings = Settings(hidden_width, latent_width, latent_std, seed)
        factors = [Factors.of(layer, i) for i, layer in enumerate(find_layers(model, adapter_name))]
        keeps = keep_starts(factors, init)
        for tie, keep in zip(factors, keeps, strict=True):
            generator = Generator(tie, settings)
            self._add(tie.layer.name, generator)
            with torch.no_grad():
                tie.begin(generator.generate(), keep)

    def _add(self, name: str, generator: Generator) -> None:
        """Under the layer's dotted name, as nested modules: their names cannot hold dots."""
        parent: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, generator)

    def __iter__(self) -> Iterator[Generator]:
        return (module for module in self.modules() if isinstance(module, Generator))

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises OPLoRAError unless load_state_dict(saved) will go through; changes nothing (torch's would in part)."""
        mine = self.state_dict()
        if missing := sorted(mine.keys() ^ saved.keys()):
            raise OPLoRAValueError(
                f"oplora: the saved generators are of other layers: {missing[0]} is in one of the two only. Build the "
                "model with the adapter of the run that was saved."
            )
        for name, value in mine.items():
            if isinstance(value, Tensor) and getattr(saved[name], "shape", None) != value.shape:
                raise OPLoRAValueError(
                    f"oplora: the saved {name} has shape {tuple(getattr(saved[name], 'shape', ()))}, expected "
                    f"{tuple(value.shape)}. It was saved with another rank, width or model."
                )
        for name, module in self.named_modules():
            if isinstance(module, Generator):
                module.factors.check_state(saved[f"{name}._extra_state"])

    @torch.no_grad()
    def backward(self) -> None:
        """Adds the gradients of all factors, pushed through their generators, to the generators' parameters.

        The factors' own gradients are used up: they become None, so that none is counted twice.

        Raises:
            OPLoRAError: a layer is merged or disabled.
        """
        self.refuse_to_step()
        self.push()
        for generator in self:
            layer = generator.factors.layer
            for parameter in layer.with_twins(layer.parameters()):
                parameter.grad = None

    def refuse_to_step(self) -> None:
        """Raises where a step would go wrong in a layer with gradients, in its factors or in its generator."""
        layers = [generator.factors.layer for generator in self]
        refuse_to_step(layers, [layer.parameters() for layer in layers])
        for generator, layer in zip(self, layers, strict=True):
            if generator.W2.grad is not None:
                layer.refuse_to_step(layer.parameters())

    @torch.no_grad()
    def push(self) -> None:
        """backward() that leaves the factors' gradients where they are, and asks nothing."""
        adopted = []
        for generator in self:
            generator.follow_move()
            tie = generator.factors
            if tie.adopt_edits(tie.layer.parameters(), generator.generate):
                adopted.append(tie.layer.name)
            generator.push()
        if adopted:
            warn_adopted(adopted)

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes every factor from its generator, in place."""
        for generator in self:
            generator.refresh()
