"""oplora.generate: the values, the gradients, what torch asks of an op, and its messages."""

import numpy as np
import pytest
import torch
from tolerance import assert_as_good_as_torch
from torch import Tensor

import oplora
from oplora import reference

SIZES = [(1, 1, 1), (3, 5, 7), (32, 128, 2049), (5, 3, 40001), (768, 16, 300), (33, 130, 1134)]


def arguments(H: int, Z: int, N: int, dtype: torch.dtype = torch.float64, columns: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(H + Z + N)
    shapes = ((Z,), (H, Z), (H,), (N, H), (N,))
    args = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if columns:
        args[3] = args[3].t().contiguous().t()
    return args


def eager(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> Tensor:
    return W2 @ torch.relu(W1 @ z + c1) + c2


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("H", "Z", "N"), SIZES)
def test_generate_matches_float64(H: int, Z: int, N: int, columns: bool) -> None:
    truth = eager(*arguments(H, Z, N))
    ours = oplora.generate(*arguments(H, Z, N, columns=columns))
    assert torch.allclose(ours, truth, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("H", "Z", "N"), SIZES)
def test_generate_float32_is_as_good_as_torch(H: int, Z: int, N: int, columns: bool) -> None:
    args = arguments(H, Z, N, torch.float32, columns)
    assert_as_good_as_torch(oplora.generate(*args), eager(*args), eager(*(a.double() for a in args)))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("H", "Z", "N"), SIZES)
def test_generate_gradients_are_as_good_as_torch(H: int, Z: int, N: int, columns: bool) -> None:
    grads = []
    for function, dtype in ((oplora.generate, torch.float32), (eager, torch.float32), (eager, torch.float64)):
        args = [a.to(dtype).requires_grad_() for a in arguments(H, Z, N, torch.float32, columns)]
        g = torch.linspace(-1, 1, N, dtype=torch.float32).to(dtype)
        grads.append(torch.autograd.grad(function(*args), args, g))
    for ours, torchs, truth in zip(*grads, strict=True):
        assert_as_good_as_torch(ours, torchs, truth)


@pytest.mark.parametrize("columns", [False, True])
def test_generate_gradcheck(columns: bool) -> None:
    args = [a.requires_grad_() for a in arguments(5, 4, 9, columns=columns)]
    assert torch.autograd.gradcheck(oplora.generate, args)


