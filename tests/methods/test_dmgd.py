"""DMGD against closed forms, POT, and the schedule table of its specification."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from analytic import Mixture, dit_denoiser, linear_schedule
from torch.nn.functional import normalize

from workflow_scripts.config import Sampler, SoftLabelSchedule, TransportTerm
from workflow_scripts.diffusion.sampler import Step, sample
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.methods.dmgd import (
    SoftLabels,
    TransportGuidance,
    chord,
    layout,
    renormalise,
    sinkhorn,
    transport_gradient,
)

GRID = respace(linear_schedule(), 50, "linspace")
LABELS = torch.tensor([2, 0])


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- semantic matching


def soft(**options: Any) -> SoftLabels:
    return SoftLabels(dit_denoiser(), SoftLabelSchedule(kind="soft", **options))


@pytest.mark.parametrize(
    ("index", "timestep", "sharpness", "keep", "variance", "linear"),
    [
        (24, 489, 1, 1, 0, 0),
        (25, 510, 0.975, 0.987, 0.158, 0.013),
        (30, 612, 0.720, 0.849, 0.529, 0.151),
        (35, 714, 0.465, 0.682, 0.731, 0.318),
        (40, 816, 0.210, 0.458, 0.889, 0.542),
        (44, 897, 0.007, 0.087, 0.996, 0.913),
        (45, 917, 0, 0, 1, 1),
        (49, 999, 0, 0, 1, 1),
    ],
)
def test_schedule_table(
    index: int, timestep: int, sharpness: float, keep: float, variance: float, linear: float
) -> None:
    """Specification 2.2."""
    assert GRID.timesteps[index] == timestep
    s = soft().sharpness(timestep)
    assert s == pytest.approx(sharpness, abs=5e-4 + 5e-4 * (index == 44))
    assert math.sqrt(s) == pytest.approx(keep, abs=1e-3)
    assert math.sqrt(1 - s) == pytest.approx(variance, abs=1e-3)
    assert 1 - math.sqrt(s) == pytest.approx(linear, abs=1e-3)


def noise_rows(labels: SoftLabels) -> dict[str, torch.Tensor]:
    table = labels.denoiser.label_table
    assert table is not None
    random = torch.Generator().manual_seed(5)
    noise = torch.rand(len(LABELS), 50, 2, *table.shape[1:], generator=random)
    return {"label": LABELS, "other": torch.tensor([1, 1]), "label_noise": noise}


def test_refinement_tells_the_plain_label() -> None:
    assert soft()(24, 489, {}) is None


@pytest.mark.parametrize(("index", "timestep"), [(30, 612), (44, 897), (47, 958)])
def test_code_form(index: int, timestep: int) -> None:
    """E' of specification 2.2, written out per row in numpy, with statistics over the class and the null row together."""
    labels = soft()
    rows = noise_rows(labels)
    made = labels(index, timestep, rows)
    assert made is not None
    s = min(max((900 - timestep) / 400, 0), 1)
    for row in range(2):
        ids = torch.tensor([int(LABELS[row]), labels.denoiser.null_label])
        plain = labels.denoiser.embed(ids).double().numpy()
        other = labels.denoiser.embed(rows["other"][row : row + 1])[0].double().numpy()
        noise = rows["label_noise"][row, index].double().numpy()
        mixed = math.sqrt(s) * plain + math.sqrt(1 - s) * (0.06 * noise + (0.01 * other if timestep <= 900 else 0))
        mixed = (mixed - mixed.mean()) / mixed.std(ddof=1) * plain.std(ddof=1) + plain.mean()
        np.testing.assert_allclose(made[0][row].numpy(), mixed[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(made[1][row].numpy(), mixed[1], rtol=1e-4, atol=1e-6)


def test_paper_form() -> None:
    """f~ of specification 2.1: the null label stays clean, nothing is renormalised, the other class is in from the start."""
    labels = soft(law="gaussian", mixing="linear", null_label="plain", renormalise=False, other_while_exploring=True)
    rows = noise_rows(labels)
    for index, timestep in ((40, 816), (49, 999)):
        made = labels(index, timestep, rows)
        assert made is not None
        root = math.sqrt(max((900 - timestep) / 400, 0))
        own, other = labels.denoiser.embed(LABELS), labels.denoiser.embed(rows["other"])
        expected = root * own + (1 - root) * (0.01 * other + 0.06 * rows["label_noise"][:, index, 0])
        torch.testing.assert_close(made[0], expected)
        torch.testing.assert_close(made[1], labels.denoiser.embed(torch.full_like(LABELS, 3)))


def test_renormalise_restores_mean_and_spread_per_row() -> None:
    plain, mixed = draws(5, 2, 1, 40) * 3 + 1, draws(5, 2, 1, 40, seed=1) * torch.arange(1, 6).view(5, 1, 1, 1)
    made = renormalise(mixed, plain)
    torch.testing.assert_close(made.mean((1, 2, 3)), plain.mean((1, 2, 3)))
    torch.testing.assert_close(made.std((1, 2, 3)), plain.std((1, 2, 3)))


def test_exploration_does_not_see_the_class() -> None:
    """With s = 0 the class reaches the embeddings through their mean and spread alone."""
    labels = soft()
    rows = noise_rows(labels)
    rows["label_noise"][1] = rows["label_noise"][0]
    made = labels(49, 999, rows)
    assert made is not None
    one, two = ((row - row.mean()) / row.std() for row in torch.stack(made, dim=1))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_without_guidance_it_is_plain_sampling_to_the_bit(kind: str) -> None:
    denoiser = dit_denoiser()
    settings = Sampler(kind=kind, steps=10)  # type: ignore[arg-type]
    grid = respace(denoiser.abar, 10, "linspace")
    off = SoftLabels(denoiser, SoftLabelSchedule(kind="soft", explore_above=2000, refine_below=1999))
    rows = {"memory": draws(2, 3, 256), "targets": draws(2, 4, 256), "masses": torch.full((2, 4), 0.25)}
    start, noise = draws(2, 4, 8, 8), draws(2, 10, 4, 8, 8, seed=1)
    plain = sample(denoiser, grid, settings, start, 9, LABELS, noise, [], {})
    nothing = sample(denoiser, grid, settings, start, 9, LABELS, noise, [guidance(scale=0.0, window=(1, 8))], rows, off)
    pulled = sample(denoiser, grid, settings, start, 9, LABELS, noise, [guidance(scale=50.0, window=(1, 8))], rows)
    told = sample(
        denoiser, grid, settings, start, 9, LABELS, noise, [], noise_rows(soft()), SoftLabels(denoiser, soft().settings)
    )
    assert torch.equal(nothing, plain)
    assert not torch.allclose(pulled, plain, atol=1e-3)
    assert not torch.equal(told, plain)


# ---------------------------------------------------------------- transport


def guidance(**options: Any) -> TransportGuidance:
    term = TransportTerm(term="transport", **options)
    return TransportGuidance(**term.model_dump(exclude={"term", "targets", "restarts", "seed"}))


def problem(groups: int = 3, points: int = 4, targets: int = 5, size: int = 12) -> tuple[torch.Tensor, ...]:
    x = draws(groups, points, size).double()
    v = normalize(draws(groups, targets, size, seed=1).double() + 0.5, dim=2)
    masses = draws(groups, targets, seed=2).double().softmax(1)
    weights = torch.full((groups, points), 1 / points).double()
    return x, v, weights, masses


@pytest.mark.parametrize("log_domain", [True, False])
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_plans_are_those_of_pot(log_domain: bool, epsilon: float) -> None:
    x, v, weights, masses = problem()
    cost = chord(x, v)
    plan = sinkhorn(cost, weights, masses, epsilon, 300, log_domain=log_domain)
    for group in range(3):
        expected = ot.sinkhorn(
            weights[group].numpy(), masses[group].numpy(), cost[group].numpy(), epsilon, numItermax=5000, stopThr=1e-13
        )
        np.testing.assert_allclose(plan[group].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("log_domain", [True, False])
def test_groups_of_unequal_size_are_solved_as_if_alone(log_domain: bool) -> None:
    x, v, _, masses = problem()
    weights = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]).double()
    plan = sinkhorn(chord(x, v), weights, masses, 0.1, 7, log_domain=log_domain)
    assert torch.isfinite(plan).all()
    for group, count in enumerate((4, 2, 1)):
        alone = sinkhorn(
            chord(x[group : group + 1, :count], v[group : group + 1]),
            weights[group : group + 1, :count],
            masses[group : group + 1],
            0.1,
            7,
            log_domain=log_domain,
        )
        torch.testing.assert_close(plan[group, :count], alone[0])
        assert float(plan[group, count:].abs().sum()) == 0


def test_marginals_after_the_published_five_sweeps() -> None:
    """Columns are exact after each sweep; rows are within 1e-3 at the published regularisation (specification 12, item 3)."""
    x, v, weights, masses = problem(points=10, targets=10, size=256)
    plan = sinkhorn(chord(x, v), weights, masses, 0.1, 5, log_domain=False)
    torch.testing.assert_close(plan.sum(1), masses, rtol=1e-12, atol=0)
    assert float((plan.sum(2) - weights).abs().max()) < 1e-3


def test_converged_log_domain_survives_where_the_plain_one_underflows() -> None:
    x, v, weights, masses = problem()
    cost = chord(x, v).float()
    hard = sinkhorn(cost, weights.float(), masses.float(), 0.005, 200, log_domain=True)
    assert torch.isfinite(hard).all()
    assert not torch.isfinite(sinkhorn(cost, weights.float(), masses.float(), 0.005, 200, log_domain=False)).all()


def test_a_single_image_is_sent_to_all_targets() -> None:
    """With N = 1 the plan is forced to the masses, and the loss is sum_j m_j C_j (specification 12, item 5)."""
    x, v, _, masses = problem(points=1)
    plan = sinkhorn(chord(x, v), torch.ones(3, 1).double(), masses, 0.1, 5, log_domain=False)
    torch.testing.assert_close(plan[:, 0], masses)


def test_closed_form_gradient_is_autograds_at_a_fixed_plan() -> None:
    x, v, weights, masses = problem()
    plan = sinkhorn(chord(x, v), weights, masses, 0.1, 5, log_domain=False)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((plan * chord(leaf, v)).sum(), leaf)
    made = transport_gradient(x, v, plan)
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-12)
    assert float((made * x).sum(2).abs().max()) < 1e-12  # a pull along x leaves the sphere's point where it is


