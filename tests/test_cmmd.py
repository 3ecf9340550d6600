"""oplora.cmmd against the paper's formula, written out pair by pair."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oplora


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def by_definition(x: Tensor, y: Tensor) -> float:
    x, y = ([row / math.sqrt(sum(v * v for v in row)) for row in m.double()] for m in (x, y))

    def mean_kernel(a: list[Tensor], b: list[Tensor]) -> float:
        values = [math.exp(-sum((p - q) ** 2 for p, q in zip(i, j, strict=True)) / (2 * 10**2)) for i in a for j in b]
        return sum(values) / len(values)

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 7), st.integers(0, 9))
def test_cmmd_is_the_papers_estimator(n: int, m: int, width: int, seed: int) -> None:
    x, y = features(n, width, seed), features(m, width, seed + 1, shift=1.0)
    assert oplora.cmmd(x, y) == pytest.approx(by_definition(x, y), abs=1e-10)


def test_cmmd_of_many_rows_is_that_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(129, 5, 0), features(65, 5, 1)
    whole = oplora.cmmd(x, y)
    monkeypatch.setattr("oplora.watching.cmmd.ROWS", 7)
    assert oplora.cmmd(x, y) == pytest.approx(whole, abs=1e-10)


def test_cmmd_of_a_set_with_itself_is_zero() -> None:
    x = features(33, 8, 0)
    assert abs(oplora.cmmd(x, x.flip(0))) < 1e-10


def test_cmmd_of_opposite_points_is_the_largest_value() -> None:
    point = features(1, 16, 0)
    assert oplora.cmmd(point, -point) == pytest.approx(2000 * (1 - math.exp(-0.02)))


def test_cmmd_does_not_see_the_scale_of_a_row() -> None:
    x, y = features(11, 6, 0), features(12, 6, 1)
    assert oplora.cmmd(x * torch.rand(11, 1).add(0.1), 1e3 * y) == pytest.approx(oplora.cmmd(x, y), abs=1e-5)


def test_cmmd_of_half_precision_is_that_of_the_rounded_features() -> None:
    x, y = features(9, 16, 0).bfloat16(), features(9, 16, 1).half()
    assert oplora.cmmd(x, y) == oplora.cmmd(x.double(), y.double())


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (features(3, 4, 0), features(3, 5, 0), "4 wide and features_y 5"),
        (features(3, 4, 0)[0], features(3, 4, 0), r"features_x has shape \(4,\)"),
        (features(3, 4, 0), features(0, 4, 0), r"features_y has shape \(0, 4\)"),
        (features(3, 4, 0), torch.ones(3, 4, dtype=torch.int64), "features_y is a tensor of torch.int64"),
        ([[1.0]], features(3, 1, 0), "features_x is list"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), features(3, 2, 0), "row 1 of features_x has norm 0.0"),
        (features(3, 2, 0), torch.tensor([[float("nan"), 2.0]]), "row 0 of features_y has norm nan"),
        (features(3, 2, 0), torch.tensor([[float("inf"), 2.0]]), "row 0 of features_y has norm inf"),
    ],
)
def test_cmmd_refuses_what_is_no_features_by_name(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(oplora.OPLoRAError, match=message):
        oplora.cmmd(x, y)
