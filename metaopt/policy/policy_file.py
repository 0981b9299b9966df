"""What a policy's file must hold, checked before anything of the size that it declares is built.

Checks raise ``ValueError``, or what the settings themselves raise: `AdaptationPolicy.from_dict` says which file it is.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse names and a record of meta-training of other types than are written."""
    if not isinstance(values["method"], str) or not values["method"]:
        raise ValueError(f"its method is {values['method']!r:.80}, no name")
    if not _is_texts(values["tensors"]) or len(set(values["tensors"])) != len(values["tensors"]):
        raise ValueError("its tensors are no list of different names")
    if not _is_count(values.get("seed", 0)):  # which files of older releases lack, as they do layers
        raise ValueError(f"its seed is {values['seed']!r:.80}, no count")
    if values.get("layers") is not None and not _is_texts(values["layers"]):
        raise ValueError(f"its layers are {values['layers']!r:.80}, no list of patterns")
    _check_training(values["training"])


def _check_training(training: Any) -> None:
    if not _is_plain(training) or not isinstance(training, dict):
        raise ValueError("its training is no record of plain values by name")
    config = training.get("config", {})
    if not isinstance(config, dict):
        raise ValueError("training.config holds no settings")
    for holder, name, fits, kind in (
        (training, "shifts", _is_texts, "list of names"),
        (training, "verdict_shifts", _is_texts, "list of names"),
        (config, "selection_shifts", _is_texts, "list of names"),
        (config, "batch_size", lambda value: _is_count(value) and value > 0, "positive count"),
        (config, "sizes", _is_range_of_counts, "range of positive counts"),
        (training, "epochs", _is_count, "count"),
        (training, "best_epoch", _is_count, "count"),
        (training, "skipped", _is_count, "count"),
        (training, "selection", lambda value: _is_list(value, (int, float)), "list of numbers"),
        (config, "deploy_step_scale", lambda value: _is_number(value) and 0 < value < math.inf, "positive number"),
    ):
        if name in holder and not fits(holder[name]):
            raise ValueError(f"training has {name}={holder[name]!r:.80}, no {kind}")


def check_weights(build: Callable[[], nn.Module], weights: Any) -> None:
    """Compare the learned tensors in a file with those of what its settings describe, before that takes any memory.

    Args:
        build: gives the policy; here on the device "meta", where tensors are shapes alone.
        weights: a ``state_dict``, not trusted.
    """
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError("its weights are no tensors by name")
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except RuntimeError as error:
        if "meta" in str(error):  # a part of one's own looks at its tensors while it is made
            return
        raise
    if differing := [str(name)[:80] for name in (*expected, *weights) if (name in expected) != (name in weights)]:
        raise ValueError(f"its weights and its settings differ in '{differing[0]}'")
    for name, tensor in expected.items():
        given = weights[name]
        if given.shape != tensor.shape:
            raise ValueError(f"'{name}' has shape {tuple(given.shape)}, where its settings say {tuple(tensor.shape)}")
        if tensor.is_floating_point() and given.dtype not in FLOATS:
            raise ValueError(f"'{name}' holds {given.dtype}, where floating point is needed")


def _is_plain(value: Any) -> bool:
    """Whether it is made of primitives alone, with text as every key."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _is_list(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list | tuple) and all(type(item) in kinds for item in value)


def _is_texts(value: Any) -> bool:
    return _is_list(value, (str,))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_range_of_counts(value: Any) -> bool:
    """Whether it is a pair of positive counts in order, or None."""
    return value is None or (_is_list(value, (int,)) and len(value) == 2 and 0 < value[0] <= value[1])