def test_differentiated_plan_is_the_gradient_of_the_whole_loss() -> None:
    """By finite differences, in float64."""
    x, v, weights, masses = problem(groups=1)
    term = guidance(differentiate_plan=True)

    def loss(points: torch.Tensor) -> float:
        cost = chord(points, v)
        return float((term.plan(cost, weights, masses) * cost).sum())

    made = term.gradient(x, weights, v, masses)
    for place in ((0, 0, 0), (0, 2, 7), (0, 3, 11)):
        step = torch.zeros_like(x)
        step[place] = 1e-5
        assert float(made[place]) == pytest.approx((loss(x + step) - loss(x - step)) / 2e-5, rel=1e-4, abs=1e-9)
    fixed = guidance().gradient(x, weights, v, masses)
    assert not torch.allclose(made, fixed, rtol=1e-3)
    assert float(torch.cosine_similarity(made.flatten(), fixed.flatten(), 0)) > 0.8


def step_at(x0: torch.Tensor, abar: float = 0.02) -> Step:
    return Step(35, abar, x0, x0, torch.ones_like(x0))


def test_published_pull_is_rho_times_the_gradient_through_tweedie() -> None:
    """grad_x <P, C> = dx0/dx dL/dx0 with dx0/dx = 1/sqrt(abar), here by autograd through Tweedie's formula itself."""
    targets, masses, memory = draws(2, 5, 16, seed=1), draws(2, 5, seed=2).softmax(1), draws(2, 3, 16, seed=3)
    eps, abar = draws(2, 1, 4, 4, seed=4), 0.02
    x = draws(2, 1, 4, 4).requires_grad_()
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    points = torch.cat([memory, x0.flatten(1)[:, None]], dim=1)
    cost = chord(points, normalize(targets, dim=2))
    plan = sinkhorn(cost, torch.full((2, 4), 0.25), masses, 0.1, 5, log_domain=False).detach()
    (expected,) = torch.autograd.grad((plan * cost).sum(), x)
    rows = {"targets": targets, "masses": masses, "memory": memory}
    made = guidance(scale=0.5)(step_at(x0.detach(), abar), rows)
    torch.testing.assert_close(made, -0.5 * expected, rtol=1e-4, atol=1e-7)


