"""From a method's configuration to what the engine needs: its guidance terms, and what each of its images starts from.

A method is a choice of start latents, prototypes and guidance terms; a new combination of them needs no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from workflow_scripts.config import (
    DiffusionMethod,
    GaussianStart,
    KMeansPrototypes,
    LeafPrototypes,
    ModeTerm,
    ReleasedManifoldTerm,
    TangentTerm,
)
from workflow_scripts.diffusion.noise import batch_noise, seed_for, stream
from workflow_scripts.diffusion.sampler import Term
from workflow_scripts.diffusion.schedule import Grid
from workflow_scripts.errors import DataError
from workflow_scripts.methods.d3hr import draw_group
from workflow_scripts.methods.manifoldgd import ReleasedManifold, TangentGuidance, tangent_spaces
from workflow_scripts.methods.mgd3 import ModeGuidance
from workflow_scripts.methods.modes import Modes, Tree


@dataclass(frozen=True)
class ClassInputs:
    """What is known of a class before sampling; each part is there only if the method needs it.

    Attributes:
        latents: real latents (n, c, h, w), float32, scaled.
        modes: arrays of its Tree or Modes.
        gaussian: ``mean`` and ``variance`` (c, h, w) in the inverted domain.
    """

    name: str
    shape: tuple[int, int, int]
    latents: np.ndarray | None = None
    modes: Mapping[str, np.ndarray] | None = None
    gaussian: Mapping[str, np.ndarray] | None = None


def start_step(method: DiffusionMethod, grid: Grid) -> int:
    """Return the grid step at which a method's sampling starts.

    Raises:
        ValueError: if the grid has no such step.
    """
    last = len(grid.timesteps) - 1
    if not isinstance(method.start, GaussianStart):
        return last
    step = grid.step_of(method.start.timestep) + int(method.start.legacy_offset)
    if step > last:
        raise ValueError(
            f"timestep {method.start.timestep} with legacy_offset starts beyond the grid's last step, {last}"
        )
    return step


def terms_of(method: DiffusionMethod) -> list[Term]:
    """Return a method's guidance terms."""
    terms: list[Term] = []
    for term in method.guidance:
        match term:
            case ModeTerm():
                terms.append(ModeGuidance(term.scale, term.stop))
            case TangentTerm():
                terms.append(TangentGuidance(term.scale, term.stop, term.kappa, term.normal_pull))
            case ReleasedManifoldTerm():
                terms.append(ReleasedManifold(steps=method.sampler.steps, **term.model_dump(exclude={"term"})))
    return terms


def needs_latents(method: DiffusionMethod) -> bool:
    """Say whether a guidance term looks at the real latents themselves."""
    return any(isinstance(term, TangentTerm) for term in method.guidance)


def prototypes_of(method: DiffusionMethod, inputs: ClassInputs, ipc: int) -> Modes | None:
    """Return the prototypes of a class, one per image, or None for a method without.

    Raises:
        DataError: if the class has too few images for so many prototypes.
    """
    if method.prototypes is None:
        return None
    assert inputs.modes is not None
    if isinstance(method.prototypes, KMeansPrototypes):
        return Modes(**inputs.modes)
    tree = Tree(**inputs.modes)
    try:
        if isinstance(method.prototypes, LeafPrototypes):
            return tree.leaves(ipc)
        return tree.multiscale(ipc, method.prototypes.start_depth)
    except ValueError as error:
        raise DataError(
            f"class {inputs.name}: {error}. Add distinct images, raise cluster.max_leaves, or lower ipc."
        ) from None


def prepare_rows(
    method: DiffusionMethod, inputs: ClassInputs, ipc: int, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Prepare the rows of one class, IPC and seed.

    Returns:
        per-row tensors, each with ``ipc`` rows: ``start`` (ipc, c, h, w), and what the guidance terms read.
    """
    rows = {"start": _start(method, inputs, ipc, seed).to(device)}
    modes = prototypes_of(method, inputs, ipc)
    if modes is not None:
        rows["prototype"] = torch.from_numpy(modes.means).to(device).view(ipc, *inputs.shape)
    for term in method.guidance:
        if isinstance(term, TangentTerm):
            assert modes is not None and inputs.latents is not None
            latents = torch.from_numpy(inputs.latents).to(device).flatten(1)
            sizes = torch.from_numpy(modes.sizes).to(device)
            if term.neighbourhood == "class":
                sizes = torch.full_like(sizes, len(latents))
            means = torch.from_numpy(modes.means).to(device)
            basis, centre = tangent_spaces(
                means, sizes, latents, term.neighbours, term.tangent_variance, term.tangent_dim
            )
            rows["basis"] = torch.nn.functional.pad(basis, (0, term.neighbours - basis.shape[2]))
            rows["centre"] = centre.view(ipc, *inputs.shape)
        elif isinstance(term, ReleasedManifoldTerm):
            rows["key"] = torch.tensor([seed_for(seed, inputs.name, index, "cloud") for index in range(ipc)])
    return rows


def _start(method: DiffusionMethod, inputs: ClassInputs, ipc: int, seed: int) -> torch.Tensor:
    if isinstance(method.start, GaussianStart):
        assert inputs.gaussian is not None
        mean, variance = (torch.from_numpy(inputs.gaussian[key]).double() for key in ("mean", "variance"))
        return draw_group(mean, variance, ipc, method.start, stream(seed, inputs.name, 0, "group"))
    return batch_noise([stream(seed, inputs.name, index, "start") for index in range(ipc)], *inputs.shape)
