"""From a method's configuration to what the engine needs: its guidance terms, and what each of its images starts from.

A method is a choice of start latents, prototypes and guidance terms; a new combination of them needs no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workflow_scripts.config import (
    DiffusionMethod,
    GaussianStart,
    KMeansPrototypes,
    LeafPrototypes,
    ModeTerm,
    NoiseStart,
    PrototypeStart,
    ReleasedManifoldTerm,
    SoftLabelSchedule,
    TangentTerm,
    TransportTerm,
)
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.noise import batch_noise, seed_for, stream
from workflow_scripts.diffusion.sampler import LabelSchedule, Term
from workflow_scripts.diffusion.schedule import Grid
from workflow_scripts.errors import DataError
from workflow_scripts.methods.d3hr import best_candidate, draw_group
from workflow_scripts.methods.dmgd import SoftLabels, TransportGuidance
from workflow_scripts.methods.manifoldgd import ReleasedManifold, TangentGuidance, tangent_rows
from workflow_scripts.methods.mgd3 import ModeGuidance
from workflow_scripts.methods.modes import Modes, Tree


@dataclass(frozen=True)
class ClassInputs:
    """What is known of a class before sampling; each part is there only if the method needs it.

    Attributes:
        latents: real latents (n, c, h, w), float32, scaled.
        modes: arrays of the Tree or the Modes that its prototypes come from.
        targets: arrays of the Modes that transport leads to.
        gaussian: ``mean`` and ``variance`` (c, h, w) in the inverted domain.
        candidate: number of the group that best_of_m takes; without it, prepare_rows searches.
        label: the backbone's label of the class.
        others: labels that may be mixed into it.
        embedding_shape: (P, E) of a label's embedding.
    """

    name: str
    shape: tuple[int, int, int]
    latents: np.ndarray | None = None
    modes: Mapping[str, np.ndarray] | None = None
    targets: Mapping[str, np.ndarray] | None = None
    gaussian: Mapping[str, np.ndarray] | None = None
    candidate: int | None = None
    label: int | None = None
    others: Sequence[int] = ()
    embedding_shape: tuple[int, int] | None = None


def start_step(method: DiffusionMethod, grid: Grid) -> int:
    """Return the grid step at which a method's sampling starts.

    Raises:
        ValueError: if the grid has no such step.
    """
    last = len(grid.timesteps) - 1
    if isinstance(method.start, NoiseStart):
        return last
    step = grid.step_of(method.start.timestep)
    if isinstance(method.start, PrototypeStart):
        return step
    step += int(method.start.legacy_offset)
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
                terms.append(
                    TangentGuidance(
                        term.scale,
                        term.stop,
                        term.kappa,
                        term.normal_pull,
                        around=term.around,
                        noisy=term.noisy,
                        neighbours=term.neighbours,
                        variance=term.tangent_variance,
                        dimension=term.tangent_dim,
                    )
                )
            case ReleasedManifoldTerm():
                terms.append(ReleasedManifold(steps=method.sampler.steps, **term.model_dump(exclude={"term"})))
            case TransportTerm():
                terms.append(TransportGuidance(**term.model_dump(exclude={"term", "targets", "restarts", "seed"})))
    return terms


def label_schedule_of(method: DiffusionMethod, denoiser: Denoiser) -> LabelSchedule | None:
    """Return what a method tells the network in place of its labels, if it does."""
    return SoftLabels(denoiser, method.labels) if isinstance(method.labels, SoftLabelSchedule) else None


def is_greedy(method: DiffusionMethod) -> bool:
    """Say whether the images of a class are made one after another, each guided by those before it."""
    return any(isinstance(term, TransportTerm) and term.matching == "greedy" for term in method.guidance)


def is_joint(method: DiffusionMethod) -> bool:
    """Say whether the images of a class are made together, each guided by the others."""
    return any(isinstance(term, TransportTerm) and term.matching == "synchronous" for term in method.guidance)


def needs_latents(method: DiffusionMethod) -> bool:
    """Say whether what is prepared for a class's images comes from its real latents themselves."""
    return any(isinstance(term, TangentTerm) and term.around == "prototype" for term in method.guidance)


