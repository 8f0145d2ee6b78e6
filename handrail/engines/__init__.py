"""Engines answer what methods ask for: they decide what runs together, and where."""
