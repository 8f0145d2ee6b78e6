"""torch.compile for the update: the layers and the output layer's arithmetic become a few fused kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from handrail._util.errors import UserError


def compile_layers(model: Any, path: str) -> None:
    """Compile each layer for any number of tokens; all layers share the compiled code.

    Raises UserError if ``model``, of ``path``, has no layers of transformers' kind, or if there is no C
    compiler.
    """
    compilers = [os.environ.get("CC", "gcc"), os.environ.get("CXX", "g++"), "clang"]
    if not any(map(shutil.which, compilers)):
        raise UserError("model.compile: there is no C compiler; install gcc, or leave it out")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"model.compile: {path} has no layers that can be compiled one by one; leave it out")
    for layer in layers:
        layer.compile(dynamic=True)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled layers as they were written: sampling calls them with ever new shapes and a cache."""
    with torch.compiler.set_stance("force_eager"):
        yield
