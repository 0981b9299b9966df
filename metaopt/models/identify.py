"""Read off a network what it is: name, class count, input size, and the normalisation that it expects.

timm's networks tell all of it. One inside another module (``nn.Sequential(normalize, network)``, or a class of one's
own around it) is asked by trial what reaches it: the images as they are, normalised, or something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from metaopt.errors import ModelError
from metaopt.models.spec import CUSTOM_PREFIX, ModelSpec, channel_values

_LEVELS = (0.2, 0.5, 0.9)  # of flat images, which resizing and cropping leave as they are
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Identity:
    """A network and its spec; the network may be one that the given module only holds."""

    module: nn.Module
    spec: ModelSpec


def identify(module: nn.Module, given: Mapping[str, tuple[float, ...]] | None = None) -> Identity:
    """What a module is.

    Args:
        module: under no wrapper (`metaopt.models.unwrap`).
        given: ``mean`` or ``std``, or both, where the user knows them; they win, and nothing is tried out.

    Raises:
        ModelError: the class count or the normalisation cannot be told.
    """
    cfg, given = _timm_cfg(module), given or {}
    if cfg is None and not given:
        if isinstance(module, torch.fx.GraphModule):
            raise ModelError(
                f"{type(module).__name__} is a traced graph, which does not tell how its images are normalised; "
                "allowed is the network that was traced, or SourceModel(module, mean=..., std=...): give one"
            )
        if inside := _outermost_timm(module):
            return _identify_holder(module, inside)
    cfg = cfg or {}
    size = _input_size(module, cfg)
    mean, std = (given.get(label) or _known(label, cfg, size, given) for label in ("mean", "std"))
    name = cfg.get("architecture") or f"{CUSTOM_PREFIX}{type(module).__name__}"
    return Identity(module, ModelSpec(name, count_classes(module), size, mean, std))


def _known(
    label: str, cfg: Mapping[str, Any], size: tuple[int, int, int] | None, given: Mapping[str, tuple[float, ...]]
) -> tuple[float, ...]:
    """timm's values, or none to speak of, for as many channels as the network has."""
    found = channel_values(label, cfg.get(label) or getattr(ModelSpec, label))
    channels = size[0] if size is not None else len(next(iter(given.values()), found))
    if len(found) == channels:
        return found
    if len(set(found)) > 1:
        raise ModelError(
            f"the network takes {channels} channels and timm knows its {label}={found} for RGB alone; allowed is one "
            f"value per channel: give SourceModel(module, mean=..., std=...) of {channels}"
        )
    return found[:1] * channels


def count_classes(module: nn.Module) -> int:
    """C, by timm's classifier, an attribute ``num_classes``, or the last linear layer.

    Raises:
        ModelError: it has none of them.
    """
    classifier = getattr(module, "get_classifier", None)
    head = classifier() if callable(classifier) else None
    if isinstance(head, nn.Linear):  # which may have been replaced, and num_classes not
        return head.out_features
    count = getattr(module, "num_classes", None)
    if isinstance(count, int):
        return count
    for layer in reversed(list(module.modules())):
        if isinstance(layer, nn.Linear):
            return layer.out_features
    raise ModelError(
        f"cannot tell the class count of {type(module).__name__}: it has no 'num_classes' and no linear layer; "
        "give SourceModel(module, spec=ModelSpec(name, num_classes))"
    )


def _timm_cfg(module: nn.Module) -> Mapping[str, Any] | None:
    """What timm says of a network that it has built; None of others."""
    cfg = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    return cfg if isinstance(cfg, Mapping) and cfg else None


