"""``stillhouse regenerate``: D3HR's storage mode. One small file of class Gaussians, from which images of any IPC are made.

The file has the Gaussians, the settings of the sampler and, where the method searches for a group, which one won; with it
and the backbone alone the images come out as the run made them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from workflow_scripts.config import ClassLabels, Compute, DiffusionMethod, GaussianStart, Strict, one_of
from workflow_scripts.data.preprocess import Resample
from workflow_scripts.diffusion.checkpoint import Checkpoint, open_checkpoint
from workflow_scripts.errors import BackboneError, ConfigError, DataError, StoreError
from workflow_scripts.formats import Format
from workflow_scripts.formats.card import Description
from workflow_scripts.formats.writers import ImageSet, write
from workflow_scripts.operations.export import origin
from workflow_scripts.recipes import RECIPES, Recipes, digest_of_set
from workflow_scripts.stages.worker import environment, pick_device, progress, quiet_libraries
from workflow_scripts.store.files import write_atomically
from workflow_scripts.store.results import Result, Store

KIND = "stillhouse class gaussians 1"


class Candidates(Strict):
    """A set whose groups were searched for: the tensor ``candidate.ipcN.seedM`` (classes,) has the winners' numbers.

    Attributes:
        device: kind of device whose random streams the numbers count in.
    """

    ipc: int
    seed: int
    device: str

    @property
    def tensor(self) -> str:
        """Name of the tensor."""
        return f"candidate.ipc{self.ipc}.seed{self.seed}"


class Header(Strict):
    """What the file says besides its tensors ``mean`` and ``variance`` (classes, c, h, w).

    Attributes:
        origin: what a :class:`Description` says of all sets alike.
        sampling: what the recipes of all classes' images have in common, but for IPC and seed.
        labels: the backbone's label of each class.
        gaussians: digest of each class's Gaussian; ``half`` says that it was rounded to 16 bits.
        backbone: where the run had the backbone, and ``vae`` its autoencoder if another one.
        denoiser: identity of the files; ``autoencoder`` likewise.
        sets: IPC and seed of the run's own sets.
    """

    origin: dict[str, Any]
    sampling: dict[str, Any]
    labels: tuple[int, ...]
    gaussians: tuple[str, ...]
    half: bool
    backbone: str | None
    vae: str | None
    denoiser: str
    autoencoder: str
    sets: tuple[tuple[int, int], ...]
    candidates: tuple[Candidates, ...]


@dataclass(frozen=True)
class Packed:
    """A file of class Gaussians as read back."""

    path: Path
    header: Header
    arrays: Mapping[str, np.ndarray]

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in label order."""
        return tuple(self.header.origin["classes"])

    @property
    def method(self) -> DiffusionMethod:
        """The method."""
        return DiffusionMethod(**self.header.origin["parameters"])

    def results(self, ipc: int, seed: int) -> list[Result]:
        """Return each class's images of an IPC and seed, under the digests that they have in the run."""
        head = self.header
        rounded = {"gaussian_dtype": "float16"} if head.half else {}
        return [
            Result(
                "sample",
                name,
                {
                    **head.sampling,
                    "recipe": RECIPES["sample"],
                    "class": name,
                    "label": label,
                    "gaussian": gaussian,
                    "ipc": ipc,
                    "seed": seed,
                    **rounded,
                },
            )
            for name, label, gaussian in zip(self.classes, head.labels, head.gaussians, strict=True)
        ]

    def candidates(self, ipc: int, seed: int, device: str) -> np.ndarray | None:
        """Return the groups (classes,) that are known to have won on a kind of device; -1 where one is not known."""
        for known in self.header.candidates:
            if (known.ipc, known.seed, known.device) == (ipc, seed, device):
                return self.arrays[known.tensor]
        return None


# ---------------------------------------------------------------- packing


def packable(recipes: Recipes) -> list[str]:
    """Return the compared methods whose images need nothing of a class but its Gaussian."""
    return [name for name, method in recipes.config.compared().items() if _needs_gaussian_alone(method)]


