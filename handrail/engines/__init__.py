"""Engines answer the requests of methods: they decide how requests are batched and where they run."""
