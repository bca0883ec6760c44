"""The programs that the Snakemake rules run, one per rule."""
