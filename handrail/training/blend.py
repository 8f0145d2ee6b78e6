"""A model between two others: the mean of their weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from handrail._util.errors import UserError
from handrail._util.files import whole_directory
from handrail.models.config import ModelConfig
from handrail.models.loading import load_model, savable
from handrail.training.contents import trained_from_another_model
from handrail.training.trained import KEPT, settings_file

log = logging.getLogger("handrail")


def blend(start: str, trained: str, share: float, output: Path) -> None:
    """Write the model with the weights (1 − share)·start + share·trained to the directory ``output``.

    Averaging a model with the one that it was fine-tuned from keeps much of what it has learned, and brings
    back part of what it has forgotten (WiSE-FT, arXiv 2109.01903). ``trained`` gives everything but weights,
    which are float32. Warns if a run trained it from another model than ``start``.

    Raises UserError if a model cannot be loaded, if the two differ in more than their weights, or if
    ``output`` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists; choose another --output")
    before, _ = load_model(ModelConfig(path=start), "START")
    after, tokenizer = load_model(ModelConfig(path=trained), "TRAINED")
    require_same_weights(before, start, after, trained)
    if warning := trained_from_another_model(trained, start):
        log.warning("TRAINED: %s", warning)
    theirs = before.state_dict()
    with torch.no_grad():
        for name, value in after.state_dict().items():
            if value.is_floating_point() and name not in after.all_tied_weights_keys:
                value.copy_(torch.lerp(theirs[name].float(), value.float(), share))
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_directory(output) as aside:
        savable(after).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if settings := settings_file(trained):
            shutil.copy(settings, aside / KEPT)


def require_same_weights(before: Any, start: str, after: Any, trained: str) -> None:
    """Raise UserError unless both models have tensors of the same names and shapes."""
    ours, theirs = (
        {name: (*value.shape,) for name, value in each.state_dict().items()} for each in (after, before)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"TRAINED: {trained} was not trained from {start}, in which {name} is "
                f"{theirs.get(name, 'missing')} and not {ours.get(name, 'missing')}; name the model that the "
                "training started from"
            )
