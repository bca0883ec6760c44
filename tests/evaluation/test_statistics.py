import itertools
import math
from collections.abc import Hashable

import numpy as np
import pytest
from scipy.stats import nct

from workflow_scripts.evaluation.statistics import (
    bootstrap_interval,
    compare,
    holm,
    levels,
    merge_equal_sets,
    rank,
    summarize,
)


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


def draw(
    rng: np.random.Generator, sets: int, repeats: int, between: float, within: float, mean: float = 50.0
) -> dict[Hashable, list[float]]:
    centres = mean + between * rng.standard_normal(sets)
    return {
        seed: (centre + within * rng.standard_normal(repeats)).tolist() for seed, centre in enumerate(centres.tolist())
    }


def test_levels_of_a_balanced_table_by_hand() -> None:
    found = levels({0: [40.0, 42.0], 1: [44.0, 46.0], 2: [48.0, 50.0]})
    assert (found.sets, found.trainings, found.mean, found.spread) == (3, 6, 45.0, 4.0)
    assert found.variance_within == pytest.approx(2.0)  # each pair has variance 2
    assert found.variance_between == pytest.approx(4.0**2 - 2.0 / 2)
    assert found.std_between == pytest.approx(math.sqrt(15))
    assert found.std_within == pytest.approx(math.sqrt(2))
    assert found.standard_error == pytest.approx(4 / math.sqrt(3))
    assert found.interval == pytest.approx((45 - 4.302653 * 4 / math.sqrt(3), 45 + 4.302653 * 4 / math.sqrt(3)))
    assert found.warning == ""


def test_every_set_counts_the_same_however_often_it_was_trained_on() -> None:
    found = levels({0: [40.0] * 9 + [49.0], 1: [50.9]})
    assert found.mean == pytest.approx((40.9 + 50.9) / 2)
    assert found.variance_within == pytest.approx(9 * 0.9**2 / 9 + 8.1**2 / 9)


def test_sets_that_differ_less_than_trainings_have_a_negative_variance() -> None:
    found = levels({0: [40.0, 50.0], 1: [50.0, 40.0]})
    assert found.variance_between == pytest.approx(-25.0)
    assert found.std_between == 0.0


def test_one_set_or_one_training_each_is_said() -> None:
    alone = levels({0: [40.0, 41.0]})
    assert (alone.spread, alone.standard_error, alone.interval, alone.variance_between) == (None, None, None, None)
    assert alone.variance_within == pytest.approx(0.5)
    assert "one distilled set" in alone.warning
    single = levels({0: [40.0], 1: [42.0]})
    assert (single.variance_between, single.variance_within) == (None, None)
    assert (single.std_between, single.std_within) == (None, None)
    assert "one training per distilled set" in single.warning


@pytest.mark.parametrize("repeats", [(3, 3, 3, 3), (1, 2, 3, 6)])
def test_variance_components_are_unbiased(repeats: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3000):
        table = {key: group[: repeats[seed]] for seed, (key, group) in enumerate(draw(rng, 4, 6, 2, 3).items())}
        result = levels(table)
        found.append((result.variance_between, result.variance_within, result.mean))
    means = np.mean(found, axis=0)
    errors = np.std(found, axis=0) / math.sqrt(3000)
    assert np.all(np.abs(means - [4, 9, 50]) < 4 * errors)


