"""Statistics over repeated scores: mean, spread at each level, intervals, and which differences can be told apart.

A method's scores have two levels: distilled sets, one per seed, and trainings on each set, its repeats. Two trainings on
one set share that set's luck, so the sets, not the trainings, are the sample that an interval of the method rests on.
"""

import itertools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Mapping[Hashable, Sequence[float]]
"""The scores of one method: for each seed (or whatever names a distilled set) one score per training on it."""


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
    std = statistics.stdev(scores)
    return Summary(n, mean, std, _t_quantile(0.975, n - 1) * std / math.sqrt(n))


@dataclass(frozen=True)
class Levels:
    """Scores of one method taken apart by level, in the unit of the scores.

    Attributes:
        sets: Number of distilled sets.
        trainings: Number of trainings on all of them.
        mean: Mean over the sets of each set's mean, so that every set counts the same.
        spread: Sample standard deviation of the sets' means; None for one set. It holds the variation between sets and
            what is left of the variation between trainings after averaging over a set's repeats.
        standard_error: Of ``mean`` as the method's mean over sets yet to be drawn; None for one set.
        variance_between: Unbiased estimate of the variance between sets alone; it may be negative where sets differ less
            than their trainings make them. None for one set, or where no set has two trainings.
        variance_within: Unbiased estimate of the variance between trainings on one set; None where no set has two.
        warning: What the numbers cannot tell, for the reader of a table; empty if there is nothing.
    """

    sets: int
    trainings: int
    mean: float
    spread: float | None
    standard_error: float | None
    variance_between: float | None
    variance_within: float | None
    warning: str

    @property
    def std_between(self) -> float | None:
        """Standard deviation between sets; 0 where the unbiased variance is negative."""
        return None if self.variance_between is None else math.sqrt(max(self.variance_between, 0.0))

    @property
    def std_within(self) -> float | None:
        """Standard deviation between trainings on one set."""
        return None if self.variance_within is None else math.sqrt(self.variance_within)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean by Student's t over sets, or None for one set."""
        if self.standard_error is None:
            return None
        half = _t_quantile(0.975, self.sets - 1) * self.standard_error
        return self.mean - half, self.mean + half


def levels(scores: Scores) -> Levels:
    """Take scores apart into what varies between distilled sets and what varies between trainings on one set.

    The components are those of the one-way random-effects analysis of variance, also for unequal numbers of repeats
    (Searle, Casella and McCulloch 1992, section 3.6).

    Raises:
        ValueError: There is no set, a set has no score, or a score is not finite.
    """
    groups = _groups(scores)
    sets, counts = len(groups), [len(group) for group in groups]
    total = sum(counts)
    means = [statistics.fmean(group) for group in groups]
    mean = statistics.fmean(means)
    spread = statistics.stdev(means) if sets > 1 else None
    within = None
    if total > sets:
        inside = sum((score - m) ** 2 for group, m in zip(groups, means, strict=True) for score in group)
        within = inside / (total - sets)
    between = None
    if sets > 1 and within is not None:
        weighted = sum(n * m for n, m in zip(counts, means, strict=True)) / total
        among = sum(n * (m - weighted) ** 2 for n, m in zip(counts, means, strict=True)) / (sets - 1)
        effective = (total - sum(n * n for n in counts) / total) / (sets - 1)
        between = (among - within) / effective
    if sets == 1:
        warning = "rests on one distilled set: nothing is known of how another set of the method would do"
    elif within is None:
        warning = "one training per distilled set: the spread mixes sets and trainings"
    else:
        warning = ""
    error = None if spread is None else spread / math.sqrt(sets)
    return Levels(sets, total, mean, spread, error, between, within, warning)


def merge_equal_sets(scores: Scores, sets: Mapping[Hashable, Hashable]) -> Scores:
    """Pool the scores of seeds that gave the same distilled set, as those of a method without chance do.

    Args:
        scores: The scores of each seed.
        sets: What names the set of each seed, such as its digest.

    Returns:
        The scores of each set, under the set's name.

    Raises:
        ValueError: A seed's set is not given.
    """
    merged: dict[Hashable, list[float]] = {}
    for seed, group in scores.items():
        if seed not in sets:
            raise ValueError(f"it is not given which distilled set seed {seed} has")
        merged.setdefault(sets[seed], []).extend(group)
    return merged


