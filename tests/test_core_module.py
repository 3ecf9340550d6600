"""oplora._core, the C core on NumPy arrays: its numbers, its messages, the GIL and the references."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from oplora import _core
from oplora.errors import OPLoRATypeError, OPLoRAValueError

SIZES = [(1, 1, 1), (3, 5, 129), (8, 16, 1134), (33, 7, 4099)]
TYPES: list[Any] = [np.float32, np.float64]


def parameters(H: int, Z: int, N: int, dtype: Any) -> list[NDArray[Any]]:
    rng = np.random.default_rng(H + Z + N)
    return [rng.normal(size=shape).astype(dtype) for shape in ((Z,), (H, Z), (H,), (N, H), (N,))]


# ---- generate ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_generate_equals_its_formula(sizes: tuple[int, int, int], dtype: Any, order: Any) -> None:
    z, W1, c1, W2, c2 = (a.astype(np.float64) for a in parameters(*sizes, dtype))
    expected = W2 @ np.maximum(W1 @ z + c1, 0) + c2
    arrays = parameters(*sizes, dtype)
    arrays[3] = np.asarray(arrays[3], order=order)
    v = _core.generate(*arrays)
    assert v.dtype == dtype
    scale = np.abs(W2) @ (np.abs(W1) @ np.abs(z) + np.abs(c1)) + np.abs(c2)
    assert (np.abs(v - expected) <= (sizes[0] + sizes[1]) * np.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_generate_backward_equals_torch(sizes: tuple[int, int, int], dtype: Any, order: Any) -> None:
    z, W1, c1, W2, _ = parameters(*sizes, dtype)
    g = np.random.default_rng(0).normal(size=sizes[2]).astype(dtype)
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (z, W1, c1)]
    h = torch.relu(leaves[1] @ leaves[0] + leaves[2])
    (torch.tensor(W2, dtype=torch.float64) @ h).backward(torch.tensor(g, dtype=torch.float64))
    expected = [leaf.grad for leaf in leaves] + [h.detach()]
    got = _core.generate_backward(g, z, W1, c1, np.asarray(W2, order=order))
    tolerance = 100 * np.finfo(dtype).eps * np.sqrt(sizes[2])
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * 10)


def test_generate_takes_keywords() -> None:
    arrays = parameters(3, 4, 5, np.float32)
    by_name = dict(zip(["z", "W1", "c1", "W2", "c2"], arrays, strict=True))
    assert np.array_equal(_core.generate(**by_name), _core.generate(*arrays))


# ---- start ----


def start(H: int = 6, Z: int = 5, N: int = 300, dtype: Any = np.float64, **changes: Any) -> NDArray[Any]:
    out = np.zeros(H * N + N + H * Z + H + Z, dtype)
    options = {"seed": 1, "layer": 2, "latent_std": 0.01, "random": [(0, N // 2)], "start": "uniform", **changes}
    _core.start(out, hidden_width=H, latent_width=Z, **options)
    return out


def test_start_fills_the_layout() -> None:
    H, Z, N = 6, 5, 300
    out = start(H, Z, N)
    W2, c2, W1, c1, z = np.split(out, np.cumsum([H * N, N, H * Z, H]))
    assert (np.abs(W2.reshape(H, N)[:, : N // 2]) < 1 / np.sqrt(H)).all()
    assert np.abs(W2.reshape(H, N)[:, : N // 2]).min() > 0
    assert not W2.reshape(H, N)[:, N // 2 :].any()
    assert not c2.any()
    assert not c1.any()
    assert 0 < np.abs(W1).max() < 1 / np.sqrt(Z)
    assert 0 < np.abs(z).max() < 0.06


def test_start_is_the_same_in_both_dtypes() -> None:
    np.testing.assert_allclose(start(dtype=np.float32), start(dtype=np.float64), rtol=3e-7)


@pytest.mark.parametrize("change", [{"seed": 2**64 - 1}, {"layer": 2**32 - 1}, {"seed": 1 << 32}])
def test_start_depends_on_seed_and_layer(change: dict[str, int]) -> None:
    assert not np.array_equal(start(**change), start())


def test_start_takes_rows_in_any_sequence() -> None:
    assert np.array_equal(start(random=[[0, 10], (10, 20)]), start(random=((np.int64(0), 10), [10, 20])))


def test_every_range_of_rows_has_numbers_of_its_own() -> None:
    first = start(random=[(0, 10)])[: 6 * 300].reshape(6, 300)
    both = start(random=[(0, 10), (10, 20)])[: 6 * 300].reshape(6, 300)
    assert np.array_equal(first[:, :10], both[:, :10])
    assert not np.array_equal(both[:, :10], both[:, 10:20])


def test_sign_start_has_the_variance_of_the_uniform_one() -> None:
    signs = start(start="sign", random=[(0, 300)])[: 6 * 300]
    assert np.array_equal(np.unique(np.abs(signs)), [np.float64(1 / np.sqrt(18))])
    assert abs(signs.mean()) < 0.03


def test_unknown_start_is_named() -> None:
    with pytest.raises(OPLoRAValueError, match="start is 'normal', expected 'uniform' or 'sign'"):
        start(start="normal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1, expected an integer from 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"layer": 2**32}, "layer is 4294967296"),
        ({"latent_std": -0.5}, "latent_std is negative"),
        ({"latent_std": float("nan")}, "NaN"),
        ({"random": [(0, 1), (3, 2)]}, r"random\[1\] is \(3, 2\), expected rows .* N = 300"),
        ({"random": [(0, 301)]}, r"random\[0\] is \(0, 301\)"),
        ({"random": [(-1, 2)]}, r"random\[0\]"),
        ({"random": [(0, 2**80)]}, r"random\[0\]"),
        ({"random": [(0, 1, 2)]}, r"random\[0\]"),
        ({"random": [7]}, r"random\[0\] is 7"),
    ],
)
def test_start_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OPLoRAValueError, match=r"oplora\.start: .*" + message):
        start(**changes)


@pytest.mark.parametrize("widths", [(0, 5), (6, 0), (-1, 5), (6, 2**62), (7, 5)])
def test_start_refuses_widths_that_do_not_fit(widths: tuple[int, int]) -> None:
    out = np.zeros(6 * 300 + 300 + 6 * 5 + 6 + 5)
    with pytest.raises(OPLoRAValueError, match="out has 2141 entries"):
        _core.start(
            out,
            hidden_width=widths[0],
            latent_width=widths[1],
            seed=0,
            layer=0,
            latent_std=1,
            random=[],
            start="uniform",
        )


def test_start_refuses_to_write_read_only_memory() -> None:
    out = np.zeros(2141)
    out.flags.writeable = False
    with pytest.raises(OPLoRAValueError, match="read-only"):
        _core.start(out, hidden_width=6, latent_width=5, seed=0, layer=0, latent_std=1, random=[], start="uniform")


def test_start_says_how_many_ranges_there_may_be() -> None:
    start(random=[(i, i + 1) for i in range(31)])
    message = r"oplora\.start: random has 32 ranges, expected at most 31\. Join ranges that follow each other"
    with pytest.raises(OPLoRAValueError, match=message):
        start(random=[(i, i + 1) for i in range(32)])


@pytest.mark.parametrize("name", ["hidden_width", "latent_width"])
@pytest.mark.parametrize("width", [sys.maxsize, sys.maxsize - 1, -sys.maxsize - 1, 2**40])
def test_start_refuses_any_width_that_is_too_large(name: str, width: int) -> None:
    widths = {"hidden_width": 6, "latent_width": 5, name: width}
    options: dict[str, Any] = {"seed": 0, "layer": 0, "latent_std": 1, "random": [], "start": "uniform"}
    with pytest.raises(OPLoRAValueError, match="out has 2141 entries"):
        _core.start(np.zeros(2141), **widths, **options)


# ---- arguments that change others while they are converted ----


class Number:
    """A number whose conversion does something first."""

    def __init__(self, value: float, act: Callable[[], object]) -> None:
        self.value, self.act = value, act

    def __index__(self) -> int:
        self.act()
        return int(self.value)

    def __float__(self) -> float:
        self.act()
        return float(self.value)


class Pairs:
    """A sequence of pairs whose length does something first."""

    def __init__(self, pairs: list[tuple[int, int]], act: Callable[[], object]) -> None:
        self.pairs, self.act = pairs, act

    def __len__(self) -> int:
        self.act()
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self.pairs[index]


def with_act(name: str, act: Callable[[], object]) -> dict[str, Any]:
    """start's arguments for H = 6, Z = 5 and N = 300, one of which acts."""
    options: dict[str, Any] = {"hidden_width": 6, "latent_width": 5, "seed": 1, "layer": 2, "latent_std": 0.01}
    options |= {"random": [(0, 300)], "start": "uniform"}
    if name == "random":
        options[name] = Pairs(options[name], act)
    elif name == "row":
        options["random"] = [(0, Number(300, act))]
    else:
        options[name] = Number(options[name], act)
    return options


