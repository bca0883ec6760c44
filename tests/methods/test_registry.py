from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic import CPU, linear_schedule

from workflow_scripts.config import DiffusionMethod, load
from workflow_scripts.diffusion.noise import batch_noise, seed_for, stream
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.errors import DataError
from workflow_scripts.methods.d3hr import draw_group
from workflow_scripts.methods.manifoldgd import ReleasedManifold, TangentGuidance, tangent_spaces
from workflow_scripts.methods.mgd3 import ModeGuidance
from workflow_scripts.methods.modes import grow_tree, kmeans
from workflow_scripts.methods.registry import (
    ClassInputs,
    needs_latents,
    prepare_rows,
    prototypes_of,
    start_step,
    terms_of,
)

SHAPE = (4, 4, 4)
LATENTS = np.random.default_rng(0).normal(size=(30, *SHAPE)).astype(np.float32)
TREE = asdict(grow_tree(LATENTS, 12, 1, 0))


def method(**options: object) -> DiffusionMethod:
    return DiffusionMethod.model_validate({"kind": "diffusion", **options})


def inputs(**options: object) -> ClassInputs:
    return ClassInputs("cat", SHAPE, **options)  # type: ignore[arg-type]


PLAIN = method()
MGD3 = method(prototypes={"kind": "kmeans"}, guidance=[{"term": "mode"}])
TANGENT = method(prototypes={"kind": "multiscale", "start_depth": 1}, guidance=[{"term": "tangent", "neighbours": 8}])
GRID = respace(linear_schedule(), 50, "linspace")
RELEASED = method(prototypes={"kind": "leaves"}, guidance=[{"term": "mode"}, {"term": "released_manifold"}])


def test_plain_rows_start_from_each_images_own_noise() -> None:
    rows = prepare_rows(PLAIN, inputs(), GRID, 5, 3, CPU)
    assert set(rows) == {"start"}
    expected = torch.cat([batch_noise([stream(3, "cat", index, "start")], *SHAPE) for index in range(5)])
    assert torch.equal(rows["start"], expected)
    assert torch.equal(prepare_rows(PLAIN, inputs(), GRID, 1, 3, CPU)["start"], expected[:1])
    assert not torch.allclose(prepare_rows(PLAIN, inputs(), GRID, 5, 4, CPU)["start"], expected)
    other = prepare_rows(PLAIN, ClassInputs("dog", SHAPE), GRID, 5, 3, CPU)["start"]
    assert not torch.allclose(other, expected)


def test_all_noise_methods_share_start_and_noise() -> None:
    """So that methods are compared on the same noise (specification 8, item 5)."""
    modes = asdict(kmeans(LATENTS, 4, 1, 0)[0])
    mgd3 = prepare_rows(MGD3, inputs(modes=modes), GRID, 4, 0, CPU)
    released = prepare_rows(RELEASED, inputs(modes=TREE), GRID, 4, 0, CPU)
    plain = prepare_rows(PLAIN, inputs(), GRID, 4, 0, CPU)
    assert torch.equal(mgd3["start"], plain["start"])
    assert torch.equal(released["start"], plain["start"])


def test_prototypes_of_each_kind() -> None:
    modes = kmeans(LATENTS, 4, 1, 0)[0]
    tree = grow_tree(LATENTS, 12, 1, 0)
    assert prototypes_of(PLAIN, inputs(), 4) is None
    for chosen, given, expected in (
        (MGD3, asdict(modes), modes),
        (RELEASED, TREE, tree.leaves(4)),
        (TANGENT, TREE, tree.multiscale(4, 1)),
    ):
        got = prototypes_of(chosen, inputs(modes=given), 4)
        assert got is not None
        np.testing.assert_array_equal(got.means, expected.means)
        np.testing.assert_array_equal(got.sizes, expected.sizes)
        rows = prepare_rows(chosen, inputs(modes=given, latents=LATENTS), GRID, 4, 0, CPU)
        np.testing.assert_array_equal(rows["prototype"].numpy(), expected.means.reshape(4, *SHAPE))


@pytest.mark.parametrize(("chosen", "ipc"), [(RELEASED, 13), (TANGENT, 24)])
def test_too_few_nodes_name_the_class(chosen: DiffusionMethod, ipc: int) -> None:
    with pytest.raises(DataError, match=r"class cat: .*fewer than.*lower ipc"):
        prototypes_of(chosen, inputs(modes=TREE), ipc)