def _needs_gaussian_alone(method: object) -> bool:
    return (
        isinstance(method, DiffusionMethod)
        and isinstance(method.start, GaussianStart)
        and isinstance(method.labels, ClassLabels)
        and method.prototypes is None
        and not method.guidance
    )


def pack(recipes: Recipes, to: Path, method: str | None = None, *, half: bool = False) -> Packed:
    """Write a run's class Gaussians to one file.

    Args:
        method: default: the only one that can be packed.
        half: round them to 16 bits: half the size, and images that differ slightly.

    Raises:
        ConfigError: if the method cannot be packed, or there are several and none is named.
        DataError: if a class has not been inverted yet.
        StoreError: if ``to`` is there.
    """
    names = packable(recipes)
    if method is None and len(names) == 1:
        method = names[0]
    if method is None or method not in names:
        asked = "name one with --method" if method is None else f"--method {method} is none of them"
        raise ConfigError(
            f"run {recipes.config.run} has {len(names)} methods that start from class Gaussians and need nothing else of the "
            f"real images ({', '.join(names) or 'd3hr is one'}); {asked}"
        )
    if to.exists():
        raise StoreError(f"{to}: is there already. Delete it, or choose another --to.")
    packed = Packed(to, *_gather(recipes, method, half))
    save(packed)
    return packed


def save(packed: Packed) -> None:
    """Write a file of class Gaussians at its path."""
    metadata = {"kind": KIND, "header": packed.header.model_dump_json()}
    write_atomically(packed.path, to_safetensors(dict(packed.arrays), metadata=metadata))


def _gather(recipes: Recipes, method: str, half: bool) -> tuple[Header, dict[str, np.ndarray]]:
    config, classes = recipes.config, recipes.classes
    gaussians = [result for name in classes if (result := recipes.gaussian(name, method)) is not None]
    if missing := [result.class_name for result in gaussians if not recipes.store.exists(result)]:
        raise DataError(
            f"{method}: {len(missing)} of {len(classes)} classes have no Gaussian yet ({', '.join(missing[:3])}"
            f"{', ...' if missing[3:] else ''}). First run: snakemake --cores all --config run={config.run} --until invert"
        )
    read = [recipes.store.read(result).arrays for result in gaussians]
    dtype = np.float16 if half else np.float32
    arrays = {key: np.stack([one[key] for one in read]).astype(dtype) for key in ("mean", "variance")}
    candidates = []
    for wanted in recipes.sets(method):
        device, winners = _winners([recipes.samples(name, wanted) for name in classes], recipes.store)
        if device is not None:
            candidates.append(Candidates(ipc=wanted.ipc, seed=wanted.seed, device=device))
            arrays[candidates[-1].tensor] = winners
    example = recipes.samples(classes[0], recipes.sets(method)[0]).recipe
    own = ("class", "label", "gaussian", "ipc", "seed")
    weights = open_checkpoint(str(recipes.backbone.path), config.results / "cache", config.backbone.vae)
    weights = weights.at(config.dataset.resolution)
    header = Header(
        origin=origin(recipes, method),
        sampling={key: value for key, value in example.items() if key not in own},
        labels=tuple(recipes.backbone.label_of(name) for name in classes),
        gaussians=tuple(result.digest for result in gaussians),
        half=half,
        backbone=config.backbone.path,
        vae=config.backbone.vae,
        denoiser=weights.denoiser,
        autoencoder=weights.vae,
        sets=tuple((wanted.ipc, wanted.seed) for wanted in recipes.sets(method)),
        candidates=tuple(candidates),
    )
    return header, arrays


def _winners(results: Sequence[Result], store: Store) -> tuple[str | None, np.ndarray]:
    """Return on which kind of device most classes' groups were searched, and which won there; -1 where that is not known."""
    records = [store.record(result) if store.exists(result) else {} for result in results]
    devices = Counter(record["device"] for record in records if "candidate" in record)
    device = devices.most_common(1)[0][0] if devices else None
    won = [record["candidate"] if "candidate" in record and record["device"] == device else -1 for record in records]
    return device, np.array(won, dtype=np.int64)