ACTS = ["hidden_width", "latent_width", "seed", "layer", "latent_std", "random", "row"]


@pytest.mark.parametrize("name", ACTS)
def test_start_reads_the_size_of_an_array_that_an_argument_shrinks(name: str) -> None:
    out = np.zeros(2141)
    with pytest.raises(OPLoRAValueError, match="out has 77 entries"):
        _core.start(out, **with_act(name, lambda: out.resize(77, refcheck=False)))


@pytest.mark.parametrize("name", ACTS)
def test_start_fills_an_array_that_an_argument_moves(name: str) -> None:
    out, expected = np.zeros(2141), np.zeros(2141)

    def move() -> None:
        out.resize(1 << 22, refcheck=False)
        out.resize(2141, refcheck=False)

    _core.start(out, **with_act(name, move))
    _core.start(expected, **with_act(name, lambda: None))
    assert np.array_equal(out, expected)
    assert expected[:300].all()


@pytest.mark.parametrize("name", ACTS)
def test_start_refuses_a_buffer_that_an_argument_resizes(name: str) -> None:
    memory = bytearray(8 * 2141)
    out = np.ndarray(2141, np.float64, buffer=memory)
    with pytest.raises(
        OPLoRAValueError, match=r"the buffer that out lies in was released, closed or resized\. Make out"
    ):
        _core.start(out, **with_act(name, memory.clear))


