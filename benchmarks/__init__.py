"""Benchmarks of daam_kernels, run from the repository root: ``python -m benchmarks kernels``, ``... quickstart``."""