def test_unit_gradient_does_not_fade_with_the_memory() -> None:
    x0, targets, masses = draws(1, 4, 8, 8), draws(1, 5, 256, seed=1), torch.full((1, 5), 0.2)
    sizes, published = [], []
    for count in (0, 1, 9, 49):
        rows = {"targets": targets, "masses": masses, "memory": draws(1, count, 256, seed=count + 2)}
        sizes.append(float(guidance(scale=0.05, unit_gradient=True)(step_at(x0), rows).norm()))
        published.append(float(guidance()(step_at(x0), rows).norm()))
    assert sizes == pytest.approx([0.05 * 16] * 4, rel=1e-5)
    assert published[3] < published[0] / 20


def test_synchronous_rows_see_their_own_set_alone() -> None:
    targets, masses = draws(2, 5, 16, seed=1), draws(2, 5, seed=2).softmax(1)
    term = guidance(matching="synchronous", unit_gradient=True)
    x0 = draws(5, 1, 4, 4)
    which = [0, 0, 0, 1, 1]
    sets = torch.tensor([7, 7, 7, 4, 4])
    both = term(step_at(x0), {"set": sets, "targets": targets[which], "masses": masses[which]})
    first = term(step_at(x0[:3]), {"set": sets[:3], "targets": targets[[0] * 3], "masses": masses[[0] * 3]})
    second = term(step_at(x0[3:]), {"set": sets[3:], "targets": targets[[1] * 2], "masses": masses[[1] * 2]})
    torch.testing.assert_close(both, torch.cat([first, second]))