@pytest.mark.parametrize("name", ACTS)
def test_start_refuses_a_memoryview_that_an_argument_releases(name: str) -> None:
    memory = bytearray(8 * 2141)
    out = np.frombuffer(memory, np.float64)

    def let_go() -> None:
        view = out.base
        assert isinstance(view, memoryview)
        view.release()
        memory.clear()

    with pytest.raises(OPLoRAValueError, match=r"oplora\.start: the buffer that out lies in was released"):
        _core.start(out, **with_act(name, let_go))


@pytest.mark.parametrize("name", ACTS)
def test_start_refuses_a_view_of_an_array_that_an_argument_shrinks(name: str) -> None:
    owner = np.zeros(4000)
    out = owner[:2141]
    with pytest.raises(
        OPLoRAValueError, match=r"oplora\.start: the buffer that out lies in was released, closed or resized"
    ):
        _core.start(out, **with_act(name, lambda: owner.resize(77, refcheck=False)))


def test_views_of_arrays_are_taken() -> None:
    owner, expected = np.zeros((3, 2141)), np.zeros(2141)
    _core.start(owner[1], **with_act("seed", lambda: None))
    _core.start(expected, **with_act("seed", lambda: None))
    assert np.array_equal(owner[1], expected)
    assert not owner[[0, 2]].any()


