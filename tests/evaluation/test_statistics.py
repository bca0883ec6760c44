import math

import pytest

from workflow_scripts.evaluation.statistics import summarize


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_interval_uses_the_tabulated_t(n: int, t: float) -> None:
    summary = summarize([float(score) for score in range(n)])
    std = math.sqrt(sum((score - (n - 1) / 2) ** 2 for score in range(n)) / (n - 1))
    assert summary.n == n
    assert summary.mean == pytest.approx((n - 1) / 2)
    assert summary.std == pytest.approx(std)
    assert summary.ci95 == pytest.approx(t * std / math.sqrt(n), rel=3e-4)
    assert summary.interval == pytest.approx((summary.mean - summary.ci95, summary.mean + summary.ci95))


def test_equal_scores_have_no_spread() -> None:
    summary = summarize([40.0, 40.0, 40.0])
    assert (summary.mean, summary.std, summary.ci95) == (40.0, 0.0, 0.0)


def test_one_score_has_no_interval() -> None:
    summary = summarize([40.8])
    assert (summary.n, summary.mean, summary.std, summary.ci95, summary.interval) == (1, 40.8, None, None, None)


@pytest.mark.parametrize("scores", [[], [1.0, math.nan]])
def test_no_or_broken_scores_are_rejected(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="scores"):
        summarize(scores)
