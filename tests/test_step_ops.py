"""The ops of a step on the CPU, called as oplora.AdamW calls them: rates of single factors, tables and arenas, what is
refused; and the fingerprint of tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lean_oracle import LeanOracle
from torch import Tensor, nn

import oplora.ops  # noqa: F401  (loads the ops)
from oplora import _core
from oplora.engines.settings import views

OPS = torch.ops.oplora
H, Z, ROWS = 5, 3, (7, 4)
N = sum(ROWS)


def steps_done(adamw: Tensor) -> list[int]:
    return adamw.view(torch.int64)[:, 6].tolist()


def numbers_of_layers(count: int, weight_ratio: float = 0.5) -> Tensor:
    return torch.tensor([[weight_ratio, 2e-3, 0.9, 0.999, 1e-8, 0.3, 0.0]] * count, dtype=torch.float64)


def start(layer: int) -> Tensor:
    flat = np.zeros(H * N + N + H * Z + H + Z)
    random = [(0, ROWS[0])]
    _core.start(
        flat, hidden_width=H, latent_width=Z, seed=9, layer=layer, latent_std=0.5, random=random, start="uniform"
    )
    return torch.from_numpy(flat)


class Lean:
    """`count` layers whose state begins `gap` numbers into the arenas and stays as far apart."""

    def __init__(self, count: int = 1, ranks: tuple[int, int] = (2, 1), gap: int = 0) -> None:
        d, k = ranks
        each = d * N + (2 * d + k + 2) * H + (d + k + 4) * Z + gap, (k + 3) * (N + H) + gap, 4 + gap
        self.state = [torch.zeros(count * n + gap, dtype=torch.float64) for n in each]
        sizes = [[H, Z, d, k, 0, i, 2, *(gap + i * n for n in each), 9] for i in range(count)]
        self.tables = [torch.tensor(sizes), torch.tensor([1, 0] * count)]
        self.factors = [torch.zeros(rows, dtype=torch.float64) for _ in range(count) for rows in ROWS]
        self.gradients = [torch.zeros_like(f) for f in self.factors]
        self.adamw, self.rates = numbers_of_layers(count), torch.full((2 * count, 2), 0.01, dtype=torch.float64)
        self.rows = torch.tensor([[i, 2 * i] for i in range(count)])
        self.report = torch.zeros(9 * count, dtype=torch.float64)
        OPS.lean_start_(*self.state, self.factors, *self.tables, 0.5)

    def arguments(self) -> list[Any]:
        numbers = (self.adamw, self.rates, self.rows, self.report, None)
        return [*self.state, self.factors, [], self.gradients, *self.tables, *numbers]

    def step(self) -> bool:
        return OPS.lean_step_(*self.arguments())


class Exact:
    """As Lean."""

    def __init__(self, count: int = 1, gap: int = 0) -> None:
        each, decays, units = H * N + N + H * Z + H + Z + gap, 2 * H + gap, H + gap
        self.state = [torch.zeros(count * each + gap, dtype=torch.float64) for _ in range(3)]
        self.state += [torch.ones(count * decays + gap, dtype=torch.float64)]
        self.state += [torch.zeros(count * units + gap, dtype=torch.uint8)]
        places = [(each, decays, units)] * count
        self.sizes = torch.tensor([[H, Z, 2, *(gap + i * n for n in place)] for i, place in enumerate(places)])
        for i in range(count):
            self.state[0][gap + i * each :][: each - gap] = start(i)
        self.factors = [torch.zeros(rows, dtype=torch.float64) for _ in range(count) for rows in ROWS]
        self.gradients = [torch.zeros_like(f) for f in self.factors]
        self.adamw, self.rates = numbers_of_layers(count), torch.full((2 * count, 2), 0.01, dtype=torch.float64)
        self.rows = torch.tensor([[i, 2 * i] for i in range(count)])
        self.report = torch.zeros((3 + 2 * H) * count, dtype=torch.float64)
        OPS.exact_generate_(self.state[0], self.factors, [], self.sizes)

    def arguments(self) -> list[Any]:
        numbers = (self.adamw, self.rates, self.rows, self.report, False)
        return [*self.state, self.factors, [], self.gradients, self.sizes, *numbers]

    def step(self) -> bool:
        return OPS.exact_step_(*self.arguments())


BOTH = pytest.mark.parametrize("state", [Lean, Exact])


def draw(case: Lean | Exact, generator: torch.Generator) -> None:
    for gradient in case.gradients:
        gradient.copy_(torch.randn(gradient.shape, generator=generator, dtype=torch.float64))


# ---- a rate and a decay a factor ----

RATES = [
    [(1e-2, 0.5), (1.6e-1, 0.1)],  # LoRA+
    [(1e-2, 0.5), (0.0, 0.1)],
    [(0.0, 0.5), (1e-2, 0.1)],
    [(0.0, 0.5), (0.0, 0.1)],
    [(1e-2, 100.0), (1e-2, 30.0)],  # no share is left of one keep
]


@pytest.mark.parametrize("ranks", [(2, 1), (8, 8)])
@pytest.mark.parametrize("rates", RATES, ids=str)
def test_lean_with_a_rate_a_factor_equals_the_oracle(rates: list[tuple[float, float]], ranks: tuple[int, int]) -> None:
    case, generator = Lean(ranks=ranks), torch.Generator().manual_seed(1)
    oracle = LeanOracle(views(start(0), H, Z), ranks)
    of_rows = torch.tensor(rates, dtype=torch.float64).repeat_interleave(torch.tensor(ROWS), 0)
    case.rates.copy_(torch.tensor(rates, dtype=torch.float64))
    ratio, hidden_lr, *betas, eps, hidden_decay = case.adamw[0, :6].tolist()
    for step in range(20):
        if step == 12:  # what did not move until now does
            of_rows[:, 0] = case.rates[:, 0] = 1e-3
            of_rows[:, 1] = case.rates[:, 1] = 0.2
        draw(case, generator)
        assert case.step()
        lr, decay = of_rows.unbind(1)
        oracle.step(torch.cat(case.gradients), lr, ratio, hidden_lr, decay, hidden_decay, betas, eps)
        truth = oracle.generate()
        assert (torch.cat(case.factors) - truth).norm() <= 1e-9 * truth.norm()


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_exact_with_a_rate_a_factor_equals_torchs_groups(rates: list[tuple[float, float]]) -> None:
    case, generator = Exact(), torch.Generator().manual_seed(1)
    pieces = {name: tensor.clone() for name, tensor in views(start(0), H, Z).items()}
    W2 = [nn.Parameter(piece) for piece in pieces["W2"].split(ROWS)]
    c2 = [nn.Parameter(piece) for piece in pieces["c2"].split(ROWS)]
    hidden = [nn.Parameter(pieces[name]) for name in ("W1", "c1", "z")]
    case.rates.copy_(torch.tensor(rates, dtype=torch.float64))
    ratio, hidden_lr, *betas, eps, hidden_decay = case.adamw[0, :6].tolist()
    groups = [{"params": hidden, "lr": hidden_lr, "weight_decay": hidden_decay}]
    for weight, bias, (lr, decay) in zip(W2, c2, rates, strict=True):
        # torch's decay is lr weight_decay, and that of W2 the one of c2
        groups.append({"params": [weight], "lr": lr * ratio, "weight_decay": decay / ratio})
        groups.append({"params": [bias], "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=tuple(betas), eps=eps)

    def generated() -> list[Tensor]:
        W1, c1, z = hidden
        h = (W1 @ z + c1).relu()
        return [weight @ h + bias for weight, bias in zip(W2, c2, strict=True)]

    for _ in range(30):
        draw(case, generator)
        assert case.step()
        optimizer.zero_grad()
        torch.autograd.backward(generated(), case.gradients)
        optimizer.step()
        with torch.no_grad():
            truth = torch.cat(generated())
        assert (torch.cat(case.factors) - truth).norm() <= 1e-12 * truth.norm()


def test_random_factors_that_decay_differently_are_refused() -> None:
    case = Lean()
    case.tables[1][1] = 1
    case.rates[1, 1] = 0.02
    with pytest.raises(RuntimeError, match="outside its range"):
        case.step()


# ---- tables and arenas ----


@BOTH
def test_steps_are_counted_where_they_were_done(state: Callable[..., Lean | Exact]) -> None:
    case, generator = state(2), torch.Generator().manual_seed(1)
    draw(case, generator)
    assert case.step()
    assert case.step()
    case.gradients[3][1] = float("nan")
    assert not case.step()
    assert steps_done(case.adamw) == [2, 2]


@BOTH
def test_layers_lie_anywhere_in_the_arenas_and_tables(state: Callable[..., Lean | Exact]) -> None:
    dense, sparse = state(3), state(3, gap=11)
    sparse.adamw = torch.cat([numbers_of_layers(2, weight_ratio=7.0), dense.adamw.flip(0)])
    sparse.rates = torch.cat([torch.full((5, 2), 9.0, dtype=torch.float64), dense.rates])
    sparse.rows = torch.tensor([[4, 9], [3, 5], [2, 7]])
    dense.rates[:, 0] = torch.tensor([1.0, 2, 1, 4, 1, 8]) * 1e-3
    sparse.rates[5:, 0] = dense.rates[:, 0].view(3, 2)[[1, 2, 0]].flatten()
    for _ in range(3):
        draw(dense, torch.Generator().manual_seed(2))
        draw(sparse, torch.Generator().manual_seed(2))
        assert dense.step()
        assert sparse.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(sparse.factors, dense.factors, strict=True))
    assert steps_done(sparse.adamw) == [0, 0, 3, 3, 3]
    assert sparse.state[0][:11].count_nonzero() == 0  # nothing was written between the layers


@BOTH
def test_no_bases_are_bases_of_none(state: Callable[..., Lean | Exact]) -> None:
    cases = [state(2), state(2)]
    for case, bases in zip(cases, ([], [None] * 4), strict=True):
        draw(case, torch.Generator().manual_seed(3))
        arguments = case.arguments()
        arguments[len(case.state) + 1] = bases
        (OPS.lean_step_ if state is Lean else OPS.exact_step_)(*arguments)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(cases[0].factors, cases[1].factors, strict=True))


def test_no_layers_are_a_step_done() -> None:
    case = Lean(2)
    none = [case.tables[0][:0], case.tables[1][:0], case.adamw, case.rates, case.rows[:0], case.report[:0], None]
    assert OPS.lean_step_(*case.state, [], [], [], *none)


# ---- refusals: whatever could read or write out of bounds ----


def shorter(name: str, index: int | None = None) -> Callable[[Any], None]:
    def cut(case: Any) -> None:
        held = getattr(case, name)
        if index is None:
            setattr(case, name, held[:-1].clone())
        else:
            held[index] = held[index][:-1].clone()

    return cut


def put(get: Callable[[Any], Tensor], *at: tuple[int, int, int]) -> Callable[[Any], None]:
    def write(case: Any) -> None:
        for row, column, value in at:
            get(case)[row, column] = value

    return write


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda case: setattr(case, name, change(getattr(case, name)))


def lean_sizes(case: Any) -> Tensor:
    return case.tables[0]


def exact_sizes(case: Any) -> Tensor:
    return case.sizes


def rows(case: Any) -> Tensor:
    return case.rows


BOTH_WRONG: dict[str, Callable[[Any], None]] = {
    "short adamw": shorter("adamw"),
    "short rates": shorter("rates"),
    "short rows": shorter("rows"),
    "short report": shorter("report"),
    "narrow adamw": replace("adamw", lambda t: t[:, :6].contiguous()),
    "narrow rates": replace("rates", lambda t: t[:, :1].contiguous()),
    "flat rates": replace("rates", lambda t: t.flatten()),
    "int32 rows": replace("rows", lambda t: t.int()),
    "strided rows": replace("rows", lambda t: t.t().contiguous().t()),
    "row below": put(rows, (1, 0, -1)),
    "row beyond": put(rows, (1, 0, 2)),
    "rate below": put(rows, (0, 1, -1)),
    "rate beyond": put(rows, (1, 1, 3)),
    "rate far beyond": put(rows, (1, 1, 2**63 - 1)),
    "steps below": lambda case: case.adamw.view(torch.int64)[1].__setitem__(6, -1),
    "steps most": lambda case: case.adamw.view(torch.int64)[1].__setitem__(6, 2**63 - 1),
    "a gradient too few": lambda case: case.gradients.pop(),
    "a factor too few": lambda case: case.factors.pop(),
    "short gradient": lambda case: case.gradients.__setitem__(1, case.gradients[1][:-1].clone()),
    "float gradient": lambda case: case.gradients.__setitem__(1, case.gradients[1].float()),
    "an empty factor": lambda case: case.factors.__setitem__(1, case.factors[1][:0].clone()),
    "strided factor": lambda case: case.factors.__setitem__(0, torch.zeros(14, dtype=torch.float64)[::2]),
}


@BOTH
@pytest.mark.parametrize("wrong", BOTH_WRONG.values(), ids=BOTH_WRONG)
def test_a_step_refuses_what_does_not_fit(state: Callable[..., Lean | Exact], wrong: Callable[[Any], None]) -> None:
    case = state(2)
    wrong(case)
    with pytest.raises(RuntimeError, match="oplora::"):
        case.step()


OFFSETS = (-1, 2**62, -(2**63))
LEAN_WRONG = [put(lean_sizes, (1, place, at)) for place in (7, 8, 9) for at in OFFSETS]
LEAN_WRONG += [shorter("state", place) for place in range(3)]
LEAN_WRONG += [put(lean_sizes, (0, column, value)) for column in range(4) for value in (0, -1, 2**62)]
LEAN_WRONG += [put(lean_sizes, (0, column, value)) for column, value in ((4, 2), (5, -1), (5, 2**32), (6, 0), (6, 3))]
LEAN_WRONG += [lambda case: case.tables.__setitem__(1, case.tables[1][:-1].clone())]
LEAN_WRONG += [lambda case: case.tables.__setitem__(0, case.tables[0][:, :10].contiguous())]


@pytest.mark.parametrize("wrong", LEAN_WRONG)
def test_lean_refuses_sizes_that_leave_its_tensors(wrong: Callable[[Any], None]) -> None:
    case = Lean(2)
    wrong(case)
    with pytest.raises(RuntimeError, match="oplora::"):
        case.step()


EXACT_WRONG = [put(exact_sizes, (1, place, at)) for place in (3, 4, 5) for at in OFFSETS]
EXACT_WRONG += [shorter("state", place) for place in range(5)]
EXACT_WRONG += [put(exact_sizes, (0, column, value)) for column in range(2) for value in (0, -1, 2**62)]
EXACT_WRONG += [put(exact_sizes, (0, 2, value)) for value in (0, 3, 2**40)]
EXACT_WRONG += [lambda case: setattr(case, "sizes", case.sizes[:, :5].contiguous())]


@pytest.mark.parametrize("wrong", EXACT_WRONG)
def test_exact_refuses_sizes_that_leave_its_tensors(wrong: Callable[[Any], None]) -> None:
    case = Exact(2)
    wrong(case)
    with pytest.raises(RuntimeError, match="oplora::"):
        case.step()


# ---- what the rate is found by ----


def test_a_layer_tells_by_its_own_rate_over_the_highest_of_the_groups() -> None:
    report = torch.arange(10, dtype=torch.float64)
    rates = torch.tensor([[0.5, 0], [0.25, 0], [0.1, 0]], dtype=torch.float64)
    groups = torch.zeros(2, 7, dtype=torch.float64)
    groups[:, 0] = torch.tensor([0.125, 0.5])
    heard = OPS.rate_heard(report, rates, torch.tensor([1, 0]), groups)
    assert heard.tolist() == [[2, 3 * 0.5, 4], [7, 8, 9]]
    groups.zero_()
    rates.zero_()
    assert OPS.rate_heard(report, rates, torch.tensor([1, 0]), groups)[:, 1].tolist() == [0, 0]
    for wrong in (torch.tensor([1, 3]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0, 1, 2])):
        with pytest.raises(RuntimeError, match="oplora::rate_heard"):
            OPS.rate_heard(report, rates, wrong, groups)


# ---- fingerprint ----

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.complex64, torch.bool]


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.arange(int(np.prod(shape))) % 251 % (2 if dtype == torch.bool else 251)).to(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fingerprint_is_of_the_elements_in_order(dtype: torch.dtype) -> None:
    t = numbers(dtype, 13, 17)
    strided = [t.t().contiguous().t(), torch.stack([t, t], -1)[..., 0], t.expand(2, 13, 17)[1]]
    hashes = OPS.fingerprint([t, t.clone(), *strided])
    assert hashes.dtype == torch.int64
    assert hashes.tolist() == [hashes[0].item()] * 5
    assert OPS.fingerprint([t[:, 1:].t()]).item() != OPS.fingerprint([t[:, 1:]]).item()


@pytest.mark.parametrize("size", [1, 63, 1000, 70_001])
def test_fingerprint_changes_with_one_element(size: int) -> None:
    t = torch.randn(size)
    before = OPS.fingerprint([t])
    for at in {0, size // 2, size - 1}:
        changed = t.clone()
        changed[at] = torch.nextafter(changed[at], torch.tensor(9.0))
        assert OPS.fingerprint([changed]) != before
    assert OPS.fingerprint([-t]) != before
    assert OPS.fingerprint([t]) == before


def test_fingerprint_is_the_same_for_any_number_of_threads(threads: Callable[[int], None]) -> None:
    tensors = [torch.randn(n) for n in (1_000_003, 5, 65_536, 200_000, 7)]
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(OPS.fingerprint(tensors).tolist())
    assert results == [results[0]] * 4
    assert [OPS.fingerprint([t]).item() for t in tensors] == results[0]


def test_fingerprint_of_nothing() -> None:
    assert OPS.fingerprint([]).shape == (0,)
    empty, zeros = OPS.fingerprint([torch.zeros(0), torch.zeros(1)]).tolist()
    assert empty != zeros


@pytest.mark.parametrize("shape", [(1 << 22,), (1 << 11, 1 << 11)])
def test_fingerprint_refuses_memory_that_is_gone(shape: tuple[int, ...]) -> None:
    whole = torch.zeros(shape)
    for t in (whole, whole.t()):
        whole.untyped_storage().resize_(16)
        with pytest.raises(RuntimeError, match="has no memory for its elements"):
            OPS.fingerprint([t])
        whole.untyped_storage().resize_(16 << 20)
        OPS.fingerprint([t])


def test_fingerprint_refuses_other_devices() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"CPU|meta"):
        OPS.fingerprint([torch.zeros(3, device="meta")])
