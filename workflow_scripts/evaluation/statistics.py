"""Statistics over repeated scores: mean, spread and the interval that goes behind the plus-minus sign."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """What is reported of repeated scores, in the unit of the scores.

    Attributes:
        n: Number of scores.
        mean: Their mean.
        std: Sample standard deviation (n - 1 in the denominator); None for one score.
        ci95: Half-width of the 95 % confidence interval of the mean (Student t); None for one score.
    """

    n: int
    mean: float
    std: float | None
    ci95: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean, or None for one score."""
        return None if self.ci95 is None else (self.mean - self.ci95, self.mean + self.ci95)


def summarize(scores: Sequence[float]) -> Summary:
    """Summarise one score per repeat.

    Raises:
        ValueError: There is no score, or one is not finite.
    """
    if not scores:
        raise ValueError("no scores to summarise")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"scores must be finite, not {list(scores)}")
    n, mean = len(scores), statistics.fmean(scores)
    if n == 1:
        return Summary(n, mean, None, None)
    from scipy.stats import t  # slow to import, and needed only here

    std = statistics.stdev(scores)
    return Summary(n, mean, std, float(t.ppf(0.975, n - 1)) * std / math.sqrt(n))