@pytest.mark.parametrize("neighbourhood", ["cluster", "class"])
def test_tangent_rows(neighbourhood: str) -> None:
    chosen = method(
        prototypes={"kind": "leaves"},
        guidance=[{"term": "tangent", "neighbours": 8, "neighbourhood": neighbourhood, "tangent_variance": 0.8}],
    )
    rows = prepare_rows(chosen, inputs(modes=TREE, latents=LATENTS), GRID, 5, 0, CPU)
    leaves = grow_tree(LATENTS, 12, 1, 0).leaves(5)
    sizes = torch.from_numpy(leaves.sizes) if neighbourhood == "cluster" else torch.full((5,), 30)
    basis, centre = tangent_spaces(
        torch.from_numpy(leaves.means), sizes, torch.from_numpy(LATENTS).flatten(1), 8, 0.8, None
    )
    torch.testing.assert_close(rows["basis"], basis)
    torch.testing.assert_close(rows["centre"].flatten(1), centre)
    assert needs_latents(chosen)


def test_bases_of_small_classes_are_padded_to_collate() -> None:
    chosen = method(prototypes={"kind": "kmeans"}, guidance=[{"term": "tangent", "neighbours": 64}])
    small = LATENTS[:3]
    rows = prepare_rows(chosen, inputs(modes=asdict(kmeans(small, 2, 1, 0)[0]), latents=small), GRID, 2, 0, CPU)
    assert rows["basis"].shape == (2, 64, 64)
    assert float(rows["basis"][:, :, 3:].abs().max()) == 0


def test_released_rows_have_a_key_per_image() -> None:
    rows = prepare_rows(RELEASED, inputs(modes=TREE), GRID, 4, 7, CPU)
    assert rows["key"].tolist() == [seed_for(7, "cat", index, "cloud") for index in range(4)]
    assert rows["key"].device.type == "cpu"


def test_gaussian_rows_are_the_classes_group() -> None:
    random = np.random.default_rng(0)
    gaussian = {
        "mean": random.normal(size=SHAPE).astype(np.float32),
        "variance": random.uniform(1, 2, SHAPE).astype(np.float32),
    }
    chosen = method(start={"kind": "gaussian"}, sampler={"kind": "ddim", "spacing": "leading"})
    rows = prepare_rows(chosen, inputs(gaussian=gaussian), GRID, 6, 2, CPU)
    mean, variance = (torch.from_numpy(gaussian[key]).double() for key in ("mean", "variance"))
    expected = draw_group(mean, variance, 6, chosen.start, stream(2, "cat", 0, "group"))  # type: ignore[arg-type]
    assert torch.equal(rows["start"], expected)
    torch.testing.assert_close(rows["start"].mean(0), mean.float(), rtol=0, atol=1e-5)
    assert start_step(chosen, respace(linear_schedule(), 50, "leading")) == 30


def test_a_start_beyond_the_grid_is_refused() -> None:
    late = {"kind": "gaussian", "timestep": 980, "legacy_offset": True}
    chosen = method(start=late, sampler={"kind": "ddim", "spacing": "leading"})
    with pytest.raises((ValueError, DataError)):
        start_step(chosen, respace(linear_schedule(), 50, "leading"))


def test_terms_carry_their_settings() -> None:
    chosen = method(
        prototypes={"kind": "leaves"},
        guidance=[
            {"term": "mode", "scale": 0.2, "stop": 10},
            {"term": "tangent", "scale": 0.3, "stop": 11, "kappa": 0.25, "normal_pull": 0.5},
            {"term": "released_manifold", "scale": 0.4, "stop": 12, "cloud": 30, "schedule": "cosine"},
        ],
        sampler={"steps": 40},
    )
    mode, tangent, released = terms_of(chosen)
    assert mode == ModeGuidance(0.2, 10)
    assert tangent == TangentGuidance(0.3, 11, 0.25, 0.5)
    assert released == ReleasedManifold(0.4, 12, 40, 0.1, 2.0, 5, "cosine", 30, 12, 3, 0.1)
    assert terms_of(PLAIN) == []
    assert not needs_latents(RELEASED)


def test_shipped_methods_are_what_they_are_called() -> None:
    """The MGD3 baseline must have no manifold term (specification 2.1, A15), and the released form both."""
    config = load(Path(__file__).resolve().parents[2] / "config.yaml")
    kinds = {
        name: [type(term) for term in terms_of(m)]
        for name, m in config.methods.items()
        if isinstance(m, DiffusionMethod)
    }
    assert kinds["mgd3"] == [ModeGuidance]
    assert kinds["manifoldgd"] == [TangentGuidance]
    assert set(kinds["manifoldgd-released"]) == {ModeGuidance, ReleasedManifold}
    assert kinds["d3hr"] == []
