"""Benchmarks of reparam; ``python benchmarks/run.py`` runs them all."""
