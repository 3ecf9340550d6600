"""Steps in CUDA graphs, which hold addresses: a replay finds everything where it was (tests/captured.py)."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Device
from conftest import assert_same_bits, factors, make_model, train
from torch import Tensor, nn

import oplora

STATES = ("lean", "exact", None)  # None: of preset "auto"
KINDS = pytest.mark.parametrize("state", STATES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Run:
    """A model whose steps are captured and replayed, or made one after another."""

    def __init__(self, device: Device, captured: bool, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        self.device, self.captured, self.dtype = device, captured, dtype
        model = settings.pop("model", None)
        self.model: nn.Module = make_model(dtype) if model is None else model
        self.optimizer = oplora.AdamW(self.model, lr=1e-2, seed=5, **settings)
        train(self.model, self.optimizer, 2, dtype)

    def push(self, seed: int) -> None:
        """New gradients, at new addresses; the old ones are let go."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = gradient.to(parameter.dtype)

    def capture(self, seed: int, clip: float | None = None) -> Callable[[], None]:
        """A step with the gradients of this seed, at once or replayed."""

        def step() -> None:
            if clip is not None:
                self.optimizer.clip_grad_norm_(clip)
            self.optimizer.step()

        def with_its_gradients() -> None:
            self.push(seed)
            step()

        if not self.captured:
            return with_its_gradients
        self.push(seed)
        with self.device.capture() as graph:
            step()
        return graph.replay

    def eager(self, seed: int) -> None:
        self.push(seed)
        self.optimizer.step()
        gc.collect()

    def result(self) -> dict[str, Tensor]:
        entries = self.optimizer.state_dict()["state"]
        held = {f"{i} {name}": v for i, entry in entries.items() for name, v in entry.items() if isinstance(v, Tensor)}
        return {**factors(self.model), **{name: value.clone() for name, value in held.items()}}


def both(device: Device, story: Callable[[Run], None], **settings: Any) -> None:
    """A story with replays ends with the bits of the one without."""
    ends = []
    for captured in (True, False):
        run = Run(device, captured, **{name: make() if name == "model" else make for name, make in settings.items()})
        story(run)
        ends.append(run.result())
    assert_same_bits(*ends)


@KINDS
@DTYPES
def test_a_replay_is_a_step(device, state, dtype):
    def story(run: Run) -> None:
        step = run.capture(1)
        for _ in range(3):
            step()

    both(device, story, state=state, dtype=dtype)


@KINDS
@DTYPES
def test_a_replay_follows_steps_with_gradients_elsewhere(device, state, dtype):
    def story(run: Run) -> None:
        run.eager(1)
        step = run.capture(2)
        for seed in (3, 4):
            step()
            run.eager(seed)
        step()

    both(device, story, state=state, dtype=dtype)


@KINDS
@DTYPES
def test_graphs_are_replayed_in_any_order(device, state, dtype):
    def story(run: Run) -> None:
        first = run.capture(1)
        second = run.capture(2)
        for step in (second, first, first, second):
            step()

    both(device, story, state=state, dtype=dtype)


@KINDS
def test_graphs_of_the_same_gradients_do_not_rely_on_each_other(device, state):
    """The table of a plan that is made in a capture is there when that graph was replayed, and not before."""
    run, other = Run(device, True, state=state), Run(device, False, state=state)
    run.push(1)
    with device.capture():
        run.optimizer.step()
    with device.capture() as second:
        run.optimizer.step()
    second.replay()
    run.optimizer.step()
    for _ in range(2):
        other.eager(1)
    assert_same_bits(run.result(), other.result())


@KINDS
def test_a_plan_that_stepped_serves_a_capture_and_outlives_its_gradients(device, state):
    run, other = Run(device, True, state=state), Run(device, False, state=state)
    run.eager(1)
    with device.capture() as graph:
        run.optimizer.step()
    run.eager(2)
    graph.replay()
    for seed in (1, 2, 1):
        other.eager(seed)
    assert_same_bits(run.result(), other.result())


