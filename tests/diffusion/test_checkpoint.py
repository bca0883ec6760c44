"""Where a backbone is found, what identifies it, its labels and its licences. None of it needs weights of true size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import support
import torch
from test_original import cin256, dit_state, drawing

from workflow_scripts.config import Backbone
from workflow_scripts.data.imagenet import class_names
from workflow_scripts.diffusion import original
from workflow_scripts.diffusion.backbone import Autoencoder, Denoiser
from workflow_scripts.diffusion.checkpoint import OWN, Checkpoint, autoencoder_of, open_checkpoint
from workflow_scripts.errors import BackboneError

CPU = torch.device("cpu")
WNIDS = list(class_names())
# As the hub has them: written by an early diffusers, whose class of the transformer had another name.
TRANSFORMER = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def imagenet_dit(path: Path, side: int = 32, names: dict[str, str] | None = None) -> Path:
    """The files of DiT-XL-2-256 (or -512), with a few letters for weights."""
    write(path / "transformer/config.json", TRANSFORMER | {"sample_size": side})
    write(path / "transformer/diffusion_pytorch_model.bin", "transformer")
    write(path / "vae/config.json", VAE)
    write(path / "vae/diffusion_pytorch_model.bin", "vae")
    write(path / "scheduler/scheduler_config.json", {"num_train_timesteps": 1000})
    named = dict(zip(map(str, range(1000)), class_names().values(), strict=True)) if names is None else names
    write(path / "model_index.json", {"_class_name": "DiTPipeline", "id2label": named})
    return path


def other_vae(path: Path, **changes: Any) -> Path:
    write(path / "config.json", VAE | changes)
    write(path / "diffusion_pytorch_model.safetensors", "another vae")
    return path


def in_hub(cache: Path, repository: str) -> Path:
    """The folder of a repository's files in a Hugging Face cache."""
    place = cache / f"models--{repository.replace('/', '--')}"
    write(place / "refs/main", "0123abc")
    return place / "snapshots/0123abc"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ---------------------------------------------------------------- identities


