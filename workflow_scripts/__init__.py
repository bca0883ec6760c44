"""Stillhouse: dataset distillation with latent diffusion models, on one machine or a SLURM cluster."""
