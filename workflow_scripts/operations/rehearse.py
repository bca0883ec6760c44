"""``stillhouse rehearse``: tiny images with ImageNet's names and layout, and a backbone of random weights that knows them.

They are what the run ``rehearsal-1k`` reads. It tries a machine or a cluster, its file system and its queue at the full number
of classes before ImageNet is touched; its scores mean nothing.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from workflow_scripts.data.imagenet import wnids
from workflow_scripts.diffusion.checkpoint import LABELS
from workflow_scripts.errors import ConfigError
from workflow_scripts.store.files import TEMPORARY, explain_full_disk

RUN = "rehearsal-1k"
FOLDER = Path("data/rehearsal")  # where the run looks if it is not told another place
OVERLAY = "rehearsal.yaml"
PARTS = ("train", "val", "backbone", OVERLAY)
VALIDATION_IMAGES = 2
SIDE = 16


def rehearse(folder: Path, classes: int, images: int) -> list[str]:
    """Write ``train/``, ``val/``, ``backbone/`` and an overlay of the configuration that says where they are.

    Args:
        classes: how many of ImageNet's classes, the first ones in label order.
        images: training images per class.

    Returns:
        the options by which commands find the run.

    Raises:
        ConfigError: if there are not so many classes, or some of it is there already.
    """
    known = wnids()
    if not 2 <= classes <= len(known) or images < 1:
        raise ConfigError(f"rehearse: got {classes} classes of {images} images; give 2 to {len(known)} and 1 or more")
    for part in PARTS:
        if (folder / part).exists():
            raise ConfigError(f"{folder / part}: is there already. Remove it, or give another folder.")
    names = known[:classes]
    temporary = folder / f"{TEMPORARY}rehearsal.{uuid.uuid4().hex}"
    overlay = {
        "dataset": {"root": str(folder / "train"), "test_root": str(folder / "val")},
        "backbone": {"path": str(folder / "backbone")},
    }
    with explain_full_disk(folder):
        try:
            write_images(temporary, names, images)
            pictures = np.stack([picture(label, 0) for label in range(min(classes, 64))])
            random_backbone(temporary / "backbone", names, pictures)
            (temporary / OVERLAY).write_text(yaml.safe_dump({"run": RUN, "runs": {RUN: overlay}}))
            for part in PARTS:
                (temporary / part).rename(folder / part)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ["--run", RUN] if folder == FOLDER else ["--configfile", str(folder / OVERLAY)]


def write_images(folder: Path, names: Sequence[str], images: int) -> None:
    """Write ``train/WNID/WNID_0.JPEG`` and ``val/WNID/ILSVRC2012_val_00000001_WNID.JPEG``, and so on."""
    for label, name in enumerate(tqdm(names, unit="class", desc="images", disable=None)):
        files = [f"train/{name}/{name}_{index}.JPEG" for index in range(images)]
        for index in range(VALIDATION_IMAGES):
            number = label * VALIDATION_IMAGES + index + 1
            files.append(f"val/{name}/ILSVRC2012_val_{number:08d}_{name}.JPEG")
        for index, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(label, index)).resize((24, 20)).save(folder / file, quality=85)


def picture(label: int, index: int) -> np.ndarray:
    """Return a picture with a class's colour and an image's own noise, uint8 (SIDE, SIDE, 3)."""
    random = np.random.default_rng([label, index])
    colour = 128 + 90 * np.sin(label + np.arange(3) * 2.1)
    noise = random.normal(0, 30, (SIDE // 4, SIDE // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


def random_backbone(path: Path, classes: Sequence[str], pictures: np.ndarray) -> None:
    """Write a DiT of one layer and an autoencoder to latents of a quarter of the side, with random weights, for diffusers.

    Args:
        classes: the classes that it knows, in label order.
        pictures: uint8 (n, H, W, 3), whose latents are scaled to unit deviation.
    """
    import torch  # here, because the console command's other parts do without
    from diffusers import DDIMScheduler

    from workflow_scripts.config import FitDiT, FitVAE
    from workflow_scripts.diffusion.backbone import to_unit
    from workflow_scripts.diffusion.fit import build_dit, build_vae

    side = pictures.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = build_vae(FitVAE(channels=(4, 8, 8)), side)
        dit = build_dit(FitDiT(layers=1, heads=2, head_dim=8), (4, side // 4, side // 4), len(classes))
        for parameter in dit.parameters():  # the untrained network predicts zero for every class
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    with torch.inference_mode():
        mean = vae.encode(to_unit(pictures, torch.device("cpu"))).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / float(mean.std()))
    dit.save_pretrained(path / "transformer")
    vae.save_pretrained(path / "vae")
    # Little noise, because a network of random weights takes none away and its latents would grow beyond measure.
    DDIMScheduler(beta_start=1e-5, beta_end=4e-3, clip_sample=False).save_pretrained(path / "scheduler")
    (path / LABELS).write_text(json.dumps(list(classes)))