def test_layout() -> None:
    group, place, first = layout(torch.tensor([7, 7, 4, 7, -1, 4, -1]))
    assert group.tolist() == [0, 0, 1, 0, 2, 1, 3]
    assert place.tolist() == [0, 1, 0, 2, 0, 1, 0]
    assert first.tolist() == [0, 2, 4, 6]


def test_window_includes_both_ends() -> None:
    assert [index for index in range(50) if guidance().acts_at(index)] == list(range(30, 46))


def test_transport_spreads_a_set_over_the_modes() -> None:
    """Four modes on the sphere: a set made with the normalised term covers more of them than plain sampling does."""
    modes = 3 * torch.eye(16)[:4].view(4, 1, 4, 4)
    model = Mixture([modes], 0.25)
    settings = Sampler(kind="ddpm", steps=50, cfg_scale=1.0)
    grid = respace(model.abar, 50, "linspace")
    term = guidance(
        scale=0.4, window=(5, 49), epsilon=0.03, sweeps=50, log_domain=True, unit_gradient=True, matching="synchronous"
    )
    sets = 24
    which = torch.arange(sets).repeat_interleave(4)
    rows = {
        "set": which,
        "targets": modes.view(1, 4, 16).expand(4 * sets, -1, -1),
        "masses": torch.full((4 * sets, 4), 0.25),
    }
    start, noise = draws(4 * sets, 1, 4, 4), draws(4 * sets, 50, 1, 4, 4, seed=1)
    labels = torch.zeros(4 * sets, dtype=torch.int64)

    def covered(terms: list[TransportGuidance]) -> float:
        x = sample(model, grid, settings, start, 49, labels, noise, terms, rows)  # type: ignore[arg-type]
        nearest = torch.cdist(x.flatten(1), modes.flatten(1)).argmin(1).view(sets, 4)
        return float(np.mean([len(set(row.tolist())) for row in nearest]))

    plain, guided = covered([]), covered([term])
    assert plain < 3.1  # 4 (1 - (3/4)^4) = 2.73 expected
    assert guided > plain + 0.7