def _input_size(module: nn.Module, cfg: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Channels, height and width: those that the network was built with, where they are not timm's."""
    if not cfg.get("input_size"):
        return None
    channels, height, width = cfg["input_size"]
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if isinstance(built, tuple | list) and len(built) == 2:
        height, width = built
    stem = cfg.get("first_conv")
    stem = stem[0] if isinstance(stem, tuple | list) and stem else stem
    layer = dict(module.named_modules()).get(stem) if isinstance(stem, str) else None
    if isinstance(layer, _ConvNd):
        channels = layer.in_channels
    return int(channels), int(height), int(width)


def _outermost_timm(module: nn.Module) -> list[nn.Module]:
    """The networks of timm inside a module, without those inside of them."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if id(part) not in inside and _timm_cfg(part) is not None:
            found.append(part)
            inside |= {id(each) for each in part.modules()}
    return found


def _identify_holder(module: nn.Module, networks: list[nn.Module]) -> Identity:
    """A module that holds networks of timm."""
    unknown = ModelError(
        f"{type(module).__name__} holds a network of timm, and how its images are normalised cannot be told; allowed "
        "are modules that pass images on as they are, or (x - mean) / std: give SourceModel(module, mean=..., std=...)"
    )
    if len(networks) > 1:
        raise unknown
    network, own = networks[0], identify(networks[0]).spec
    if own.input_size is None:
        raise unknown
    trial = _try(module, network, own.input_size)
    if trial is None:
        raise unknown
    scale, offset = trial.scale, trial.offset
    if bool(((scale - 1).abs() < _TOLERANCE).all() and (offset.abs() < _TOLERANCE).all()):
        mean, std = own.mean, own.std  # it gets images as they are, so that what timm says of it holds for the whole
        outer = mean, std
    else:
        mean, std = _near((-offset / scale).tolist(), own.mean), _near((1 / scale).tolist(), own.std)
        outer = (0.0,) * len(mean), (1.0,) * len(std)
    if trial.passes_on:
        return Identity(network, ModelSpec(own.name, own.num_classes, own.input_size, mean, std))
    return Identity(module, ModelSpec(f"{CUSTOM_PREFIX}{type(module).__name__}", trial.classes, None, *outer))


def _near(values: list[float], known: tuple[float, ...]) -> tuple[float, ...]:
    """Values that were measured: the known ones, where they are those."""
    if all(abs(value - other) < _TOLERANCE for value, other in zip(values, known, strict=True)):
        return known
    return tuple(round(value, 5) for value in values)


@dataclass(frozen=True)
class _Trial:
    """What reaches a network inside another module, x -> scale * x + offset in each channel, and what comes back."""

    scale: Tensor  # (channels,), float64
    offset: Tensor
    passes_on: bool  # whether the module is that alone, for the network and its output alike
    classes: int


def _try(module: nn.Module, network: nn.Module, size: tuple[int, int, int]) -> _Trial | None:
    """Run a module on flat images and on noise; None where no line says what reaches the network."""
    reference = next(module.parameters())
    levels = torch.tensor(_LEVELS, dtype=torch.float64).view(-1, 1, 1, 1)
    shades = levels - 0.1 * torch.linspace(0, 1, size[0], dtype=torch.float64).view(1, -1, 1, 1)
    noise = torch.rand(1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([shades.expand(-1, *size), noise])
    met: list[tuple[Any, Any]] = []
    handle = network.register_forward_hook(lambda _module, inputs, output: met.append((inputs, output)))
    training = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad():
            output = module.eval()(images.to(reference.device, reference.dtype))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    finally:
        handle.remove()
        for part, mode in training.items():
            part.training = mode
    output = getattr(output, "logits", output)
    if len(met) != 1 or not isinstance(output, Tensor) or not met[0][0] or output.ndim != 2:
        return None
    reached = met[0][0][0].detach().double().cpu()
    if reached.ndim != 4 or reached.shape[:2] != images.shape[:2]:
        return None
    flat, tolerance = reached[: len(_LEVELS)], max(_TOLERANCE, 10 * torch.finfo(reference.dtype).eps)
    means, given = flat.mean(dim=(2, 3)), shades[:, :, 0, 0]
    scale = (means[-1] - means[0]) / (given[-1] - given[0])
    offset = means[0] - scale * given[0]
    allowed = tolerance * (1 + means.abs().max())
    line = scale.view(-1, 1, 1) * given[:, :, None, None] + offset.view(-1, 1, 1)
    if not bool(torch.isfinite(reached).all()) or bool(((flat - line).abs() > allowed).any()) or scale.min() <= 0:
        return None
    same = reached.shape == images.shape and bool(
        ((reached[-1] - (scale.view(-1, 1, 1) * noise[0] + offset.view(-1, 1, 1))).abs() <= allowed).all()
    )
    return _Trial(scale, offset, same and torch.equal(output, getattr(met[0][1], "logits", met[0][1])), output.shape[1])