# What the shipped backbones were called before there were others: results refer to them by these.
SHIPPED = {
    "digits": ("bf39bb6a68f169d2", "9d2aa53de10f4cdf"),
    "digits-photo": ("0954d77d0e6cdfa1", "0c3f036335534f2a"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_backbones_keep_their_identities(name: str, tmp_path: Path) -> None:
    backbone = open_checkpoint(str(support.ROOT / "workflow_scripts/backbones" / name), tmp_path)
    assert (backbone.vae[:16], backbone.denoiser[:16]) == SHIPPED[name]
    assert backbone.licences == {"denoiser": OWN, "vae": OWN}
    assert backbone.licence_note() is None
    assert (backbone.resolution, backbone.latent_side, len(backbone.labels)) == (32, 8, 10)


# ---------------------------------------------------------------- DiT in diffusers format


@pytest.mark.parametrize(("side", "resolution"), [(32, 256), (64, 512)])
def test_imagenets_dit_needs_no_labels_file(side: int, resolution: int, tmp_path: Path) -> None:
    backbone = open_checkpoint(str(imagenet_dit(tmp_path / f"DiT-XL-2-{resolution}", side)), tmp_path / "cache")
    assert list(backbone.labels) == WNIDS
    assert [backbone.label_of(wnid) for wnid in ("n01440764", "n15075141")] == [0, 999]
    assert (backbone.latent_side, backbone.resolution, backbone.timesteps) == (side, resolution, 1000)
    assert backbone.licence_note() == (
        "Licence of the backbone's weights: denoiser CC-BY-NC-4.0, vae CC-BY-NC-4.0. Non-commercial use only."
    )
    with pytest.raises(BackboneError, match=r"class bee: .*the classes of ImageNet"):
        backbone.label_of("bee")


def test_names_in_another_order_are_refused(tmp_path: Path) -> None:
    names = dict(zip(map(str, range(1000)), class_names().values(), strict=True))
    names["0"], names["1"] = names["1"], names["0"].upper()
    names["2"] = "White Shark"
    path = imagenet_dit(tmp_path / "dit", names=names)
    with pytest.raises(
        BackboneError, match=r"id2label .*0 is 'goldfish.*', but n01440764 is 'tench.*'; 1 is"
    ) as caught:
        open_checkpoint(str(path), tmp_path / "cache")
    assert "2 is" not in str(caught.value), "one synonym is enough"
    write(path / "labels.json", WNIDS)
    assert open_checkpoint(str(path), tmp_path / "cache").label_of("n01440764") == 0, "labels.json has the last word"
    (path / "labels.json").unlink()
    write(path / "transformer/config.json", TRANSFORMER | {"num_embeds_ada_norm": 10})
    with pytest.raises(BackboneError, match=r"labels\.json is missing"):
        open_checkpoint(str(path), tmp_path / "cache")


def test_a_repository_in_the_hugging_face_cache(hub: Path, tmp_path: Path) -> None:
    there = imagenet_dit(in_hub(hub, "facebook/DiT-XL-2-256"))
    here = imagenet_dit(tmp_path / "DiT")
    backbone, same = (open_checkpoint(name, tmp_path / "cache") for name in ("facebook/DiT-XL-2-256", str(here)))
    assert backbone.path == there
    assert (backbone.vae, backbone.denoiser) == (same.vae, same.denoiser), "content counts, not the place"
    (there / "transformer/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(
        BackboneError, match=r"diffusion_pytorch_model\.safetensors is missing.* uv run hf download face"
    ):
        open_checkpoint("facebook/DiT-XL-2-256", tmp_path / "cache")


MISSING = {
    "facebook/DiT-XL-2-256": "uv run hf download facebook/DiT-XL-2-256",
    "models/DiT-XL-2-512": "uv run hf download facebook/DiT-XL-2-512 --local-dir models/DiT-XL-2-512",
    "models/DiT-XL-2-256x256.pt": (
        "curl -L -o models/DiT-XL-2-256x256.pt https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
    ),
    "someone/something": "uv run hf download someone/something",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_weights_say_how_to_get_them(name: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.path: ") as caught:
        open_checkpoint(name, tmp_path)
    assert str(caught.value).startswith(f"backbone.path: {name} is missing")
    assert str(caught.value).endswith(MISSING[name])


# ---------------------------------------------------------------- another autoencoder


def test_another_autoencoder(hub: Path, tmp_path: Path) -> None:
    path = imagenet_dit(tmp_path / "DiT-XL-2-256")
    own = open_checkpoint(str(path), tmp_path / "cache")
    other_vae(in_hub(hub, "stabilityai/sd-vae-ft-mse"))
    name = "stabilityai/sd-vae-ft-mse"
    backbone = open_checkpoint(str(path), tmp_path / "cache", name)
    assert backbone.denoiser == own.denoiser
    assert backbone.vae != own.vae
    assert backbone.resolution == 256
    assert backbone.licences == {"denoiser": "CC-BY-NC-4.0", "vae": "MIT"}
    assert autoencoder_of(backbone.autoencoder).scaling_factor == 0.18215
    scaled = other_vae(tmp_path / "scaled", scaling_factor=0.5)
    assert autoencoder_of(open_checkpoint(str(path), tmp_path / "cache", str(scaled)).autoencoder).scaling_factor == 0.5
    shutil.rmtree(path / "vae")
    assert open_checkpoint(str(path), tmp_path / "cache", name).vae == backbone.vae, "its own is not needed"
    shutil.copytree(in_hub(hub, name), path / "vae")
    assert open_checkpoint(str(path), tmp_path / "cache").vae == backbone.vae, "the same bytes are the same autoencoder"


def test_an_autoencoder_that_cannot_be_used(hub: Path, tmp_path: Path) -> None:
    path = str(imagenet_dit(tmp_path / "dit"))
    with pytest.raises(
        BackboneError, match=r"backbone\.vae: .*sd-vae-ft-ema.* uv run hf download stabilityai/sd-vae-ft-e"
    ):
        open_checkpoint(path, tmp_path / "cache", "stabilityai/sd-vae-ft-ema")
    wide = other_vae(tmp_path / "wide", latent_channels=16)
    with pytest.raises(BackboneError, match=r"backbone\.vae: .*16 channels.* takes 4"):
        open_checkpoint(path, tmp_path / "cache", str(wide))
    with pytest.raises(ValueError, match="vae belongs to path"):
        Backbone.model_validate({"fit": {}, "vae": "somewhere"})


def test_another_autoencoder_is_the_one_that_is_loaded(tiny_backbone: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny_backbone / "vae", tmp_path / "alone")
    config = json.loads((alone / "config.json").read_text())
    write(alone / "config.json", config | {"scaling_factor": 3.0})
    backbone = open_checkpoint(str(tiny_backbone), tmp_path / "cache", str(alone))
    assert Autoencoder.load(backbone.autoencoder, CPU, torch.float32).scaling_factor == 3.0


def test_weights_of_the_older_format(tiny_backbone: Path, tmp_path: Path) -> None:
    """As the hub has them: .bin, the transformer by its old name, the autoencoder's attention by its old names."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    path = shutil.copytree(tiny_backbone, tmp_path / "old")
    for part, kind in (("transformer", DiTTransformer2DModel), ("vae", AutoencoderKL)):
        state = kind.from_pretrained(path / part).state_dict()
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            renamed = {key.replace(f"attentions.0.{new}", f"attentions.0.{old}"): value for key, value in state.items()}
            state = renamed
        torch.save(state, path / part / "diffusion_pytorch_model.bin")
        (path / part / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((path / "transformer/config.json").read_text())
    write(
        path / "transformer/config.json", config | {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    )
    old, new = (open_checkpoint(str(place), tmp_path / "cache") for place in (path, tiny_backbone))
    assert old.denoiser != new.denoiser
    for load in (Denoiser.load, Autoencoder.load):
        one, two = (load(place, CPU, torch.float32).model.state_dict() for place in (path, tiny_backbone))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


# ---------------------------------------------------------------- one-file checkpoints


def test_an_original_dit_with_an_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models/DiT-XL-2-256x256.pt"
    path.parent.mkdir()
    torch.save(dit_state(drawing(), width=384, depth=1, side=32), path)
    vae = str(other_vae(tmp_path / "sd-vae-ft-mse"))
    with pytest.raises(BackboneError, match=r"backbone\.vae: .*sd-vae-ft-mse"):
        open_checkpoint(str(path), tmp_path / "cache")
    backbone = open_checkpoint(str(path), tmp_path / "cache", vae)
    assert (backbone.resolution, backbone.latent_side, list(backbone.labels)) == (256, 32, WNIDS)
    assert backbone.licences == {"denoiser": "CC-BY-NC-4.0", "vae": "MIT"}
    monkeypatch.setattr(original, "describe", None)
    assert open_checkpoint(str(path), tmp_path / "cache", vae) == backbone, "its shapes are read once"
    monkeypatch.undo()
    torch.save(dit_state(drawing(2), width=384, depth=1, side=32), path)
    assert open_checkpoint(str(path), tmp_path / "cache", vae).denoiser != backbone.denoiser
    torch.save(dit_state(drawing(), width=384, depth=1, side=8, classes=10), path)
    with pytest.raises(BackboneError, match="has 10 classes; of one-file"):
        open_checkpoint(str(path), tmp_path / "cache", vae)


def test_two_files_of_a_folder_are_hashed_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = str(other_vae(tmp_path / "vae"))
    names = [str(tmp_path / f"{name}.pt") for name in "ab"]
    for seed, name in enumerate(names):
        torch.save(dit_state(drawing(seed), width=384, depth=1, side=8), name)

    def both() -> list[Checkpoint]:
        return [open_checkpoint(name, tmp_path / "cache", vae) for name in names]

    first = both()
    assert first[0].denoiser != first[1].denoiser
    monkeypatch.setattr("hashlib.file_digest", None)
    assert both() == first


def test_a_latent_diffusion_checkpoint_describes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.safetensors", "a few letters")
    monkeypatch.setattr(original, "read_state", lambda path: cin256())
    backbone = open_checkpoint(str(path), tmp_path / "cache")
    assert (backbone.resolution, backbone.latent_side, list(backbone.labels)) == (256, 64, WNIDS)
    assert backbone.at(128).latent_side == 32, "the size at which LD3M was published"
    assert backbone.autoencoder == path
    assert autoencoder_of(path).scaling_factor == 1
    assert backbone.licences == {"denoiser": "unknown", "vae": "unknown"}
    assert backbone.licence_note() is None


# ---------------------------------------------------------------- licences


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Card", "APACHE-2.0"),
        ("---\ntags: [x]\n---\n", "unknown"),
        ("# Card\nlicense: mit", "unknown"),
        ("---\n: [\n---\n", "unknown"),
    ],
)
def test_the_model_card_has_the_licence(card: str, licence: str, tmp_path: Path) -> None:
    path = imagenet_dit(tmp_path / "weights")
    write(path / "README.md", card)
    assert open_checkpoint(str(path), tmp_path / "cache").licences == {"denoiser": licence, "vae": licence}
