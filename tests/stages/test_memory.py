"""Batches that shrink when memory runs out."""

import numpy as np
import pytest
import torch
from support import Site

from workflow_scripts.config import Inversion
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.recipes import Recipes
from workflow_scripts.stages import encode, invert
from workflow_scripts.stages.memory import Batch


class Memory:
    """A function of rows that runs out of memory above some number of them."""

    def __init__(self, rows: int):
        self.rows = rows
        self.seen: list[int] = []

    def __call__(self, part: np.ndarray) -> np.ndarray:
        if len(part) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append(len(part))
        return part * 2


def test_a_batch_is_halved_until_it_fits_and_stays_so() -> None:
    batch, memory = Batch(16), Memory(3)
    rows = np.arange(37)
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate(list(batch.over(rows, memory))), 2 * rows)
    assert batch.size == 2, "16, 8, 4, 2"
    assert set(memory.seen) == {1, 2}


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(Batch(4).over(np.arange(4), Memory(0)))


def test_other_errors_pass() -> None:
    def broken(part: np.ndarray) -> np.ndarray:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(Batch(4).over(np.arange(4), broken))


def test_stages_give_the_same_with_little_memory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding of eight images and inversion of eight latents, when memory suffices for three rows."""
    recipes = Recipes(site.config())
    autoencoder = Autoencoder.load(recipes.backbone.autoencoder, torch.device("cpu"), torch.float32)
    denoiser = Denoiser.load(recipes.backbone.path, torch.device("cpu"), torch.float32)
    recipe = dict(recipes.gaussian("ant", "d3hr").recipe)  # type: ignore[union-attr]
    recipe["inversion"] = Inversion(**recipe["inversion"]).model_dump()

    def both() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        encoded, _ = encode.encode_class(recipes, autoencoder, "ant", Batch(64))
        latents = torch.from_numpy(encoded["mean"].astype(np.float32))
        return encoded, invert.class_gaussian(denoiser, latents, recipe, Batch(64))[0]

    usual = both()
    whole_encode, whole_invert = Autoencoder.encode, invert.invert

    def little(self: Autoencoder, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_encode(self, pixels)

    def inverted(model: Denoiser, grid: object, part: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_invert(model, grid, part, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Autoencoder, "encode", little)
    monkeypatch.setattr(invert, "invert", inverted)
    for found, expected in zip(both(), usual, strict=True):
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-4, err_msg=name)
