"""Source models by name: this project's own and any of timm's, with local weights. Nothing is ever downloaded."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metaopt.errors import ModelError
from metaopt.models.source_model import SourceModel
from metaopt.models.spec import ModelSpec
from metaopt.models.weights import load_weights, read_weights

OWN_MODELS = ("cifar_resnet20", "cifar_resnet56", "digits_vit")
"""Names that this project adds to timm's registry."""


def load_source_model(
    name: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    classes: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    channels_last: bool | None = None,
) -> SourceModel:
    """A source model by its timm name, on ``device``, in ``eval()``.

    Normalisation is timm's for that name, unless the checkpoint carries its own, as RobustBench's do.

    Args:
        name: one of `OWN_MODELS` or any name of ``timm.list_models()``, with or without a pretrained tag.
        checkpoint: local weights (see `metaopt.models.weights.read_weights`); without, weights are random.
        num_classes: C of the network and its checkpoint; by default timm's for that name.
        classes: the logits that are kept, by their index (see `SourceModel`); None: all.
        device: where the model goes.
        channels_last: memory format of convolution networks; by default on CPUs, for networks with BatchNorm, where it
            is faster (see `SourceModel`).

    Raises:
        ModelError: the name is unknown or the model cannot be built.
        CheckpointError: the file is missing, broken, holds code, or is of another architecture or class count.
    """
    module = _create(name, num_classes)
    spec = SourceModel(module, blocks=()).spec
    mean = std = None
    if checkpoint is not None:
        weights = read_weights(checkpoint, module, spec.num_classes)
        load_weights(module, weights.tensors)
        mean, std = weights.mean, weights.std
    device = torch.device(device)
    if channels_last is None:
        channels_last = device.type == "cpu" and any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    spec = ModelSpec(name, spec.num_classes, spec.input_size, mean or spec.mean, std or spec.std)
    return SourceModel(module.to(device), spec=spec, classes=classes, channels_last=channels_last)


def _create(name: str, num_classes: int | None) -> nn.Module:
    import timm

    from metaopt.models import cifar_resnet, digits_vit  # noqa: F401 - they register themselves in timm

    if not timm.is_model(name):
        known = timm.list_models()
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise ModelError(
            f"no model '{name}'; nearest are {', '.join(nearest or OWN_MODELS)}: give one of these or any name of "
            "timm.list_models()"
        )
    if num_classes is not None and num_classes < 2:
        raise ModelError(f"num_classes={num_classes}; allowed is 2 or more: give the model's class count")
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"timm cannot build '{name}' ({reason}); give another name or tag") from error
