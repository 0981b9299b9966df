"""Reading pre-trained weights of any common layout into a network: timm, RobustBench, DataParallel, safetensors."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from metaopt.errors import CheckpointError
from metaopt.files import existing_file, is_finite, safe_load

Triple = tuple[float, float, float]

_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "ema_state_dict", "state_dict_ema", "model_ema")
_DEPTH = 10
"""How many of those may stand one in another; a dictionary that holds itself has no end."""

_PREFIX = re.compile(r"((module|model|_orig_mod|net|network|backbone|1)\.)*")
"""What wrappers put before every name: DataParallel, RobustBench, Lightning, torch.compile, Sequential(norm, net)."""

_PREFIX_START = re.compile(r"^((module|model|_orig_mod|net|network)\.)*")
"""The same before the names of a wrapper's own buffers."""

_DERIVED = ("num_batches_tracked", "relative_position_index", "attn_mask")
"""Last parts of names of buffers that a network computes itself: some releases store them, others do not."""

_MEAN_NAMES = ("mean", "mu", "normalize.mean", "normalizer.mean", "normalization.mean", "0.mean", "0.mu")
_STD_NAMES = ("std", "sigma", "normalize.std", "normalizer.std", "normalization.std", "0.std", "0.sigma")


class Weights(NamedTuple):
    """A network's tensors under its own names, and the normalisation that the file carried, if any."""

    tensors: dict[str, Tensor]
    mean: Triple | None = None
    std: Triple | None = None


def read_weights(path: str | os.PathLike[str], module: nn.Module, num_classes: int) -> Weights:
    """The tensors in a checkpoint file, under the names and with the shapes of ``module``.

    Args:
        path: a file of ``torch.save`` (a state_dict, or one inside a dict under a usual key) or ``.safetensors``.
        module: the network that they are for.
        num_classes: its class count, for the message where only the classifier differs.

    Raises:
        CheckpointError: the file is missing, broken (its checksums are compared), holds code, is of another
            architecture or class count, or holds NaN, infinity, or other numbers than the network's.
    """
    source = Path(path)
    stored = _load_safetensors(source) if source.suffix == ".safetensors" else safe_load(source, checksums=True)
    tensors = _find_state_dict(stored)
    if not tensors:
        raise CheckpointError(
            f"'{source}' holds no state_dict; allowed are names with tensors, alone or under one of "
            f"{', '.join(_CONTAINERS)}: save model.state_dict()"
        )
    weights = _strip_wrappers(tensors, list(module.state_dict()))
    _check_fit(weights.tensors, module, num_classes, source)
    _check_values(weights, module, source)
    return weights


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    existing_file(path, "in the form of safetensors")
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged header makes of it, in the library or in torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"'{path}' is no readable .safetensors file ({reason}); download it again") from error


def _find_state_dict(stored: Any) -> dict[str, Tensor]:
    """The state_dict in what a file held: itself, or the first one under a usual key, and so on inside of that."""
    for _ in range(_DEPTH):
        inner = (stored.get(key) for key in _CONTAINERS) if isinstance(stored, Mapping) else ()
        found = next((each for each in inner if isinstance(each, Mapping)), None)
        if found is None:
            break
        stored = found
    if not isinstance(stored, Mapping):
        return {}
    return {str(name): tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def _strip_wrappers(tensors: dict[str, Tensor], expected: list[str]) -> Weights:
    """Take off what wrappers put before the network's names, and set the normalisation that they carry apart."""
    prefix = _wrapper_prefix(tensors, expected)
    inner = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outer = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    own = set(expected)
    mean, std = (_triple(names, own, inner, outer) for names in (_MEAN_NAMES, _STD_NAMES))
    kept = {name: tensor for name, tensor in inner.items() if name in own or not _is_extra(name)}
    kept |= {name: tensor for name, tensor in outer.items() if not _is_extra(name)}
    return Weights(kept, mean, std) if mean and std else Weights(kept)


def _wrapper_prefix(tensors: Mapping[str, Tensor], expected: list[str]) -> str:
    """The usual prefix, possibly nested, under which most of the network's names occur."""
    prefixes = {""}
    for anchor in expected[:1]:
        found = (name.removesuffix(anchor) for name in tensors if name.endswith(anchor))
        prefixes |= {prefix for prefix in found if _PREFIX.fullmatch(prefix)}
    return max(sorted(prefixes), key=lambda prefix: sum(prefix + name in tensors for name in expected))


def _is_extra(name: str) -> bool:
    """Whether a name is a buffer that the network computes itself, or a wrapper's normalisation."""
    return name.endswith(_DERIVED) or _PREFIX_START.sub("", name) in (*_MEAN_NAMES, *_STD_NAMES)


def _triple(names: tuple[str, ...], own: set[str], *parts: Mapping[str, Tensor]) -> Triple | None:
    """Three channels' values that a wrapper such as RobustBench's keeps under one of ``names`` among the weights."""
    for tensors in parts:
        for name, tensor in tensors.items():
            if name not in own and _PREFIX_START.sub("", name) in names and tensor.numel() == 3:
                red, green, blue = tensor.double().flatten().tolist()
                return (red, green, blue)
    return None


def _check_fit(tensors: Mapping[str, Tensor], module: nn.Module, num_classes: int, source: Path) -> None:
    """Refuse weights of another architecture or class count with one line that says which."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(_DERIVED)]
    unknown = [name for name in tensors if name not in expected]
    differing = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    if not (missing or unknown or differing):
        return
    classifier = all(expected[name].shape[:1] == (num_classes,) for name in differing)
    sizes = {tensors[name].shape[0] for name in differing if tensors[name].ndim}
    same_rest = all(tensors[name].shape[1:] == expected[name].shape[1:] for name in differing)
    if not missing and not unknown and classifier and same_rest and len(sizes) == 1:
        found = sizes.pop()
        raise CheckpointError(
            f"'{source}' is for {found} classes; the model has {num_classes}: "
            f"ask for num_classes={found} or give a checkpoint for {num_classes}"
        )
    counts = f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(differing)} of another shape"
    example = (missing + unknown + differing)[0]
    raise CheckpointError(
        f"'{source}' is not for {type(module).__name__} ({counts}, for one '{example}'); give a checkpoint of this "
        "architecture or name the right model"
    )


def _check_values(weights: Weights, module: nn.Module, source: Path) -> None:
    """Refuse values that the network cannot compute with, once the shapes are known to be its own."""
    expected = module.state_dict()
    for name, tensor in weights.tensors.items():
        own = expected[name].dtype
        if tensor.is_complex() != own.is_complex or (own.is_floating_point and not tensor.is_floating_point()):
            raise CheckpointError(
                f"'{source}' holds {tensor.dtype} for '{name}'; the model has {own} there: give weights of that kind"
            )
        if own.is_floating_point and not is_finite(tensor.to(own)):
            raise CheckpointError(
                f"'{source}' holds NaN or infinity in '{name}'; weights are finite numbers: download the file again"
            )
    for label, values in (("mean", weights.mean), ("std", weights.std)):
        if values is not None and not all(math.isfinite(value) for value in values):
            raise CheckpointError(
                f"'{source}' holds {label}={values} for its images; allowed are finite numbers: download it again"
            )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into ``module``; buffers that the file lacks keep their value."""
    own = module.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
