from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import linear_schedule

from workflow_scripts.config import TangentTerm
from workflow_scripts.diffusion.sampler import Step
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.methods.manifoldgd import (
    ReleasedManifold,
    TangentGuidance,
    project,
    shared_latents,
    tangent_rows,
    tangent_spaces,
)
from workflow_scripts.methods.mgd3 import ModeGuidance

SHAPE = (4, 4, 4)
D = 64


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plane(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return n latents on a random d-dimensional plane in R^D, an orthonormal basis (D, d) of it, and its origin."""
    basis = torch.linalg.qr(draws(D, d, seed=seed)).Q
    origin = draws(D, seed=seed + 1)
    return origin + draws(n, d, seed=seed + 2) @ basis.T, basis, origin


def projector(basis: torch.Tensor) -> torch.Tensor:
    return (basis @ basis.mT).double()


def step(x0: torch.Tensor, x: torch.Tensor | None = None, index: int = 40, sigma: float = 0.5) -> Step:
    grid = respace(linear_schedule(), 50, "linspace")
    x = x0 if x is None else x
    return Step(index, float(grid.abar[index]), x, x0, torch.full_like(x0, sigma))


def fit(
    latents: torch.Tensor,
    prototypes: torch.Tensor,
    *,
    sizes: list[int] | None = None,
    neighbours: int = 64,
    variance: float = 0.9,
    dimension: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    limits = torch.tensor(sizes or [neighbours] * len(prototypes))
    return tangent_spaces(prototypes.float(), limits, latents.float(), neighbours, variance, dimension)


# ---------------------------------------------------------------- tangent spaces


@pytest.mark.parametrize("d", [1, 3, 10])
def test_data_on_a_plane_span_it(d: int) -> None:
    latents, basis, origin = plane(100, d)
    tangent, centre = fit(latents, latents[:5], variance=1.0, neighbours=40)
    assert tangent.shape == (5, D, 40)
    np.testing.assert_allclose(projector(tangent), projector(basis).expand(5, D, D), atol=1e-5)
    torch.testing.assert_close(
        tangent.mT @ tangent, torch.diag_embed((tangent.norm(dim=1) > 0.5).float()), atol=1e-5, rtol=0
    )
    offset = centre.double() - origin
    assert float((offset - offset @ projector(basis)).norm()) < 1e-5


@pytest.mark.parametrize("d", [1, 3, 10])
def test_guidance_on_a_plane_has_no_normal_part(d: int) -> None:
    latents, basis, _ = plane(100, d)
    prototype = latents[:4]
    tangent, centre = fit(latents, prototype, variance=1.0)
    x0 = draws(4, D, seed=9)
    rows = {
        "prototype": prototype.view(4, *SHAPE),
        "basis": tangent.double(),
        "centre": centre.double().view(4, *SHAPE),
    }
    pull = TangentGuidance(0.1, 25, 0.0, 0.0)(step(x0.view(4, *SHAPE)), rows).flatten(1)
    normal = pull - pull @ projector(basis)
    assert float(normal.norm()) < 1e-6
    torch.testing.assert_close(pull, 0.1 * (prototype - x0) @ projector(basis), rtol=0, atol=1e-6)
    assert float(pull.norm()) > 0.05


def direct(points: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return the projector on the leading eigenvectors of the D x D covariance."""
    _, vectors = torch.linalg.eigh(torch.cov(points.double().T))
    return vectors[:, -dimension:] @ vectors[:, -dimension:].T


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_gram_route_is_the_covariance_route(dimension: int) -> None:
    latents, prototypes = (draws(60, D) * torch.linspace(0.1, 2, D)).float(), draws(3, D, seed=1).float()
    tangent, centre = fit(latents, prototypes, neighbours=20, dimension=dimension)
    for row in range(3):
        near = latents[(latents - prototypes[row]).norm(dim=1).argsort()[:20]]
        torch.testing.assert_close(projector(tangent[row]), direct(near, dimension), rtol=0, atol=1e-5)
        torch.testing.assert_close(centre[row], near.mean(0), rtol=0, atol=1e-6)
        assert int((tangent[row].norm(dim=0) > 0).sum()) == dimension


@pytest.mark.parametrize("variance", [0.2, 0.5, 0.9, 0.99, 1.0])
def test_dimension_is_the_least_that_holds_the_variance(variance: float) -> None:
    latents = (draws(50, D) * torch.logspace(0, -2, D)).float()
    tangent, centre = fit(latents, latents[:1], neighbours=30, variance=variance)
    near = latents[(latents - latents[0]).norm(dim=1).argsort()[:30]].double()
    values = torch.linalg.eigvalsh(torch.cov(near.T)).flip(0).clamp(min=0)
    held = (values.cumsum(0) / values.sum()).numpy()
    expected = min(int(np.searchsorted(held, variance - 1e-12)) + 1, 29)
    assert int((tangent[0].norm(dim=0) > 0.5).sum()) == expected
    explained = ((near - near.mean(0)) @ projector(tangent[0])).square().sum() / (near - near.mean(0)).square().sum()
    assert float(explained) >= variance - 1e-6
    assert float((centre[0] - near.mean(0)).abs().max()) < 1e-5


def test_neighbourhoods_are_limited_by_cluster_size() -> None:
    """Far from 2 and at most all: a cluster of m members has at most m - 1 tangent directions."""
    latents = draws(40, D).float()
    tangent, centre = fit(latents, latents[:5], sizes=[1, 2, 7, 20, 1000], neighbours=20, variance=1.0)
    assert (tangent.norm(dim=1) > 0.5).sum(1).tolist() == [1, 1, 6, 19, 19]
    for row, used in enumerate([2, 2, 7, 20, 20]):
        near = latents[(latents - latents[row]).norm(dim=1).argsort()[:used]]
        torch.testing.assert_close(centre[row], near.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(projector(tangent[row]), direct(near, used - 1), rtol=0, atol=1e-5)


def test_small_classes_have_fewer_neighbours() -> None:
    latents = draws(6, D).float()
    tangent, _ = fit(latents, latents[:2], neighbours=64, variance=1.0)
    assert tangent.shape == (2, D, 6)
    assert (tangent.norm(dim=1) > 0.5).sum(1).tolist() == [5, 5]
    alone, centre = fit(latents[:1], latents[:1], neighbours=64)
    assert float(alone.abs().max()) == 0
    torch.testing.assert_close(centre, latents[:1])


def test_identical_neighbours_have_no_tangent() -> None:
    latents = draws(1, D).expand(10, D)
    tangent, centre = fit(latents, latents[:1], neighbours=10)
    assert float(tangent.abs().max()) < 1e-6
    torch.testing.assert_close(centre[0], latents[0].float(), rtol=0, atol=1e-6)


def test_a_row_of_bases_does_not_depend_on_the_others() -> None:
    latents, prototypes = draws(60, D), draws(5, D, seed=1)
    together, _ = fit(latents, prototypes, neighbours=20)
    for row in range(5):
        alone, _ = fit(latents, prototypes[row : row + 1], neighbours=20)
        torch.testing.assert_close(projector(together[row]), projector(alone[0]), rtol=0, atol=1e-6)


def test_project_is_a_projection() -> None:
    basis = torch.linalg.qr(draws(3, D, 5)).Q
    padded = torch.nn.functional.pad(basis, (0, 4))
    vector = draws(3, *SHAPE, seed=1)
    once = project(padded, vector)
    torch.testing.assert_close(once.flatten(1), torch.einsum("nde,ne->nd", basis @ basis.mT, vector.flatten(1)))
    torch.testing.assert_close(project(padded, once), once)


# ---------------------------------------------------------------- tangent guidance


def rows_at(n: int = 4) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    latents = draws(50, D).float()
    basis, centre = fit(latents, latents[:n], neighbours=16)
    rows = {"prototype": latents[:n].view(n, *SHAPE), "basis": basis, "centre": centre.view(n, *SHAPE)}
    return rows, draws(n, *SHAPE, seed=7).float()


def test_kappa_one_is_mode_guidance_to_the_bit() -> None:
    rows, x0 = rows_at()
    ours = TangentGuidance(0.1, 25, kappa=1.0, normal_pull=0.0)(step(x0), rows)
    assert torch.equal(ours, ModeGuidance(0.1, 25)(step(x0), rows))


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_parts_are_weighed_as_specified(kappa: float, eta: float) -> None:
    """g = lambda (P v + kappa (I - P) v) - eta (I - P) (x0 - m) (specification 9, items 3 and 4)."""
    rows, x0 = rows_at()
    p = projector(rows["basis"])
    v, offset = (
        (rows[key] - x0 if key == "prototype" else x0 - rows[key]).flatten(1).double()
        for key in ("prototype", "centre")
    )
    across, away = (w - torch.einsum("nde,ne->nd", p, w) for w in (v, offset))
    expected = 0.1 * (v - across + kappa * across) - eta * away
    got = TangentGuidance(0.1, 25, kappa, eta)(step(x0), rows).flatten(1).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_normal_pull_shrinks_the_distance_to_the_plane_alone() -> None:
    rows, x0 = rows_at()
    force = TangentGuidance(0.0, 25, 0.0, 0.5)(step(x0), rows)
    p = projector(rows["basis"])
    tangent = torch.einsum("nde,ne->nd", p, force.flatten(1).double())
    assert float(tangent.norm()) < 1e-5
    before, after = (
        (w - torch.einsum("nde,ne->nd", p, w)).norm(dim=1)
        for w in ((x - rows["centre"]).flatten(1).double() for x in (x0, x0 + force))
    )
    torch.testing.assert_close(after, 0.5 * before, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- neighbours of the prediction, and noisy patches


CLASSES = {"ant": draws(50, D, seed=20).float(), "bee": 3 + draws(9, D, seed=21).float()}
NAMES = ["ant", "bee", "ant", "bee"]


def guidance(term: TangentTerm) -> TangentGuidance:
    fields = {"neighbours": term.neighbours, "variance": term.tangent_variance, "dimension": term.tangent_dim}
    return TangentGuidance(term.scale, term.stop, term.kappa, term.normal_pull, term.around, term.noisy, **fields)


def rows_of(term: TangentTerm, names: list[str], size: int = 1000) -> dict[str, torch.Tensor]:
    """Rows of several classes, made one by one and put together as a batch is."""
    parts = []
    for place, name in enumerate(names):
        prototype = CLASSES[name][place : place + 1]
        rows = tangent_rows(term, prototype, torch.tensor([size]), CLASSES[name], [100 + place])
        parts.append(rows | {"prototype": prototype.view(1, *SHAPE)})
    rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return rows | (shared_latents(names, CLASSES.__getitem__) if term.around == "x0" else {})


def tangent_term(**options: object) -> TangentTerm:
    return TangentTerm(term="tangent", **({"neighbours": 12, "normal_pull": 0.3} | options))


@pytest.mark.parametrize(("size", "used"), [(1000, 12), (5, 5)])
@pytest.mark.parametrize("index", [49, 30])
def test_neighbours_of_the_prediction_are_its_own_classes(index: int, size: int, used: int) -> None:
    """Each row's plane is the one of a prototype at its x0, in its class alone: bee has but 9 images, all far away."""
    term = tangent_term(around="x0")
    x0 = draws(4, *SHAPE, seed=30 + index).float()
    got = guidance(term)(step(x0, index=index), rows_of(term, NAMES, size))
    for row, name in enumerate(NAMES):
        basis, centre = fit(CLASSES[name], x0[row : row + 1].flatten(1), sizes=[size], neighbours=12)
        alone = {"basis": basis, "centre": centre, "prototype": CLASSES[name][row].view(1, *SHAPE)}
        expected = TangentGuidance(0.1, 25, 0.0, 0.3)(step(x0[row : row + 1], index=index), alone)
        torch.testing.assert_close(got[row : row + 1], expected, rtol=0, atol=1e-5)
        near = CLASSES[name][(CLASSES[name] - x0[row].flatten()).norm(dim=1).argsort()[:used]]
        torch.testing.assert_close(centre[0], near.mean(0), rtol=0, atol=1e-6)


def test_a_class_is_held_once_for_all_its_rows() -> None:
    read: list[str] = []

    def latents_of(name: str) -> torch.Tensor:
        read.append(name)
        return CLASSES[name]

    shared = shared_latents(NAMES, latents_of)
    assert read == ["ant", "bee"]
    assert shared["pool"].shape == (59, D)
    assert shared["owner"].tolist() == [0, 1, 0, 1]
    assert shared["pool_owner"].tolist() == [0] * 50 + [1] * 9


@pytest.mark.parametrize("d", [1, 3, 10])
def test_the_moving_plane_of_data_on_a_plane_is_that_plane(d: int) -> None:
    latents, basis, _ = plane(100, d)
    term = tangent_term(around="x0", tangent_variance=1.0, normal_pull=0.0, neighbours=40)
    latents, x0 = latents.float(), draws(3, *SHAPE, seed=9).float()
    rows = tangent_rows(term, latents[:3], torch.tensor([1000] * 3), None, [1, 2, 3])
    rows |= shared_latents(["a"] * 3, lambda name: latents) | {"prototype": latents[:3].view(3, *SHAPE)}
    pull = guidance(term)(step(x0), rows).flatten(1).double()
    assert float((pull - pull @ projector(basis)).norm()) < 1e-6
    torch.testing.assert_close(pull, 0.1 * (latents[:3] - x0.flatten(1)).double() @ projector(basis), rtol=0, atol=1e-6)
    assert float(pull.norm()) > 0.05


@pytest.mark.parametrize("around", ["prototype", "x0"])
@pytest.mark.parametrize("index", [49, 30])
def test_a_noisy_patch_is_equation_5(around: str, index: int) -> None:
    """sqrt(a) x_j + sqrt(1 - a) n_j with the row's own noise; its plane by the covariance; its centre at the scale of x0."""
    term = tangent_term(around=around, noisy=True, tangent_dim=4)
    x0 = draws(4, *SHAPE, seed=3).float()
    at, own, rows = step(x0, index=index), guidance(term), rows_of(term, NAMES)
    got = own(at, rows)
    for row, name in enumerate(NAMES):
        origin = x0[row].flatten() if around == "x0" else rows["prototype"][row].flatten()
        near = CLASSES[name][(CLASSES[name] - origin).norm(dim=1).argsort()[:12]].double()
        patch = math.sqrt(at.abar) * near + math.sqrt(1 - at.abar) * own._noise(100 + row, at)[: len(near)]
        p = direct(patch, 4)
        v, offset = (
            w.flatten().double()
            for w in (rows["prototype"][row] - x0[row], x0[row] - patch.mean(0).view(SHAPE) / at.abar**0.5)
        )
        expected = 0.1 * p @ v - 0.3 * (offset - p @ offset)
        scale = float(expected.norm())
        torch.testing.assert_close(got[row].flatten().double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("around", ["prototype", "x0"])
def test_patch_noise_belongs_to_row_and_step(around: str) -> None:
    term = tangent_term(around=around, noisy=True)
    x0, rows = draws(4, *SHAPE, seed=3).float(), rows_of(term, NAMES)
    together = guidance(term)(step(x0), rows)
    for order in ([0], [3], [2, 1]):
        some = guidance(term)(step(x0[order]), rows_of_order(rows, order))
        torch.testing.assert_close(some, together[order], rtol=0, atol=1e-5)
    other = guidance(term)(step(x0), rows | {"patch_key": rows["patch_key"] + 1})
    assert float((other - together).flatten(1).norm(dim=1).min()) > 1e-2
    noise = [guidance(term)._noise(key, step(x0, index=index)) for key, index in ((1, 40), (1, 39), (2, 40))]
    for one, two in itertools.combinations(noise, 2):
        assert abs(float((one * two).mean())) < 5 / math.sqrt(one.numel())


def rows_of_order(rows: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    return {key: value if key in ("pool", "pool_owner") else value[order] for key, value in rows.items()}


@pytest.mark.parametrize("around", ["prototype", "x0"])
@pytest.mark.parametrize("noisy", [False, True])
def test_every_geometry_with_kappa_one_is_mode_guidance_to_the_bit(around: str, noisy: bool) -> None:
    term = tangent_term(around=around, noisy=noisy, kappa=1.0, normal_pull=0.0)
    x0, rows = draws(4, *SHAPE, seed=3).float(), rows_of(term, NAMES)
    assert torch.equal(guidance(term)(step(x0), rows), ModeGuidance(0.1, 25)(step(x0), rows))


# ---------------------------------------------------------------- the released term


def released(**options: object) -> ReleasedManifold:
    defaults = {
        "scale": 0.1, "stop": 25, "steps": 50, "radius": 0.1, "radius_growth": 2.0, "warmup": 5, "schedule": "exp",
        "cloud": 60, "neighbours": 12, "tangent_dim": 3, "bandwidth": 0.1,
    }  # fmt: skip
    return ReleasedManifold(**(defaults | options))  # type: ignore[arg-type]


def released_rows(n: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rows = {"prototype": draws(n, *SHAPE, seed=3).float(), "key": torch.arange(11, 11 + n)}
    return rows, draws(n, *SHAPE, seed=4).float()


def cloud(term: ReleasedManifold, at: Step, rows: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """Build a row's noisy cloud as specified (1.4) from the term's own draws for that row."""
    normals, uniforms = term._draw(at.index, rows["key"][row : row + 1], at.x.flatten(1))
    unit, noise, uniform = normals[0, 0].double(), normals[0, 1].double(), uniforms[0].double()
    radius = term.radius_at(at.index)
    radii = torch.cat([torch.linspace(0.1, radius, term.cloud // 2, dtype=torch.float64), radius * uniform])
    points = rows["prototype"][row].flatten() + radii[:, None] * unit / unit.norm(dim=1, keepdim=True)
    return math.sqrt(at.abar) * points + math.sqrt(1 - at.abar) * noise


@pytest.mark.parametrize("index", [49, 46, 26])
@pytest.mark.parametrize("options", [{}, {"radius": 20.0, "bandwidth": 30.0, "tangent_dim": 6}])
def test_released_term_is_the_specified_one_by_full_eigenvectors(index: int, options: dict[str, float]) -> None:
    """b = -lambda tanh(min |x - y| / bw) v / |v|, v normal to the top d eigenvectors of the ridge covariance."""
    term = released(**options)
    rows, x = released_rows()
    at = step(x, index=index, sigma=0.37)
    b = (term(at, rows) * at.sigma).flatten(1).double()
    for row in range(len(x)):
        target = x[row].flatten().double()
        points = cloud(term, at, rows, row)
        distances = (points - target).norm(dim=1)
        near = points[distances.argsort()[:12]]
        mean = near.mean(0)
        covariance = (near - mean).T @ (near - mean) / 11 + 1e-5 * torch.eye(D, dtype=torch.float64)
        top = torch.linalg.eigh(covariance).eigenvectors[:, -term.tangent_dim :]
        v = (target - mean) - top @ (top.T @ (target - mean))
        size = term.scale * torch.tanh(distances.min() / term.bandwidth)
        torch.testing.assert_close(b[row], -size * v / v.norm(), rtol=0, atol=1e-5)
        assert float(b[row].norm()) == pytest.approx(float(size), rel=1e-5)
        assert float((top.T @ b[row]).abs().max()) < 1e-5


def test_released_term_is_no_longer_than_its_scale() -> None:
    rows, x = released_rows()
    for index in (49, 30):
        at = step(x, index=index)
        b = (released()(at, rows) * at.sigma).flatten(1).norm(dim=1)
        assert (b <= 0.1 * (1 + 1e-6)).all()
        torch.testing.assert_close(b, torch.full_like(b, 0.1))  # tanh(10) and beyond: the bandwidth is inert
        wide = (released(bandwidth=1e3)(at, rows) * at.sigma).flatten(1).norm(dim=1)
        assert (wide < 0.01).all()


def test_released_term_does_not_depend_on_batch_mates() -> None:
    rows, x = released_rows(4)
    together = released()(step(x), rows)
    for order in ([0], [3], [2, 0], [3, 2, 1, 0]):
        some = released()(step(x[order]), {key: value[order] for key, value in rows.items()})
        torch.testing.assert_close(some, together[order], rtol=0, atol=1e-6)
    assert not torch.allclose(released()(step(x), rows | {"key": rows["key"] + 1}), together, atol=1e-3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(released()(step(x), rows), together)
    assert torch.equal(torch.get_rng_state(), state)


def test_released_clouds_differ_for_all_keys() -> None:
    rows, x = released_rows(1)
    far = rows | {"key": rows["key"] + 2**22}
    assert not torch.equal(released()(step(x), rows), released()(step(x), far))


def test_the_cloud_changes_from_step_to_step() -> None:
    rows, x = released_rows()
    one, two = (released(radius=0.1, radius_growth=1.0)(step(x, index=index), rows) for index in (30, 29))
    assert float(torch.nn.functional.cosine_similarity(one.flatten(1), two.flatten(1)).max()) < 0.999


@pytest.mark.parametrize(
    ("schedule", "half"), [("linear", 0.5), ("exp", (math.exp(0.5) - 1) / (math.e - 1)), ("cosine", 0.5)]
)
def test_radius_schedule(schedule: str, half: float) -> None:
    """r_t = r (1 + (R - 1) s(p)), p = (i - i_cut) / W clipped, i_cut = max(stop, 49 - W) (specification 1.4)."""
    term = released(radius=0.2, radius_growth=3.0, warmup=4, schedule=schedule)
    assert term.radius_at(49) == pytest.approx(0.6)
    assert term.radius_at(47) == pytest.approx(0.2 * (1 + 2 * half))
    for index in (45, 40, 26):
        assert term.radius_at(index) == pytest.approx(0.2)
    radii = [term.radius_at(index) for index in range(45, 50)]
    assert all(a < b for a, b in itertools.pairwise(radii))
    late = released(radius=0.2, radius_growth=3.0, warmup=100, stop=40, schedule="linear")
    assert late.radius_at(49) == pytest.approx(0.2 * (1 + 2 * 9 / 100))
    assert late.radius_at(40) == pytest.approx(0.2)
    assert released(schedule=schedule, radius_growth=1.0).radius_at(48) == pytest.approx(0.1)


def test_published_radius_values() -> None:
    """r = 0.1, R = 2, W = 5, exp: doubled at the start, back to r after five steps."""
    expected = [0.1 * (1 + (math.exp(p) - 1) / (math.e - 1)) for p in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0)]
    assert [released().radius_at(index) for index in range(49, 42, -1)] == pytest.approx(expected)