def test_every_function_refuses_arrays_in_released_memory() -> None:
    def gone(array: NDArray[Any]) -> NDArray[Any]:
        memory = bytearray(array.tobytes())
        view = np.ndarray(array.shape, array.dtype, buffer=memory)
        memory.clear()
        return view

    arrays = parameters(3, 4, 5, np.float32)
    g = np.ones(5, np.float32)
    for i in range(5):
        changed = [gone(a) if k == i else a for k, a in enumerate(arrays)]
        with pytest.raises(OPLoRAValueError, match=r"oplora\.generate: the buffer that"):
            _core.generate(*changed)
        others = [gone(a) if k == i else a for k, a in enumerate([g, *arrays[:4]])]
        with pytest.raises(OPLoRAValueError, match=r"oplora\.generate_backward: the buffer that"):
            _core.generate_backward(*others)
    for name in "WAB":
        arguments = merge_arguments()
        arguments[name] = gone(arguments[name])
        with pytest.raises(OPLoRAValueError, match=rf"oplora\.merge: the buffer that {name} lies in"):
            _core.merge(**arguments)
    with pytest.raises(OPLoRAValueError, match=r"oplora\.round: the buffer that values lies in"):
        _core.round(gone(g), "float16")


def test_arrays_in_buffers_are_taken_and_let_go() -> None:
    memory = bytearray(8 * 2141 + 16)
    out = np.frombuffer(memory, np.float64, count=2141, offset=8)
    expected = np.zeros(2141)
    _core.start(out, **with_act("seed", lambda: None))
    _core.start(expected, **with_act("seed", lambda: None))
    assert np.array_equal(out, expected)
    view = out.base
    del out
    assert isinstance(view, memoryview)
    view.release()
    memory.clear()  # which nothing holds


def test_merge_takes_sizes_after_its_numbers() -> None:
    arguments = merge_arguments()
    W = arguments["W"]
    arguments["scaling"] = Number(1, lambda: W.resize((1, 4), refcheck=False))
    with pytest.raises(OPLoRAValueError, match="B has shape"):
        _core.merge(**arguments)


# Salmon et al.'s known answers (random123, kat_vectors)
PHILOX = [
    ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: str) -> None:
    assert " ".join(f"{word:08x}" for word in _core.philox(counter, key)) == words


@pytest.mark.parametrize(("counter", "key"), [((0,) * 3, (0, 0)), ((0,) * 4, (0,)), ((0,) * 4, (0, 1 << 32))])
def test_philox_refuses_other_words(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    with pytest.raises(OPLoRAValueError, match="expected"):
        _core.philox(counter, key)


# ---- merge ----

TORCH = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def bits(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as an array; bfloat16 as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (129, 33, 3), (7, 1134, 16), (1100, 5, 70)])
def test_merge_is_within_one_rounding(sizes: tuple[int, int, int], transposed: bool, dtype: Any) -> None:
    out_features, in_features, r = sizes
    torch.manual_seed(0)
    A, B = torch.randn(r, in_features), torch.randn(out_features, r)
    W = torch.randn(in_features if transposed else out_features, out_features if transposed else in_features)
    W = W.to(TORCH[dtype])
    delta, size = B.double() @ A.double(), B.double().abs() @ A.double().abs()
    exact = W.double() + 0.3 * (delta.T if transposed else delta)
    eps = torch.finfo(torch.float64 if dtype == "float64" else torch.float32).eps
    slack = (r + 2) * eps * (W.double().abs() + 0.3 * (size.T if transposed else size))
    _core.merge(bits(W), A.numpy(), B.numpy(), 0.3, dtype=dtype, transposed=transposed)
    assert ((exact - slack).to(W.dtype) <= W).all()
    assert ((exact + slack).to(W.dtype) >= W).all()


