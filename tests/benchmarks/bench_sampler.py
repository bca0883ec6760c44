"""Measure the sampling loop: images/s by batch size, plain and with each guidance, on random weights.

    uv run python tests/benchmarks/bench_sampler.py                       # the size of the digits backbone, CPU
    uv run python tests/benchmarks/bench_sampler.py --size xl --device cuda --dtype bfloat16 --compile --batch 32 128

``xl`` has the true architecture of DiT-XL/2-256 with random weights; speed does not depend on them.
"""

import argparse
import time

import numpy as np
import torch
from diffusers import DDIMScheduler

from workflow_scripts.config import FitDiT, Sampler
from workflow_scripts.diffusion.backbone import Denoiser
from workflow_scripts.diffusion.fit import build_dit
from workflow_scripts.diffusion.sampler import sample
from workflow_scripts.diffusion.schedule import respace
from workflow_scripts.methods.manifoldgd import TangentGuidance, tangent_spaces
from workflow_scripts.methods.mgd3 import ModeGuidance

SIZES = {
    "digits": (FitDiT(), (4, 8, 8), 10),
    "xl": (FitDiT(layers=28, heads=16, head_dim=72, patch_size=2), (4, 32, 32), 1000),
}


def main() -> None:
    """Print one line per batch size and guidance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    device = torch.device(options.device)
    config, shape, classes = SIZES[options.size]
    model = build_dit(config, shape, classes).to(device, getattr(torch, options.dtype)).eval()
    if options.compile:
        model = torch.compile(model, dynamic=False)
    abar = DDIMScheduler(beta_start=1e-4, beta_end=2e-2).alphas_cumprod.double().numpy()
    denoiser = Denoiser(model, abar, classes, shape, device)
    settings = Sampler(steps=options.steps)
    grid = respace(abar, options.steps, settings.spacing)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{options.size}, {options.dtype}{', compiled' if options.compile else ''}, {options.steps} CFG steps, {name}"
    )
    for batch in options.batch:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(batch, *shape, generator=generator).to(device)
        noise = torch.randn(batch, options.steps, *shape, generator=generator).to(device)
        real = torch.randn(512, int(np.prod(shape)), generator=generator).to(device)
        prototype = real[torch.arange(batch, device=device) % len(real)]
        basis, centre = tangent_spaces(prototype, torch.full((batch,), 64, device=device), real, 64, 0.9, None)
        rows = {"prototype": prototype.view(batch, *shape), "basis": basis, "centre": centre.view(batch, *shape)}
        labels = torch.arange(batch, device=device) % classes
        for guidance, terms in {
            "plain": [],
            "mode": [ModeGuidance(0.1, options.steps // 2)],
            "tangent": [TangentGuidance(0.1, options.steps // 2, 0.0, 0.0)],
        }.items():
            seconds = []
            for _ in range(options.repeats + 1):  # the first warms up
                began = time.perf_counter()
                result = sample(denoiser, grid, settings, start, options.steps - 1, labels, noise, terms, rows)
                result.sum().item()
                seconds.append(time.perf_counter() - began)
            best = min(seconds[1:])
            print(
                f"batch {batch:4}  {guidance:8} {batch / best:9.2f} images/s  {1000 * best / options.steps:8.2f} ms/step"
            )


if __name__ == "__main__":
    main()
