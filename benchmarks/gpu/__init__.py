"""How fast Handrail is on a GPU: ``python -m benchmarks.gpu``."""