def needs_pool(method: DiffusionMethod) -> bool:
    """Say whether a guidance term looks at the real latents at each step."""
    return any(isinstance(term, TangentTerm) and term.around == "x0" for term in method.guidance)


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
    method: DiffusionMethod, inputs: ClassInputs, grid: Grid, ipc: int, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Prepare the rows of one class, IPC and seed.

    Returns:
        per-row tensors, each with ``ipc`` rows: ``start`` (ipc, c, h, w), and what the guidance terms read.
    """
    modes = prototypes_of(method, inputs, ipc)
    rows = {"start": _start(method, inputs, modes, grid, ipc, seed, device).to(device)}
    if modes is not None:
        rows["prototype"] = torch.from_numpy(modes.means).to(device).view(ipc, *inputs.shape)
    if isinstance(method.labels, SoftLabelSchedule):
        rows |= {key: value.to(device) for key, value in _soft_labels(method.labels, inputs, grid, ipc, seed).items()}
    for term in method.guidance:
        if isinstance(term, TangentTerm):
            assert modes is not None
            latents = None if inputs.latents is None else torch.from_numpy(inputs.latents).to(device).flatten(1)
            means, sizes = (torch.from_numpy(values).to(device) for values in (modes.means, modes.sizes))
            keys = [seed_for(seed, inputs.name, index, "patch") for index in range(ipc)]
            rows |= tangent_rows(term, means, sizes, latents, keys)
        elif isinstance(term, ReleasedManifoldTerm):
            rows["key"] = torch.tensor([seed_for(seed, inputs.name, index, "cloud") for index in range(ipc)])
        elif isinstance(term, TransportTerm):
            assert inputs.targets is not None
            targets = Modes(**inputs.targets)
            rows["targets"] = torch.from_numpy(targets.means).to(device).expand(ipc, -1, -1)
            masses = torch.from_numpy(targets.sizes / targets.sizes.sum())
            rows["masses"] = masses.float().to(device).expand(ipc, -1)
    return rows


def _soft_labels(
    settings: SoftLabelSchedule, inputs: ClassInputs, grid: Grid, ipc: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return what :class:`SoftLabels` reads: the label, another one drawn for each image, and its noise at each step."""
    assert inputs.label is not None and inputs.embedding_shape is not None
    shape = (len(grid.timesteps), 2, *inputs.embedding_shape)
    streams = [stream(seed, inputs.name, index, "label") for index in range(ipc)]
    other = [int(random.choice(inputs.others)) if inputs.others else inputs.label for random in streams]
    if settings.law == "gaussian":
        noise = batch_noise(streams, *shape)
    else:
        noise = torch.from_numpy(np.stack([random.random(shape, dtype=np.float32) for random in streams]))
    return {"label": torch.full((ipc,), inputs.label), "other": torch.tensor(other), "label_noise": noise}


def find_candidate(
    method: DiffusionMethod, inputs: ClassInputs, ipc: int, seed: int, device: torch.device
) -> int | None:
    """Return the number of the group that a class starts from, known or searched, if the method searches for one."""
    start = method.start
    if not isinstance(start, GaussianStart) or start.construction != "best_of_m" or ipc == 1:
        return None
    if inputs.candidate is not None:
        return inputs.candidate
    assert inputs.gaussian is not None
    variance = torch.from_numpy(inputs.gaussian["variance"]).double()
    return best_candidate(variance, ipc, start, _group_stream(inputs, seed), device)


def _group_stream(inputs: ClassInputs, seed: int) -> np.random.Generator:
    return stream(seed, inputs.name, 0, "group")


def _start(
    method: DiffusionMethod,
    inputs: ClassInputs,
    modes: Modes | None,
    grid: Grid,
    ipc: int,
    seed: int,
    device: torch.device,
) -> torch.Tensor:
    if isinstance(method.start, GaussianStart):
        assert inputs.gaussian is not None
        mean, variance = (torch.from_numpy(inputs.gaussian[key]).double() for key in ("mean", "variance"))
        random = _group_stream(inputs, seed)
        return draw_group(mean, variance, ipc, method.start, random, device, inputs.candidate)
    noise = batch_noise([stream(seed, inputs.name, index, "start") for index in range(ipc)], *inputs.shape)
    if isinstance(method.start, PrototypeStart):
        assert modes is not None
        abar = float(grid.abar[start_step(method, grid)])
        return abar**0.5 * torch.from_numpy(modes.means).view_as(noise) + (1 - abar) ** 0.5 * noise
    return noise