def bootstrap_interval(
    scores: Scores,
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    corrected: bool = True,
) -> tuple[float, float] | None:
    """Return an interval of a method's mean by a hierarchical bootstrap: sets are drawn, then trainings within each.

    With few sets, percentiles of resampled means are too close to the mean: they lack the factor n / (n - 1) of the
    variance and know no uncertainty of the spread. ``corrected`` stretches them about the mean by what that takes for
    normal scores, sqrt(n / (n - 1)) t / z for n sets (after Hesterberg 2015, The American Statistician 69). Where sets
    hardly differ, drawing trainings as well makes the interval wider than it need be (Davison and Hinkley 1997, 3.8).

    With one set only its trainings are drawn: the interval is then that of the one set, see ``Levels.warning``.

    Args:
        scores: One sequence of scores for each distilled set.
        generator: Source of all draws.
        level: Probability that the interval should hold the mean.
        resamples: Number of resampled means.
        corrected: See above; without it, the plain percentiles.

    Returns:
        Lower and upper end in the unit of the scores; None for a single score.

    Raises:
        ValueError: There is no set, a set has no score, a score is not finite, or ``level`` or ``resamples`` is out of range.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must be in (0, 1) and resamples positive, not {level} and {resamples}")
    groups = _groups(scores)
    sets, counts = len(groups), np.array([len(group) for group in groups])
    independent = sets if sets > 1 else int(counts[0])
    if independent == 1:
        return None
    table = np.zeros((sets, counts.max()))
    for row, group in zip(table, groups, strict=True):
        row[: len(group)] = group
    drawn = generator.integers(sets, size=(resamples, sets))[..., None]
    many = counts[drawn]
    columns = (generator.random((resamples, sets, counts.max())) * many).astype(np.int64)
    used = np.arange(counts.max()) < many
    means = ((table[drawn, columns] * used).sum(2) / many[..., 0]).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    centre, stretch = statistics.fmean(statistics.fmean(group) for group in groups), 1.0
    if corrected:
        tail = (1 + level) / 2
        z = statistics.NormalDist().inv_cdf(tail)
        stretch = math.sqrt(independent / (independent - 1)) * _t_quantile(tail, independent - 1) / z
    return float(centre + stretch * (low - centre)), float(centre + stretch * (high - centre))


@dataclass(frozen=True)
class Comparison:
    """The first method minus the second, seed by seed.

    Attributes:
        seeds: Number of seeds that both have.
        unpaired: Number of seeds that only one of them has, which were left out.
        difference: Mean difference of the seeds' means, in the unit of the scores.
        interval: Its interval by Student's t over seeds; None for one seed.
        p_value: Two-sided, of the paired t test; 1 where all differences are 0, None for one seed or where equal
            differences leave nothing to test against.
        effect: Cohen's d of paired samples (d_z), the mean difference over its standard deviation, times the correction
            for few seeds of Hedges (1981); None for two seeds, which leave it unbounded, and where there is no spread.
        effect_interval: Exact interval of d_z for normal differences, from the noncentral t distribution; None for one
            seed, and where there is no spread.
        warning: What the comparison cannot tell; empty if there is nothing.
    """

    seeds: int
    unpaired: int
    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    effect: float | None
    effect_interval: tuple[float, float] | None
    warning: str


def compare(first: Scores, second: Scores, *, level: float = 0.95) -> Comparison:
    """Compare two methods on the seeds that they share, each seed's repeats averaged.

    Pairing takes out what a seed does to both methods, such as the student's weights and the noise of the sampler.

    Args:
        first: Scores of the first method; a seed must mean the same in both.
        second: Scores of the second.
        level: Probability that the intervals should hold what they estimate.

    Raises:
        ValueError: No seed is shared, a set has no score, a score is not finite, or ``level`` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    _groups(first)
    _groups(second)
    shared = [seed for seed in first if seed in second]
    if not shared:
        raise ValueError("the methods have no seed in common")
    differences = [statistics.fmean(first[seed]) - statistics.fmean(second[seed]) for seed in shared]
    n, mean = len(shared), statistics.fmean(differences)
    unpaired = len(first) + len(second) - 2 * n
    if n == 1:
        return Comparison(1, unpaired, mean, None, None, None, None, "rests on one pair of distilled sets")
    std, tail = statistics.stdev(differences), (1 + level) / 2
    half = _t_quantile(tail, n - 1) * std / math.sqrt(n)
    interval = (mean - half, mean + half)
    if std <= 1e-12 * max(map(abs, differences)):
        equal = not any(differences)
        warning = "" if equal else "all seeds differ by the same amount: there is no spread to test against"
        return Comparison(n, unpaired, mean, interval, 1.0 if equal else None, None, None, warning)
    from scipy.special import gammaln, nctdtrinc, stdtr

    statistic, df = mean / std * math.sqrt(n), n - 1
    p_value = float(2 * stdtr(df, -abs(statistic)))
    effect = None
    if df > 1:
        effect = mean / std * math.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    ends = [float(nctdtrinc(df, p, abs(statistic))) / math.sqrt(n) for p in (tail, 1 - tail)]
    effect_interval = None
    if all(map(math.isfinite, ends)):
        effect_interval = (ends[0], ends[1]) if mean > 0 else (-ends[1], -ends[0])
    return Comparison(n, unpaired, mean, interval, p_value, effect, effect_interval, "")


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values, in the order given: they control the chance of any false difference.

    Raises:
        ValueError: A p-value is not in [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must be in [0, 1], not {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Ranked:
    """One line of a ranking.

    Attributes:
        method: Its name.
        levels: Its mean and spread.
        place: 1 plus the number of methods that are clearly better.
        groups: Numbers, from 0, of the groups it is in; two methods that share one cannot be told apart.
    """

    method: str
    levels: Levels
    place: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Ranking:
    """Methods by mean, and which of their differences are more than chance.

    Attributes:
        entries: The methods, best mean first.
        comparisons: For each pair, better mean first, the comparison on shared seeds; None without a shared seed.
        p_values: Holm's adjusted p-value of each pair; 1 where there is nothing to test with.
        alpha: Chance of any false difference.
        warnings: What the ranking cannot tell, one sentence each.
    """

    entries: tuple[Ranked, ...]
    comparisons: Mapping[tuple[str, str], Comparison | None]
    p_values: Mapping[tuple[str, str], float]
    alpha: float
    warnings: tuple[str, ...]

    def distinguishable(self, first: str, second: str) -> bool:
        """Whether two methods differ by more than chance."""
        pair = (first, second) if (first, second) in self.p_values else (second, first)
        return self.p_values[pair] < self.alpha


def rank(
    methods: Mapping[str, Scores],
    *,
    sets: Mapping[str, Mapping[Hashable, Hashable]] | None = None,
    alpha: float = 0.05,
) -> Ranking:
    """Rank methods by mean and tell which can be told apart: all pairs are compared on shared seeds, Holm-corrected.

    Groups are the letters of a compact display (Piepho 2004): two methods are distinguishable if they share none. That two
    methods share a group does not show that they are equal.

    Args:
        methods: Scores of each method by seed; all of one data set, IPC, architecture and protocol.
        sets: For each method, what names the distilled set of each seed (see :func:`merge_equal_sets`): equal sets count
            once in ``Ranked.levels``, while comparisons stay by seed. Without it, every seed is taken for another set.
        alpha: Chance of calling any difference real when none is.

    Raises:
        ValueError: There is no method, scores are missing or not finite, or ``alpha`` is out of range.
    """
    if not methods or not 0 < alpha < 1:
        raise ValueError("a ranking needs a method, and alpha in (0, 1)")
    by_method = {
        name: levels(scores if sets is None else merge_equal_sets(scores, sets[name]))
        for name, scores in methods.items()
    }
    order = sorted(methods, key=lambda name: by_method[name].mean, reverse=True)
    pairs = list(itertools.combinations(order, 2))
    comparisons = {
        (a, b): compare(methods[a], methods[b]) if set(methods[a]) & set(methods[b]) else None for a, b in pairs
    }
    raw = [1.0 if found is None or found.p_value is None else found.p_value for found in comparisons.values()]
    p_values = dict(zip(pairs, holm(raw), strict=True))
    better = [
        # a pair is ordered by the methods' means, which unshared seeds can turn against the paired difference
        (a, b) if (found := comparisons[a, b]) is not None and found.difference > 0 else (b, a)
        for a, b in pairs
        if p_values[a, b] < alpha
    ]
    groups = _groups_apart(order, better)
    warnings = [f"{name}: {by_method[name].warning}" for name in order if by_method[name].warning]
    untested = [f"{a} and {b}" for (a, b), found in comparisons.items() if found is None or found.p_value is None]
    if untested:
        warnings.append(f"too few shared seeds, or no spread, to compare {', '.join(untested)}")
    entries = tuple(
        Ranked(
            name,
            by_method[name],
            1 + sum(loser == name for _, loser in better),
            tuple(number for number, group in enumerate(groups) if name in group),
        )
        for name in order
    )
    return Ranking(entries, comparisons, p_values, alpha, tuple(warnings))


def _groups_apart(order: Sequence[str], apart: Sequence[tuple[str, str]]) -> list[set[str]]:
    """Split until no group holds a pair that is apart, and drop groups within others (insert and absorb)."""
    groups = [set(order)]
    for pair in apart:
        split: list[set[str]] = []
        for group in groups:
            split += [group - {name} for name in pair] if group.issuperset(pair) else [group]
        groups = []
        for group in sorted(split, key=len, reverse=True):
            if not any(group <= kept for kept in groups):
                groups.append(group)
    return sorted(groups, key=lambda group: sorted(map(order.index, group)))


def _groups(scores: Scores) -> list[list[float]]:
    groups = [list(group) for group in scores.values()]
    if not groups or not all(groups):
        raise ValueError("no scores: every distilled set needs at least one")
    if not all(math.isfinite(score) for group in groups for score in group):
        raise ValueError(f"scores must be finite, not {groups}")
    return groups


def _t_quantile(probability: float, degrees: int) -> float:
    from scipy.special import stdtrit  # slow to import, and needed only here

    return float(stdtrit(degrees, probability))