@pytest.mark.parametrize("wanted", range(5))
def test_generate_gradient_of_one_argument_alone(wanted: int) -> None:
    args = arguments(5, 4, 9)
    args[wanted].requires_grad_()
    assert torch.autograd.gradcheck(oplora.generate, args)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generate_opcheck(dtype: torch.dtype, columns: bool, requires_grad: bool) -> None:
    args = [a.requires_grad_(requires_grad) for a in arguments(5, 4, 9, dtype, columns)]
    torch.library.opcheck(torch.ops.oplora.generate.default, args)
    if not requires_grad:
        torch.library.opcheck(torch.ops.oplora.generate_backward.default, (args[4], *args[:4]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_generate_compiles_as_one_graph(dynamic: bool) -> None:
    def loss(z: Tensor, W1: Tensor, c1: Tensor, W2: Tensor, c2: Tensor) -> Tensor:
        return oplora.generate(z * 2, W1, c1, W2, c2).tanh().square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for H, Z, N in ((4, 6, 64), (6, 5, 96)):
        args = [a.requires_grad_() for a in arguments(H, Z, N)]
        expected = torch.autograd.grad(loss(*args), args)
        for ours, theirs in zip(torch.autograd.grad(compiled(*args), args), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_generate_compiles_with_inductor() -> None:
    args = arguments(4, 6, 64, torch.float32)
    compiled = torch.compile(oplora.generate, fullgraph=True)
    torch.testing.assert_close(compiled(*args), oplora.generate(*args))


def test_generate_traces_on_meta_tensors() -> None:
    args = [a.to("meta") for a in arguments(4, 6, 64)]
    assert oplora.generate(*args).shape == (64,)


@pytest.mark.parametrize("columns", [False, True])
def test_generate_same_bits_for_any_number_of_threads(threads, columns: bool) -> None:
    args = arguments(32, 128, 200_001, torch.float32, columns)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        backward = torch.ops.oplora.generate_backward(args[4], *args[:4])
        results.append([oplora.generate(*args), *backward])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_reference_of_other_devices_is_the_same_maths() -> None:
    args = arguments(32, 128, 2049)
    torch.testing.assert_close(reference.generate(*args), oplora.generate(*args))
    ours = torch.ops.oplora.generate_backward(args[4], *args[:4])
    for a, b in zip(reference.generate_backward(args[4], *args[:4]), ours, strict=True):
        torch.testing.assert_close(a, b)


def test_generate_ignores_columns_of_units_that_are_off() -> None:
    z, W1, c1, W2, c2 = arguments(4, 6, 64, columns=True)
    W1[2], c1[2] = 0, -1
    expected = eager(z, W1, c1, W2, c2)
    W2[:, 2] = float("nan")
    assert torch.allclose(oplora.generate(z, W1, c1, W2, c2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_generate_hands_nan_on(where: int, columns: bool, dtype: torch.dtype) -> None:
    args = arguments(4, 6, 64, dtype, columns)
    args[where].view(-1)[0] = float("nan")
    assert oplora.generate(*args).isnan().all()
    assert torch.ops.oplora.generate_backward(args[4], *args[:4])[3].isnan().any()


def test_generate_refuses_second_derivatives() -> None:
    args = [a.requires_grad_() for a in arguments(3, 2, 4)]
    (grad_z,) = torch.autograd.grad(oplora.generate(*args).square().sum(), args[:1], create_graph=True)
    with pytest.raises(oplora.OPLoRAError, match="differentiable once"):
        grad_z.sum().backward()


def test_generate_reads_columns_past_two_to_the_31_elements() -> None:
    H, N = 2100, 2**20 + 3  # 8.8 GB of W2, of which only the last column is ever touched
    W2 = torch.from_numpy(np.zeros((H, N), np.float32)).t()
    W2[:, -1] = torch.arange(N)
    c1 = torch.zeros(H)
    c1[-1] = 2
    z, W1, c2 = torch.ones(1), torch.zeros(H, 1), torch.ones(N)
    assert torch.equal(oplora.generate(z, W1, c1, W2, c2), 2 * torch.arange(N, dtype=torch.float32) + 1)
    g = torch.zeros(N)
    g[-1] = 1
    _, _, grad_c1, _ = torch.ops.oplora.generate_backward(g, z, W1, c1, W2)
    assert grad_c1[-1] == N - 1


BAD = {
    "z too long": (0, lambda a: torch.cat([a, a]), r"z has shape \(12,\), expected \(6,\)"),
    "W1 is a vector": (1, lambda a: a[0], r"W1 has shape \(6,\)"),
    "c1 too short": (2, lambda a: a[1:], r"c1 has shape \(3,\), expected \(4,\)"),
    "W2 of another width": (3, lambda a: a[:, 1:], r"W2 has shape \(64, 3\), expected \(64, 4\)"),
    "c2 too long": (4, lambda a: torch.cat([a, a]), r"c2 has shape \(128,\), expected \(64,\)"),
    "z in float32": (0, lambda a: a.float(), r"z is torch.float32 and W2 torch.float64"),
    "W2 strided": (3, lambda a: torch.cat([a, a], 1)[:, ::2], r"W2 has strides .* pass W2.contiguous\(\)"),
    "c2 strided": (4, lambda a: torch.cat([a, a])[::2], r"c2 has strides .* pass c2.contiguous\(\)"),
    "W2 on meta": (3, lambda a: a.to("meta"), "z is on cpu, W2 on meta"),
    "z a list": (0, lambda a: a.tolist(), "z is a list, expected a torch.Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_generate_says_what_is_wrong(case: str) -> None:
    index, spoil, message = BAD[case]
    args = arguments(4, 6, 64)
    args[index] = spoil(args[index])
    with pytest.raises(oplora.OPLoRAError, match=message):
        oplora.generate(*args)


@pytest.mark.parametrize(("H", "Z", "N"), [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_generate_refuses_empty_sizes(H: int, Z: int, N: int) -> None:
    with pytest.raises(oplora.OPLoRAError, match="at least 1"):
        oplora.generate(*(torch.zeros(s) for s in ((Z,), (H, Z), (H,), (N, H), (N,))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_generate_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"float32 or all torch\.float64"):
        oplora.generate(*(torch.ones(s, dtype=dtype) for s in ((3,), (2, 3), (2,), (5, 2), (5,))))


@pytest.mark.parametrize("index", range(5))
def test_raw_op_refuses_what_would_read_out_of_bounds(index: int) -> None:
    args = arguments(4, 6, 64)
    args[index] = args[index][:-1]
    with pytest.raises(RuntimeError, match="oplora::generate"):
        torch.ops.oplora.generate(*args)
