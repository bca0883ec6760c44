"""The published methods, one file each, on one engine."""
