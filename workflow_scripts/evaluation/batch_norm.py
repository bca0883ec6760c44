"""Batch norm with the statistics of a whole batch whose rows are shared among processes.

torch's own ``SyncBatchNorm`` refuses a CPU, makes the GPU wait for the host in every layer, and mixes types where a process
of a bfloat16 training has no rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workflow_scripts.team import Team

IMAGES_AND_PIXELS = (0, 2, 3)


def share_statistics(network: nn.Module, team: Team) -> None:
    """Let a network's batch norm layers share their statistics; the names in its state dict stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, SharedBatchNorm(child, team))


class SharedBatchNorm(nn.BatchNorm2d):
    """A batch norm layer as it was, but for whose rows it takes statistics."""

    def __init__(self, layer: nn.BatchNorm2d, team: Team):
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.load_state_dict(layer.state_dict())
        self.team = team

    @torch.compiler.disable  # the exchange is not for a compiler
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised map (n, C, H, W); n may be 0."""
        if not self.training:
            return super().forward(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        normalised: torch.Tensor = _Normalise.apply(x, self.weight, self.bias, self)
        return normalised


class _Normalise(torch.autograd.Function):
    """Batch norm in training (Ioffe and Szegedy 2015); means and variances are merged as by Chan et al. (1979)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: SharedBatchNorm
    ) -> torch.Tensor:
        channels = x.shape[1]
        count = x.numel() // channels
        mean = x.sum(IMAGES_AND_PIXELS, dtype=torch.float32) / max(count, 1)
        spread = (x - mean[:, None, None]).square().sum(IMAGES_AND_PIXELS)
        every = mean.new_zeros(layer.team.size, 2 * channels + 1)  # a row for each process
        every[layer.team.rank] = torch.cat([mean, spread, torch.full_like(mean[:1], count)])
        layer.team.add_up([every])
        means, spreads, counts = every.split([channels, channels, 1], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (spreads + counts * (means - mean).square()).sum(0) / total
        assert layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * total / (total - 1).clamp(min=1), layer.momentum)
        ctx.save_for_backward(x, weight, mean, (variance + layer.eps).rsqrt(), total)
        ctx.team = layer.team
        return F.batch_norm(x, mean, variance, weight, bias, eps=layer.eps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients; those of weight and bias are of this process's rows."""
        x, weight, mean, inverse, total = ctx.saved_tensors
        gradient = gradients[0].float()
        normal = (x - mean[:, None, None]) * inverse[:, None, None]
        own = torch.stack([gradient.sum(IMAGES_AND_PIXELS), (gradient * normal).sum(IMAGES_AND_PIXELS)])
        whole = own.clone()
        ctx.team.add_up([whole])
        shift, slope = (whole / total)[:, :, None, None]
        back = (gradient - shift - normal * slope) * (weight * inverse)[:, None, None]
        return back.to(x.dtype), own[1], own[0], None