@KINDS
def test_a_captured_clipping_is_replayed(device, state):
    def story(run: Run) -> None:
        step = run.capture(1, clip=0.05)
        step()
        run.eager(2)

    both(device, story, state=state)


def trained_once(dtype: torch.dtype, state: str | None, seed: int, keep: bool) -> dict[str, Any]:
    model = make_model(dtype)
    if keep:  # a start of their own: bases
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.25)
    options = {"init": "keep"} if keep and state is not None else {}
    optimizer = oplora.AdamW(model, lr=1e-2, seed=seed, state=state, **options)
    train(model, optimizer, 1, dtype)
    return copy.deepcopy(optimizer.state_dict())


@KINDS
@DTYPES
@pytest.mark.parametrize("keep", [False, True])
def test_a_replay_goes_on_from_a_state_that_was_loaded(device, state, dtype, keep):
    """Also where the loaded generators began from another seed, or have bases that the captured ones had not."""
    saved = trained_once(dtype, state, seed=99, keep=keep)

    def story(run: Run) -> None:
        first, second = run.capture(1), run.capture(2)
        first()
        run.optimizer.load_state_dict(copy.deepcopy(saved))
        gc.collect()
        for step in (first, second, first):
            step()

    both(device, story, state=state, dtype=dtype)


@KINDS
def test_bases_are_lost_by_a_state_that_has_none(device, state):
    saved = trained_once(torch.float32, state, seed=99, keep=False)

    def kept() -> nn.Module:
        model = make_model()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.25)
        return model

    def story(run: Run) -> None:
        step = run.capture(1)
        step()
        run.optimizer.load_state_dict(copy.deepcopy(saved))
        gc.collect()
        step()

    both(device, story, state=state, model=kept, **({"init": "keep"} if state else {}))


@KINDS
@DTYPES
def test_a_replay_goes_on_from_an_edit_that_a_step_has_seen(device, state, dtype):
    def story(run: Run) -> None:
        step = run.capture(1)
        step()
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.5)
        if state == "exact":
            with pytest.warns(UserWarning, match="were changed"):
                run.eager(2)
        else:
            run.eager(2)
        step()

    both(device, story, state=state, dtype=dtype)


@KINDS
def test_a_rate_as_a_tensor_is_read_by_replays_after_loading(device, state):
    """The groups are torch's to replace; a captured step reads the tensor that they had."""
    run = Run(device, True, state=state)
    run.optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
    run.eager(1)
    step = run.capture(2)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.optimizer.param_groups[0]["lr"] = 1e-2
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    run.optimizer.zero_grad()
    gc.collect()
    before = factors(run.model)
    step()
    assert all(value.isfinite().all() for value in factors(run.model).values())
    assert any(not torch.equal(value, before[name]) for name, value in factors(run.model).items())


@KINDS
def test_what_steps_plainly_is_replayed_after_loading(device, state):
    def model() -> nn.Module:
        return make_model(modules_to_save=["second"], target_modules=["first"])

    source = oplora.AdamW(model(), lr=1e-2, seed=99, state=state)
    saved = copy.deepcopy(source.state_dict())

    def story(run: Run) -> None:
        step = run.capture(1)
        step()
        run.optimizer.load_state_dict(copy.deepcopy(saved))
        gc.collect()
        for _ in range(2):
            step()

    both(device, story, state=state, model=model)


@KINDS
def test_a_copy_keeps_no_graph_of_the_original(device, state):
    run = Run(device, True, state=state)
    step = run.capture(1)
    step()
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert not optimizer._stepper.is_captured
    train(model, optimizer, 1)
    train(run.model, run.optimizer, 1)
    assert_same_bits(factors(model), factors(run.model))


@KINDS
def test_generators_that_moved_on_stay_for_their_graphs(device, state):
    run = Run(device, True, state=state)
    step = run.capture(1)
    (engine,) = run.optimizer._stepper.engines
    engine.placed = torch.device("meta")  # anywhere else
    del engine
    for parameter in run.model.parameters():
        parameter.data = parameter.data.clone()  # as a move does
    run.eager(2)
    after = run.result()
    step()  # into what nobody looks at any more
    assert_same_bits(run.result(), after)