@pytest.mark.parametrize("broken", [{}, {0: []}, {0: [1.0], 1: []}, {0: [math.inf]}])
def test_incomplete_scores_are_rejected(broken: dict[Hashable, list[float]]) -> None:
    for function in (levels, lambda scores: bootstrap_interval(scores, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="scores"):
            function(broken)


def test_the_bootstrap_has_the_variance_of_two_stage_sampling() -> None:
    scores = {0: [40.0, 43.0, 49.0], 1: [51.0, 51.0, 54.0], 2: [45.0, 47.0, 58.0], 3: [40.0, 60.0, 44.0]}
    table = np.array(list(scores.values()))
    variance = table.mean(1).var() / 4 + table.var(1).mean() / (4 * 3)
    low, high = bootstrap_interval(scores, np.random.default_rng(0), level=0.6827, resamples=40_000, corrected=False)
    assert (high - low) / 2 == pytest.approx(math.sqrt(variance), rel=0.05)
    assert (high + low) / 2 == pytest.approx(table.mean(), abs=0.1)
    wide = bootstrap_interval(scores, np.random.default_rng(0), level=0.6827, resamples=40_000)
    stretch = math.sqrt(4 / 3) * 1.1969 / 1.0
    assert wide[1] - table.mean() == pytest.approx(stretch * (high - table.mean()), rel=2e-3)


def test_the_bootstrap_depends_on_its_generator_alone() -> None:
    scores = draw(np.random.default_rng(1), 3, 2, 1, 1)
    first, again = (bootstrap_interval(scores, np.random.default_rng(5), resamples=500) for _ in range(2))
    assert first == again != bootstrap_interval(scores, np.random.default_rng(6), resamples=500)


def test_the_bootstrap_of_unequal_repeats_uses_existing_scores_only() -> None:
    scores = {0: [10.0], 1: [20.0, 20.0, 20.0], 2: [30.0, 30.0]}
    low, high = bootstrap_interval(scores, np.random.default_rng(0), corrected=False)
    assert (low, high) == (10.0, 30.0)


def test_the_bootstrap_of_one_set_speaks_of_its_trainings() -> None:
    assert bootstrap_interval({0: [40.0]}, np.random.default_rng(0)) is None
    low, high = bootstrap_interval({0: [40.0, 41.0, 42.0]}, np.random.default_rng(0))
    assert low < 41 < high
    assert bootstrap_interval({0: [40.0, 40.0]}, np.random.default_rng(0)) == (40.0, 40.0)


@pytest.mark.parametrize(("level", "resamples"), [(1.0, 10), (0.9, 0)])
def test_the_bootstrap_checks_its_settings(level: float, resamples: int) -> None:
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval({0: [1.0, 2.0]}, np.random.default_rng(0), level=level, resamples=resamples)


@pytest.mark.parametrize(
    ("sets", "repeats", "between", "within", "most"),
    [
        (3, 1, 1.0, 1.0, 0.98),
        (3, 3, 2.0, 1.0, 0.98),
        (5, 3, 2.0, 1.0, 0.98),
        (10, 2, 1.0, 0.5, 0.98),
        (5, 3, 0.0, 1.0, 1),
    ],
)
def test_bootstrap_intervals_hold_the_mean_as_often_as_they_say(
    sets: int, repeats: int, between: float, within: float, most: float
) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(600):
        low, high = bootstrap_interval(draw(rng, sets, repeats, between, within), rng, resamples=600)
        held += low <= 50 <= high
    assert 0.92 <= held / 600 <= most


def test_without_the_correction_few_sets_give_intervals_that_are_too_short() -> None:
    rng = np.random.default_rng(8)
    intervals = [bootstrap_interval(draw(rng, 3, 1, 1, 1), rng, resamples=300, corrected=False) for _ in range(400)]
    assert sum(low <= 50 <= high for low, high in intervals) / 400 < 0.85


@pytest.mark.parametrize(("sets", "repeats"), [(3, 1), (3, 4), (8, 2)])
def test_t_intervals_over_sets_hold_the_mean_where_trainings_taken_as_sets_do_not(sets: int, repeats: int) -> None:
    rng = np.random.default_rng(9)
    honest = naive = 0
    for _ in range(2000):
        table = draw(rng, sets, repeats, 2, 1)
        low, high = levels(table).interval
        honest += low <= 50 <= high
        low, high = summarize([score for group in table.values() for score in group]).interval
        naive += low <= 50 <= high
    assert 0.93 <= honest / 2000 <= 0.97
    if repeats == 4:
        assert naive / 2000 < 0.8


def test_a_paired_comparison_by_hand() -> None:
    found = compare({0: [41.0], 1: [43.0], 2: [48.0]}, {0: [40.0], 1: [41.0], 2: [45.0]})
    assert (found.seeds, found.unpaired, found.difference, found.warning) == (3, 0, 2.0, "")
    assert found.interval == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    t = 2 * math.sqrt(3)
    assert found.p_value == pytest.approx(1 - t / math.sqrt(2 + t**2))  # closed form for two degrees of freedom
    assert found.effect == pytest.approx(2 / math.sqrt(math.pi))  # d_z = 2, Hedges' correction 1 / sqrt(pi)
    low, high = found.effect_interval
    assert nct.cdf(t, 2, low * math.sqrt(3)) == pytest.approx(0.975, abs=1e-5)
    assert nct.cdf(t, 2, high * math.sqrt(3)) == pytest.approx(0.025, abs=1e-5)


def test_a_comparison_turns_with_its_arguments() -> None:
    first, second = draw(np.random.default_rng(0), 5, 2, 1, 1), draw(np.random.default_rng(1), 5, 2, 1, 1)
    forth, back = compare(first, second), compare(second, first)
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.effect == pytest.approx(-back.effect)
    assert forth.p_value == pytest.approx(back.p_value)
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert forth.effect_interval == pytest.approx((-back.effect_interval[1], -back.effect_interval[0]))


def test_only_shared_seeds_are_compared_and_repeats_are_averaged() -> None:
    found = compare({0: [40.0, 42.0], 1: [50.0], 2: [99.0]}, {0: [40.0], 1: [47.0], 7: [1.0]})
    assert (found.seeds, found.unpaired, found.difference) == (2, 2, 2.0)
    assert found.effect is None
    assert found.effect_interval is not None


def test_what_cannot_be_tested_says_so() -> None:
    one = compare({0: [41.0, 42.0]}, {0: [40.0]})
    assert (one.difference, one.interval, one.p_value, one.effect) == (1.5, None, None, None)
    assert "one pair" in one.warning
    same = compare({0: [40.0], 1: [41.0]}, {0: [40.0], 1: [41.0]})
    assert (same.difference, same.p_value, same.effect, same.warning) == (0.0, 1.0, None, "")
    constant = compare({0: [41.1], 1: [42.1]}, {0: [40.0], 1: [41.0]})
    assert constant.p_value is None
    assert "no spread" in constant.warning
    with pytest.raises(ValueError, match="no seed in common"):
        compare({0: [1.0]}, {1: [1.0]})
    with pytest.raises(ValueError, match="level"):
        compare({0: [1.0]}, {0: [1.0]}, level=0)


def test_intervals_of_effects_hold_the_true_effect() -> None:
    rng = np.random.default_rng(3)
    held = held_difference = rejected = 0
    for _ in range(1500):
        differences = 1.5 + rng.standard_normal(4)
        found = compare(dict(enumerate([d] for d in differences.tolist())), {seed: [0.0] for seed in range(4)})
        held += found.effect_interval[0] <= 1.5 <= found.effect_interval[1]
        held_difference += found.interval[0] <= 1.5 <= found.interval[1]
        rejected += (found.p_value < 0.05) == (found.interval[0] > 0 or found.interval[1] < 0)
    assert 0.93 <= held / 1500 <= 0.97
    assert 0.93 <= held_difference / 1500 <= 0.97
    assert rejected == 1500


def test_hedges_correction_takes_out_the_bias_of_few_seeds() -> None:
    rng = np.random.default_rng(4)
    effects = [
        compare(
            dict(enumerate([d] for d in (1 + rng.standard_normal(6)).tolist())), {s: [0.0] for s in range(6)}
        ).effect
        for _ in range(3000)
    ]
    assert abs(np.mean(effects) - 1) < 4 * np.std(effects) / math.sqrt(3000)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.6, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values"):
        holm([0.5, math.nan])


def shifted(by: float, noise: tuple[float, ...] = (0.0, 0.1, -0.1, 0.05, -0.05)) -> dict[Hashable, list[float]]:
    return {seed: [50 + 3 * seed + by + extra] for seed, extra in enumerate(noise)}


def test_a_ranking_sees_what_pairing_shows_and_overlapping_intervals_hide() -> None:
    found = rank(
        {
            "low": shifted(-5, (0.1, 0.0, 0.0, -0.1, 0.0)),
            "high": shifted(5),
            "high too": shifted(5.05, (0.1, 0.0, -0.2, 0.0, 0.1)),
        }
    )
    assert [(entry.method, entry.place, entry.groups) for entry in found.entries] == [
        ("high too", 1, (0,)),
        ("high", 1, (0,)),
        ("low", 3, (1,)),
    ]
    assert found.distinguishable("low", "high") and found.distinguishable("high", "low")
    assert not found.distinguishable("high", "high too")
    assert all("one training per distilled set" in warning for warning in found.warnings)


def test_a_method_between_two_others_is_in_both_groups() -> None:
    rng = np.random.default_rng(0)
    noisy = {seed: [50 + 3 * seed + extra] for seed, extra in enumerate(rng.normal(0, 4, 5).tolist())}
    found = rank({"top": shifted(2), "middle": noisy, "bottom": shifted(-2, (0.1, 0.0, 0.0, -0.1, 0.0))})
    groups = {entry.method: entry.groups for entry in found.entries}
    assert groups == {"top": (0,), "middle": (0, 1), "bottom": (1,)}


def test_groups_share_a_number_exactly_where_methods_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        names = [f"m{index}" for index in range(7)]
        found = rank({name: draw(rng, 4, 1, 0.5, 0.5, 50 + 2 * rng.standard_normal()) for name in names})
        groups = {entry.method: set(entry.groups) for entry in found.entries}
        assert all(groups.values())
        for first, second in itertools.combinations(names, 2):
            assert found.distinguishable(first, second) == groups[first].isdisjoint(groups[second])


def test_rankings_of_equal_methods_rarely_find_a_difference() -> None:
    rng = np.random.default_rng(12)
    found = [rank({f"m{index}": draw(rng, 4, 1, 1, 1) for index in range(4)}) for _ in range(400)]
    assert sum(any(p < 0.05 for p in ranking.p_values.values()) for ranking in found) / 400 <= 0.07


def test_a_ranking_warns_of_one_set_and_of_pairs_it_cannot_test() -> None:
    found = rank({"alone": {0: [90.0, 91.0]}, "other": shifted(0), "elsewhere": {9: [1.0], 10: [2.0]}})
    assert [entry.place for entry in found.entries] == [1, 1, 1]
    assert any(warning.startswith("alone: rests on one distilled set") for warning in found.warnings)
    assert any("alone and other" in warning for warning in found.warnings)
    assert found.comparisons["alone", "elsewhere"] is None
    with pytest.raises(ValueError, match="needs a method"):
        rank({})


def test_seeds_with_the_same_set_are_one_set() -> None:
    scores = {0: [40.0], 1: [42.0], 2: [44.0]}
    merged = merge_equal_sets(scores, {0: "a", 1: "a", 2: "b"})
    assert merged == {"a": [40.0, 42.0], "b": [44.0]}
    assert "one distilled set" in levels(merge_equal_sets(scores, dict.fromkeys(scores, "a"))).warning
    with pytest.raises(ValueError, match="which distilled set seed 2 has"):
        merge_equal_sets(scores, {0: "a", 1: "a"})
    seeds = range(5)
    found = rank(
        {"herding": shifted(0), "dit": shifted(-5, (0.1, 0.0, 0.0, -0.1, 0.0))},
        sets={"herding": dict.fromkeys(seeds, "the one"), "dit": {seed: f"set {seed}" for seed in seeds}},
    )
    assert [entry.levels.sets for entry in found.entries] == [1, 5]
    assert found.distinguishable("herding", "dit")
    assert any(warning.startswith("herding: rests on one distilled set") for warning in found.warnings)
