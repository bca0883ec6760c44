"""Operations by arithmetic against those that torch counts while a network runs, on tensors without memory."""

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, VQModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workflow_scripts.config import FitDiT, FitVAE
from workflow_scripts.diffusion.fit import build_dit, build_vae, build_vq
from workflow_scripts.evaluation import inception
from workflow_scripts.evaluation.architectures import build
from workflow_scripts.evaluation.protocols import STUDENTS
from workflow_scripts.methods.matching import flatten
from workflow_scripts.operations import flops


def counted(call: Callable[..., object], *arguments: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def test_dit_xl_costs_twice_its_published_multiply_adds() -> None:
    """118.62 GMAC (DiT, table 1), and what diffusers adds: an embedder of the timestep in each of 28 blocks."""
    network, _ = flops.ARCHITECTURES["DiT-XL/2-256"]
    assert flops.dit_flop(network) == pytest.approx(2 * 118.62e9, rel=1e-3)
    assert flops.network_name(network) == "dit-28x1152-p2-32"
    with torch.device("meta"):
        model = DiTTransformer2DModel(**network).eval()
        label = torch.zeros(1, dtype=torch.int64)
        assert counted(model, torch.zeros(1, 4, 32, 32), label, label) == flops.dit_flop(network)
    assert flops.parameters(network) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_stable_diffusions_autoencoder() -> None:
    """136.4 and 311 GMAC at 256 pixels."""
    _, coder = flops.ARCHITECTURES["DiT-XL/2-256"]
    assert flops.encoder_flop(coder, 256) == pytest.approx(2 * 136.4e9, rel=1e-3)
    assert flops.decoder_flop(coder, 256) == pytest.approx(2 * 311e9, rel=1e-3)
    with torch.device("meta"):
        vae = AutoencoderKL(**coder).eval()
        assert counted(vae.encode, torch.zeros(1, 3, 256, 256)) == flops.encoder_flop(coder, 256)
        assert counted(vae.decode, torch.zeros(1, 4, 32, 32)) == flops.decoder_flop(coder, 256)


@pytest.mark.parametrize(("layers", "patch"), [(1, 1), (3, 2)])
def test_a_fitted_dit(layers: int, patch: int) -> None:
    fit = FitDiT(layers=layers, heads=2, head_dim=8, patch_size=patch)
    with torch.device("meta"):
        model, label = build_dit(fit, (3, 8, 8), 5).eval(), torch.zeros(1, dtype=torch.int64)
        assert counted(model, torch.zeros(1, 3, 8, 8), label, label) == flops.dit_flop(flops.fitted_dit(fit, 8, 3, 5))


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_a_fitted_autoencoder(kind: type) -> None:
    fit = FitVAE(channels=(8, 16, 24), latent_channels=3, layers_per_block=2, codes=7)
    config = flops.fitted_coder(fit, kind is VQModel)
    with torch.device("meta"):
        vae = (build_vq if kind is VQModel else build_vae)(fit, 16).eval()
        assert counted(vae.encode, torch.zeros(1, 3, 16, 16)) == flops.encoder_flop(config, 16)
        decoded = counted(vae.decode, torch.zeros(1, 3, 4, 4))
    # Finding the nearest of the codes is a matrix product too.
    assert decoded - flops.decoder_flop(config, 16) in ((0,) if kind is AutoencoderKL else (0, 2 * 16 * 3 * 7))


@pytest.mark.parametrize("name", ["convnet", "resnet_ap10", "resnet18"])
@pytest.mark.parametrize(("side", "width"), [(224, None), (96, 8), (33, 16)])
def test_students(name: str, side: int, width: int | None) -> None:
    with torch.device("meta"):
        student = build(name, classes=10, resolution=side, width=width)
        assert counted(student, torch.zeros(1, 3, side, side)) == flops.student_flop(name, width, side, 10)
    if name == "convnet":
        assert flops.convnet_parameters(width or 128, side, 10) == len(flatten(student))


def test_an_unknown_shape_has_no_cost_and_no_name() -> None:
    assert flops.dit_flop({"num_layers": 3}) is None
    assert flops.encoder_flop({}, 256) is None and flops.decoder_flop({}, 256) is None
    assert flops.network_name({}) is None and flops.coder_name({}) is None and flops.parameters({}) is None


@pytest.mark.parametrize("name", flops.GMACS_AT_224)
def test_other_students_are_reckoned_from_a_table(name: str) -> None:
    with torch.device("meta"):
        student = build(name, classes=1000, resolution=224)
        assert flops.student_flop(name, None, 224, 1000) == pytest.approx(
            counted(student, torch.zeros(1, 3, 224, 224)), rel=0.1
        )


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("side", [64, 224])
def test_what_the_last_layer_takes(name: str, side: int) -> None:
    with torch.device("meta"):
        network = build(name, classes=7, resolution=side)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    assert flops.penultimate_width(name, None, side) == last.in_features


def test_inception() -> None:
    with torch.device("meta"):
        found = counted(inception.build(original=False).eval(), torch.zeros(1, 3, 299, 299))
    assert found == pytest.approx(2e9 * flops.INCEPTION_GMACS, rel=0.005)
