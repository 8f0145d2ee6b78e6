"""Benchmarks and measurements. The docstring of each module says how to run it."""