def test_merge_takes_unaligned_memory() -> None:
    A, B = np.ones((2, 5), np.float32), np.ones((3, 2), np.float32)
    memory = np.zeros(3 * 5 * 4 + 1, np.uint8)
    W = memory[1:].view(np.float32).reshape(3, 5)
    assert not W.flags.aligned
    _core.merge(W, A, B, 0.5, dtype="float32")
    assert (W == 1).all()


def test_merge_runs_without_the_gil() -> None:
    W = np.zeros((2048, 2048), np.float32)
    A, B = np.ones((256, 2048), np.float32), np.ones((2048, 256), np.float32)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    _core.merge(W, A, B, 1.0, dtype="float32")
    end = time.perf_counter()
    stop.set()
    thread.join()
    middle = [t for t in ticks if begin + (end - begin) / 4 < t < end - (end - begin) / 4]
    assert len(middle) > 2


def merge_arguments() -> dict[str, Any]:
    zeros = [np.zeros(shape, np.float32) for shape in ((3, 4), (2, 4), (3, 2))]
    return {**dict(zip("WAB", zeros, strict=True)), "scaling": 1.0, "dtype": "float32"}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dtype": "int8"}, OPLoRAValueError, "dtype is 'int8', expected 'float32'"),
        (
            {"dtype": "bfloat16"},
            OPLoRATypeError,
            "W has dtype float32, expected uint16. Pass bfloat16 as its bits",
        ),
        ({"W": [[1.0]]}, OPLoRATypeError, "W is a <class 'list'>"),
        ({"W": np.zeros(3, np.float32)}, OPLoRAValueError, r"W has shape \(3,\), expected two dimensions"),
        ({"W": np.zeros((4, 3), np.float32).T}, OPLoRAValueError, "C-contiguous"),
        ({"W": np.zeros((3, 4), ">f4")}, OPLoRATypeError, "byte order"),
        (
            {"A": np.zeros((2, 5), np.float32)},
            OPLoRAValueError,
            r"A has shape \(2, 5\), expected \(r, the columns of W\)",
        ),
        ({"A": np.zeros((4, 2), np.float32).T}, OPLoRAValueError, "A has gaps"),
        ({"B": np.zeros((3, 3), np.float32)}, OPLoRAValueError, r"B has shape \(3, 3\)"),
        ({"B": np.zeros((3, 2))}, OPLoRATypeError, "B has dtype float64, expected float32"),
        ({"transposed": True}, OPLoRAValueError, "the rows of W"),
        ({"scaling": float("inf")}, OPLoRAValueError, "scaling is infinite"),
        ({"scaling": -1e39}, OPLoRAValueError, "beyond float32"),
        ({"W": np.zeros((0, 4), np.float32), "B": np.zeros((0, 2), np.float32)}, OPLoRAValueError, "below 1"),
    ],
)
def test_merge_refuses(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=r"oplora\.merge: .*" + message):
        _core.merge(**{**merge_arguments(), **changes})


def test_merge_needs_a_dtype() -> None:
    arguments = merge_arguments()
    del arguments["dtype"]
    with pytest.raises(TypeError, match="dtype"):
        _core.merge(**arguments)


def test_merge_refuses_read_only_memory() -> None:
    arguments = merge_arguments()
    arguments["W"].flags.writeable = False
    with pytest.raises(OPLoRAValueError, match="read-only"):
        _core.merge(**arguments)


# ---- round ----


def interesting_floats(dropped: int) -> NDArray[np.float32]:
    """All that stays of a float's bits, each with the dropped bits that decide a rounding."""
    upper = np.arange(1 << (32 - dropped), dtype=np.uint64) << np.uint64(dropped)
    half = 1 << (dropped - 1)
    lower = np.array([0, 1, half - 1, half, half + 1, 2 * half - 1], np.uint64)
    return (upper[:, None] | lower).astype(np.uint32).ravel().view(np.float32)


