"""oplora on a real GPU, against the C core and float64. Skipped where there is none; `make gpu` runs it."""

import copy
import os
import warnings
from datetime import timedelta

import adapter_types
import pytest
import torch
import torch.distributed as dist
from conftest import batches, factors, make_model, train_on
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import oplora
from oplora import reference
from oplora.kernels import has_kernels

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernels()), reason="needs a CUDA GPU, and liboplora_cuda.so"
)
STATES = ("lean", "exact", None)  # None: of preset "auto"


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None) -> None:
    some = next(p for p in model.parameters() if p.requires_grad)
    for x, y in batches(steps, some.dtype):
        optimizer.zero_grad()
        (model(x.to(some.device)) - y.to(some.device)).square().mean().backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()


def trained(device: str, steps: int = 5, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    model = make_model(dtype).to(device)
    train(model, oplora.AdamW(model, lr=1e-2, seed=5, **settings), steps, clip=0.5)
    return model


def assert_close(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    for name, value in factors(theirs).items():
        torch.testing.assert_close(factors(ours)[name].cpu().float(), value.cpu().float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_a_gpu_trains_as_the_cpu(state, dtype, tolerance):
    """The steps' bits are the core's; the model's own gradients are not."""
    assert_close(trained("cuda", state=state, dtype=dtype), trained("cpu", state=state, dtype=dtype), tolerance)


@pytest.mark.parametrize("state", STATES)
def test_a_gpu_preconditions_as_the_cpu(state):
    assert_close(trained("cuda", state=state, precondition=1e-2), trained("cpu", state=state, precondition=1e-2), 2e-4)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", ["DoRA, Linear", "VeRA", "IA3", "LoRA, Conv2d", "LoRA, parameters"])
def test_a_gpu_trains_every_kind_of_adapter_as_the_cpu(state, case):
    ends = []
    for device in ("cuda", "cpu"):
        model = adapter_types.make(case, torch.float32).to(device)
        pairs = [(x.to(device), y.to(device)) for x, y in adapter_types.data(case, 5, torch.float32)]
        train_on(model, oplora.AdamW(model, lr=1e-3, state=state), pairs)
        ends.append({name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=0, atol=2e-4)


def test_exact_state_is_as_close_to_float64_as_the_core():
    oracle = trained("cpu", state="exact", dtype=torch.float64)
    assert_close(trained("cuda", state="exact"), oracle, 2e-5)


@pytest.mark.parametrize("state", STATES)
def test_a_step_has_the_cores_bits(state):
    """From the same state and gradients: all that is not of pow, which may differ in its last bit."""
    ends = []
    for device in ("cuda", "cpu"):
        model = make_model().to(device)
        optimizer = oplora.AdamW(model, lr=1e-2, state=state, betas=(0.5, 0.5))  # powers of two are exact
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
            optimizer.step()
        ends.append({name: value.cpu() for name, value in factors(model).items()})
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state", STATES)
def test_a_step_neither_waits_nor_allocates(state):
    model = make_model().cuda()
    optimizer = oplora.AdamW(model, lr=1e-3, state=state)
    train(model, optimizer, 3)
    torch.cuda.synchronize()
    held = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    assert after == held


def test_monitor_waits_for_the_gpu_on_recorded_steps_alone(tmp_path):
    """There for the loss, the report, and the factors' norms with their rates, however many layers there are; after the
    first the GPU has nothing left to do."""
    model = make_model().cuda()
    optimizer = oplora.AdamW(model, lr=1e-3)
    monitor = oplora.Monitor(tmp_path, optimizer, every=10)
    train(model, optimizer, 10)
    loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as between:
            warnings.simplefilter("always")
            for step in range(11, 20):
                monitor(loss, step)
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            monitor(loss, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        monitor.close()
    assert not between and 1 <= len(recorded) <= 3, [str(warning.message) for warning in recorded]


@pytest.mark.parametrize("state", STATES)
def test_a_captured_step_replays(state):
    """Also with a learning rate that changes between replays."""
    ends = []
    for captured in (False, True):
        model = make_model().cuda()
        optimizer = oplora.AdamW(model, lr=1e-2, state=state)
        rate = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
        optimizer.param_groups[0]["lr"] = rate
        x, y = (t.cuda() for t in next(batches(1, torch.float32)))
        (model(x) - y).square().mean().backward()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for i in range(3):
            rate.fill_(1e-2 / (i + 1))
            step()
        assert optimizer._stepper.states[0].steps == 5
        ends.append(factors(model))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value)


@pytest.mark.parametrize("state", STATES)
def test_a_replay_follows_a_step_with_gradients_elsewhere_and_loading(state):
    ends = []
    for captured in (False, True):
        model = make_model().cuda()
        optimizer = oplora.AdamW(model, lr=1e-2, state=state, seed=5)
        saved = copy.deepcopy(oplora.AdamW(make_model().cuda(), lr=1e-2, state=state, seed=99).state_dict())
        trained = [p for p in model.parameters() if p.requires_grad]

        def push(seed: int, trained: list[nn.Parameter] = trained) -> None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in trained:
                parameter.grad = torch.randn(parameter.shape, generator=generator).cuda()

        push(1)
        for _ in range(2):
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for load in (False, True):
            if load:
                optimizer.load_state_dict(copy.deepcopy(saved))
            push(2)
            optimizer.step()
            if not captured:
                push(1)
            (graph.replay if captured else optimizer.step)()
        torch.cuda.synchronize()
        ends.append(factors(model))
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value)


@pytest.mark.parametrize("state", STATES)
def test_nan_changes_nothing_and_is_told(state):
    model = make_model(modules_to_save=["second"], target_modules=["first"]).cuda()
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    train(model, optimizer, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = float("nan")
    optimizer.step()
    torch.cuda.synchronize()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(oplora.OPLoRAError, match="NaN"):
        optimizer.step()


@pytest.mark.parametrize("state", STATES)
def test_a_state_moves_between_cpu_and_gpu(state):
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    train(model, optimizer, 2)
    model.cuda()
    train(model, optimizer, 2)
    assert next(p for p in model.parameters() if p.requires_grad).is_cuda
    saved = copy.deepcopy(optimizer.state_dict())
    again = make_model()
    resumed = oplora.AdamW(again, lr=1e-2, state=state)
    resumed.load_state_dict(saved)
    train(again, resumed, 2)
    train(model, optimizer, 2)
    assert_close(again, model, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generators_in_host_memory(dtype):
    ours = trained("cuda", state="exact", generator_device="cpu", dtype=dtype)
    assert_close(ours, trained("cpu", state="exact", dtype=dtype), 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize(("H", "Z", "N"), [(1, 1, 1), (4, 7, 31), (30, 128, 33), (768, 5, 40), (32, 128, 1_000_000)])
def test_generate_on_cuda(dtype, columns, H, Z, N):
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=dtype).cuda()  # noqa: E731
    z, W1, c1, c2, g = make(Z), make(H, Z), make(H), make(N), make(N)
    W2 = make(H, N).t() if columns else make(N, H)
    arguments = [t.requires_grad_() for t in (z, W1, c1, W2, c2)]
    if N < 1000:
        torch.library.opcheck(torch.ops.oplora.generate, arguments)
    v = oplora.generate(*arguments)
    grads = torch.autograd.grad(v, arguments, g)
    doubles = [t.detach().double() for t in arguments]
    scale = 1e-5 if dtype == torch.float32 else 1e-13
    bound = float(doubles[3].abs().amax() * N**0.5 * H**0.5 + 1)
    torch.testing.assert_close(v.double(), reference.generate(*doubles), rtol=0, atol=scale * bound)
    expected = reference.generate_backward(g.double(), *doubles[:4])
    for mine, theirs in zip(grads[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=scale * float(theirs.abs().amax() + 1))


# ---- two GPUs ----


def join_nccl() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))


def train_in_parts(divided: bool) -> dict[str, Tensor]:
    """On halves of every batch: divided among two GPUs, or one after the other on one."""
    model = make_model().cuda()
    if divided:
        fully_shard(model)
    optimizer = oplora.AdamW(model)
    for x, y in batches(20, torch.float32):
        optimizer.zero_grad()
        for rank in (dist.get_rank(),) if divided else (0, 1):
            (model(x[rank::2].cuda()) - y[rank::2].cuda()).square().mean().backward()
        for p in () if divided else optimizer.param_groups[0]["params"]:
            p.grad /= 2
        optimizer.step()
    held = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if divided else p).cpu() for name, p in held.items()}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_divided_tensors_train_on_two_gpus_as_on_one() -> None:
    two = Ranks(join_nccl)
    try:
        results = two.run(train_in_parts, True)
    finally:
        two.stop(wait=True)
    alone = train_in_parts(False)
    for bits in results:
        for name, value in bits.items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)
