import math

import pytest

from workflow_scripts.evaluation.dd_ranking import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)

NEUTRAL = 0.26894142  # 1 / (1 + e)


def test_the_worked_numbers_of_the_label_robust_score() -> None:
    nothing = label_robust_score(real_hard=0.5, synthetic_hard=0.5, synthetic=0.3, random=0.3)
    assert nothing == pytest.approx(NEUTRAL, abs=1e-8)
    assert nothing == pytest.approx(1 / (1 + math.e))
    assert label_robust_score(real_hard=0, synthetic_hard=1, synthetic=1, random=0) == pytest.approx(1)
    assert label_robust_score(real_hard=1, synthetic_hard=0, synthetic=0, random=1) == pytest.approx(0)


def test_the_label_robust_score_of_an_ordinary_method() -> None:
    scores = {"real_hard": 0.565, "synthetic_hard": 0.165, "synthetic": 0.45, "random": 0.35}
    assert hard_label_recovery(0.565, 0.165) == pytest.approx(0.4)
    assert improvement_over_random(0.45, 0.35) == pytest.approx(0.1)
    alpha = 0.5 * 0.1 - 0.5 * 0.4
    expected = (math.exp(alpha) - math.exp(-1)) / (2 * math.sinh(1))
    assert label_robust_score(**scores) == pytest.approx(expected)
    assert (
        label_robust_score(**scores, weight=1) > label_robust_score(**scores) > label_robust_score(**scores, weight=0)
    )


def test_the_augmentation_robust_score() -> None:
    def score(a: float, b: float, c: float, d: float, weight: float = 0.5) -> float:
        return augmentation_robust_score(
            synthetic_augmented=a, random_augmented=b, synthetic_plain=c, random_plain=d, weight=weight
        )

    assert score(0.4, 0.4, 0.2, 0.2) == pytest.approx(NEUTRAL, abs=1e-8)
    assert score(1, 0, 1, 0) == pytest.approx(1)
    assert score(0, 1, 0, 1) == pytest.approx(0)
    beta = 0.5 * (0.45 - 0.30) + 0.5 * (0.20 - 0.25)
    assert score(0.45, 0.30, 0.20, 0.25) == pytest.approx((math.exp(beta) - math.exp(-1)) / (2 * math.sinh(1)))
    assert score(0.45, 0.30, 0.20, 0.25, weight=1) == pytest.approx(
        (math.exp(0.15) - math.exp(-1)) / (2 * math.sinh(1))
    )


@pytest.mark.parametrize("wrong", [45.0, -0.1, math.nan])
def test_percentages_and_nonsense_are_rejected(wrong: float) -> None:
    with pytest.raises(ValueError, match="synthetic_hard must be a fraction"):
        label_robust_score(real_hard=0.5, synthetic_hard=wrong, synthetic=0.5, random=0.5)
    with pytest.raises(ValueError, match="weight must be a fraction"):
        augmentation_robust_score(
            synthetic_augmented=0.5, random_augmented=0.5, synthetic_plain=0.5, random_plain=0.5, weight=wrong
        )