@pytest.mark.parametrize(("dtype", "dropped"), [("float16", 13), ("bfloat16", 16)])
def test_round_equals_torch(dtype: Any, dropped: int) -> None:
    values = interesting_floats(dropped)
    values = np.concatenate([values, interesting_floats(16), np.arange(-300, 300, dtype=np.float32) * 2.0**-26])
    got, expected = _core.round(values, dtype), bits(torch.from_numpy(values).to(TORCH[dtype]))
    number = ~np.isnan(values)
    assert np.array_equal(got[number].view(np.uint16), expected[number].view(np.uint16))
    nan = torch.from_numpy(got[~number].view(np.uint16)).view(TORCH[dtype])
    assert bool(torch.isnan(nan).all())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5)])
def test_round_keeps_the_shape(shape: tuple[int, ...]) -> None:
    assert _core.round(np.zeros(shape, np.float32), "bfloat16").shape == shape


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_widens_exactly(dtype: Any) -> None:
    values = np.array([1.1, -0.0, 1e-45, np.inf], np.float32)
    assert np.array_equal(_core.round(values, dtype), values.astype(dtype))


def test_round_refuses_float64() -> None:
    with pytest.raises(OPLoRATypeError, match="values has dtype float64, expected float32"):
        _core.round(np.zeros(3), "float16")  # type: ignore[arg-type]


# ---- generate's messages; memory ----


@pytest.mark.parametrize(
    ("index", "value", "kind", "message"),
    [
        (0, np.zeros(4), OPLoRATypeError, "z has dtype float64, expected float32"),
        (0, np.zeros(5, np.float32), OPLoRAValueError, "z has 5 entries, expected 4 = Z"),
        (1, np.zeros((2, 4), np.float32), OPLoRAValueError, r"W1 has shape \(2, 4\), expected \(H, Z\)"),
        (1, np.zeros((4, 3), np.float32).T, OPLoRAValueError, "W1 has gaps"),
        (2, np.zeros((3, 1), np.float32), OPLoRAValueError, "c1 has shape"),
        (
            3,
            np.zeros((5, 6), np.float32)[:, ::2],
            OPLoRAValueError,
            "W2 is neither C- nor Fortran-contiguous",
        ),
        (3, np.zeros((5, 3), np.int32), OPLoRATypeError, "W2 has dtype int32, expected float32 or float64"),
        (4, np.zeros(4, np.float32), OPLoRAValueError, "c2 has 4 entries, expected 5 = N"),
        (4, None, OPLoRATypeError, "c2 is a <class 'NoneType'>"),
    ],
)
def test_generate_refuses(index: int, value: Any, kind: type[Exception], message: str) -> None:
    arrays: list[Any] = parameters(3, 4, 5, np.float32)
    arrays[index] = value
    with pytest.raises(kind, match=r"oplora\.generate: .*" + message):
        _core.generate(*arrays)


def test_core_leaks_nothing() -> None:
    z, W1, c1, W2, c2 = parameters(3, 4, 5, np.float32)
    arrays = [z, W1, c1, W2, c2, np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)]
    before = [sys.getrefcount(a) for a in arrays]
    for _ in range(50):
        _core.generate(z, W1, c1, W2, c2)
        _core.generate_backward(c2, z, W1, c1, W2)
        with pytest.raises(OPLoRAValueError):
            _core.generate(z, W1, c1, W2, c1)
        with pytest.raises(OPLoRAValueError):
            _core.merge(arrays[5], arrays[6], arrays[6], 1.0, dtype="float32")
    assert [sys.getrefcount(a) for a in arrays] == before


def test_core_documents_itself() -> None:
    for name in ("generate", "generate_backward", "start", "merge", "round", "philox", "isa"):
        assert len(getattr(_core, name).__doc__ or "") > 40
