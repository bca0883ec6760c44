"""Noise schedules, backbones, the sampler, DDIM inversion, and fitting a backbone."""