def read(path: Path) -> Packed:
    """Read a file of class Gaussians.

    Raises:
        DataError: if it is none.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read as safetensors ({error})") from None
    if metadata.get("kind") != KIND:
        raise DataError(f"{path}: is not a file of `stillhouse regenerate pack` that this version reads")
    try:
        header = Header.model_validate_json(metadata["header"])
        packed = Packed(path, header, arrays)
        shapes = {name: arrays[name].shape[0] for name in ("mean", "variance", *(c.tensor for c in header.candidates))}
        if set(shapes.values()) != {len(packed.classes)} or len(packed.classes) != len(header.labels):
            raise ValueError(f"its tensors have {shapes} classes, its header {len(packed.classes)}")
        _describe(packed, packed.results(1, 0), 1, 0)
        if bad := [name for name in packed.classes if name in ("", ".", "..") or Path(name).name != name]:
            raise ValueError(f"{bad[0]!r} cannot be the name of a folder")
        _ = packed.method
    except (ValidationError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({' '.join(str(error).split())[:300]})") from None
    return packed


# ---------------------------------------------------------------- making images


def images(
    packed: Packed,
    to: Path,
    format: Format,
    *,
    ipc: int,
    seed: int = 0,
    backbone: str | None = None,
    vae: str | None = None,
    classes: Sequence[str] | None = None,
    part: tuple[int, int] | None = None,
    size: int | None = None,
    resample: Resample = "lanczos",
    label_folders: bool = False,
    compute: Compute | None = None,
) -> Path | None:
    """Make a set from a file of class Gaussians and the backbone.

    Finished classes are kept beside ``to`` in a folder ``.incomplete`` until the set is whole, so that a killed call goes on
    where it was.

    Args:
        backbone, vae: where they are, as in the configuration; default: where the run had them.
        classes: only these, relabelled in the order of the file.
        part: (k, n) makes the k-th of n parts of the classes and writes no set yet; several may run at once.
        compute: device and batch sizes; the file says the dtype.

    Returns:
        where the set is, or None if only a part was made.

    Raises:
        DataError: for a class that the file does not have.
        BackboneError: if the backbone is missing or another one.
    """
    wanted = _choose_classes(packed, classes)
    everything = dict(zip(packed.classes, packed.results(ipc, seed), strict=True))
    results = [everything[name] for name in wanted]
    description = _describe(packed, results, ipc, seed)
    compute = (compute or Compute()).model_copy(update={"dtype": packed.header.origin["backbone"]["dtype"]})
    work = to.with_name(f"{to.name}.incomplete")
    store = Store(work)
    mine = results if part is None else results[part[0] - 1 :: part[1]]
    missing = [result for result in mine if not store.exists(result)]
    if not to.exists() and missing:
        checkpoint = _backbone(packed, backbone, vae)
        for note in filter(None, (checkpoint.licence_note(), _departure(packed, ipc, seed))):
            print(note, file=sys.stderr)
        for result, arrays, info in _sample(packed, checkpoint, missing, compute):
            store.commit(result, arrays, info)
    if part is not None:
        return None
    write(
        ImageSet(
            description,
            lambda name: store.read(everything[name], "images").arrays["images"],
            size,
            resample,
            label_folders,
            compute.workers,
            progress,
        ),
        format,
        to,
    )
    shutil.rmtree(work, ignore_errors=True)
    return to


def _choose_classes(packed: Packed, classes: Sequence[str] | None) -> tuple[str, ...]:
    for name in classes or ():
        if name not in packed.classes:
            raise DataError(f"class {name}: {packed.path} has no such class; {one_of(name, packed.classes[:20])}")
    return packed.classes if classes is None else tuple(name for name in packed.classes if name in classes)


def _describe(packed: Packed, results: Sequence[Result], ipc: int, seed: int) -> Description:
    digests = {result.class_name: result.digest for result in results}
    return Description(
        **{**packed.header.origin, "classes": tuple(digests)},
        ipc=ipc,
        seed=seed,
        digest=digest_of_set(digests),
        results=digests,
        software=tuple(sorted(f"{name} {v}" for name, v in environment("")["versions"].items())),
    )


def _sample(
    packed: Packed, checkpoint: Checkpoint, missing: list[Result], compute: Compute
) -> Iterator[tuple[Result, Mapping[str, np.ndarray], dict[str, Any]]]:
    """Sample missing classes by the code of the stage ``sample``."""
    from workflow_scripts.diffusion.backbone import Denoiser  # here, because they import torch
    from workflow_scripts.methods.registry import ClassInputs
    from workflow_scripts.stages.sample import generate

    quiet_libraries()
    device = pick_device(compute.device)
    ipc, seed = missing[0].recipe["ipc"], missing[0].recipe["seed"]
    place = {name: index for index, name in enumerate(packed.classes)}
    known = packed.candidates(ipc, seed, device.type)
    moments = {key: packed.arrays[key].astype(np.float32) for key in ("mean", "variance")}

    def inputs_of(result: Result, denoiser: Denoiser) -> ClassInputs:
        index = place[result.class_name]
        won = -1 if known is None else int(known[index])
        return ClassInputs(
            result.class_name,
            denoiser.latent_shape,
            gaussian={key: values[index] for key, values in moments.items()},
            candidate=None if won < 0 else won,
            label=result.recipe["label"],
        )

    info = {**environment(str(device)), "licences": dict(checkpoint.licences)}
    made = generate(checkpoint, packed.method, inputs_of, compute, device)(missing)
    for result, arrays, extra in progress(made, len(missing), f"regenerate ipc{ipc} seed{seed}", "class"):
        yield result, {"images": arrays["images"]}, {**info, **extra}


def _departure(packed: Packed, ipc: int, seed: int) -> str | None:
    """Say why images will not be exactly those of the run, if something is known that keeps them from it."""
    if packed.header.sampling["recipe"] != RECIPES["sample"]:
        return "This version of Stillhouse samples in another way than the one that the run was made with: images will differ."
    if packed.header.half and (ipc, seed) in packed.header.sets:
        return "The Gaussians were rounded to 16 bits: images will differ slightly from the run's."
    return None


def _backbone(packed: Packed, path: str | None, vae: str | None) -> Checkpoint:
    """Open the backbone and see that it is the one of the file."""
    head = packed.header
    path, vae = path or head.backbone, vae or head.vae
    if path is None:
        raise BackboneError(f"{packed.path}: its run fitted its own backbone. Say with --backbone where it is.")
    with tempfile.TemporaryDirectory() as cache:
        checkpoint = open_checkpoint(path, Path(cache), vae).at(head.origin["resolution"])
    for option, what, found, expected in (
        ("backbone", "denoiser", checkpoint.denoiser, head.denoiser),
        ("vae", "autoencoder", checkpoint.vae, head.autoencoder),
    ):
        if found != expected:
            raise BackboneError(
                f"{checkpoint.path if option == 'backbone' else checkpoint.autoencoder}: is another {what} than the one that "
                f"{packed.path} was made with ({found[:16]}, not {expected[:16]}). Say with --{option} where that one is "
                f"(the run had {packed.header.origin['backbone']['name']})."
            )
    return checkpoint


def show(packed: Packed) -> str:
    """Return what a file holds, a line each."""
    head, origin = packed.header, packed.header.origin
    shape = "x".join(map(str, packed.arrays["mean"].shape[1:]))
    licences = ", ".join(f"{part} {licence}" for part, licence in origin["licences"].items())
    lines = {
        "method": f"{origin['method']}: {origin['summary']}",
        "classes": f"{len(packed.classes)} ({', '.join(packed.classes[:5])}{', ...' if packed.classes[5:] else ''})",
        "gaussians": f"mean and variance of {shape} latents at timestep {origin['parameters']['start']['timestep']}, "
        f"{'16' if head.half else '32'} bits; {packed.path.stat().st_size / 1e6:.1f} MB",
        "run": f"{origin['title']}; its sets: "
        + ", ".join(f"IPC {ipc} seed {seed}" for ipc, seed in head.sets)
        + (" (winning groups kept)" if head.candidates else ""),
        "real images": f"{origin['real_images']['images']} of {origin['real_images']['source']}",
        "backbone": f"{origin['backbone']['name']}, in {origin['backbone']['dtype']}",
        "licences": licences,
    }
    return "\n".join(f"{key:12} {value}" for key, value in lines.items())
