"""Where experts go in a network: which modules, and how tokens are read from and added to what flows through them."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.errors import ModelError, check_one_of, check_range
from metaopt.norm_layers import norm_kind

PLACEMENTS = ("beside", "after")

SitePredicate = Callable[[str, nn.Module], str | None]
"""Placement of experts at a module of the network, by its name in there, or None for no experts.

"beside": they see the module's input and add to its output (an MLP). "after": they see its output and add to it.
"""

_MLP_NAME = re.compile(r"(.*\.)?(mlp|mlp_channels|ffn)")
_STAGE_NAME = re.compile(r"(layer|stage|block|s|features\.denseblock)\d+|(stages|layers|blocks)\.\d+")


def mlp_sites(name: str, _module: nn.Module) -> str | None:
    """Beside each MLP of a transformer or its like: ViT, Swin, ConvNeXt, mixers, of timm and torchvision."""
    return "beside" if _MLP_NAME.fullmatch(name) else None


def stage_sites(name: str, _module: nn.Module) -> str | None:
    """After each stage of a convolution network: ``layer1``, ``s1``, ``block1``, ``stages.0`` and the like."""
    return "after" if _STAGE_NAME.fullmatch(name) else None


@dataclass(frozen=True)
class Site:
    """One place for a mixture of experts."""

    name: str  # of the module in the network
    placement: str
    width: int  # d, features of a token
    axis: int  # of the features: 1 in maps (B, d, H, W), else −1
    norm: str | None = None  # the layer whose output the module reads, in the same block

    def __post_init__(self) -> None:
        """Check what a file could say otherwise."""
        check_one_of("site.placement", self.placement, PLACEMENTS)
        check_one_of("site.axis", self.axis, (1, -1))
        check_range("site.width", self.width, 1, example="64")

    def to_dict(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return asdict(self)


def find_sites(network: nn.Module, predicate: SitePredicate | None, images: Tensor) -> list[Site]:
    """The sites that a predicate names, measured in one forward pass without gradients.

    Args:
        network: any network.
        predicate: by default `mlp_sites`, and `stage_sites` where there are no such.
        images: an input of the network; its values do not matter.

    Raises:
        ModelError: no site is found, one does not run, or what flows there is no map and no sequence of tokens.
    """
    chosen = dict(_choose(network, predicate or mlp_sites))
    if predicate is None and not chosen:
        chosen = dict(_choose(network, stage_sites))
    if not chosen:
        raise ModelError(
            f"{type(network).__name__} has no module for experts; allowed are those a predicate names: give one that "
            "answers 'beside' for MLPs or 'after' for stages"
        )
    with _flow(network, chosen) as seen, torch.no_grad():
        network(images)
    return [_measure(network, name, placement, seen) for name, placement in chosen.items()]


def _choose(network: nn.Module, predicate: SitePredicate) -> Iterator[tuple[str, str]]:
    outer: list[str] = []
    for name, module in network.named_modules():
        placement = predicate(name, module) if name else None
        if placement is None or any(name.startswith(f"{other}.") for other in outer):
            continue
        if placement not in PLACEMENTS:
            raise ModelError(f"the predicate answers {placement!r} for '{name}'; allowed are beside, after or None")
        outer.append(name)
        yield name, placement


@contextmanager
def _flow(network: nn.Module, chosen: dict[str, str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Input and output of each chosen module, and of the norm layers beside it."""
    parents = {name.rpartition(".")[0] for name, placement in chosen.items() if placement == "beside"}
    seen: dict[str, tuple[Any, Any]] = {}
    with ExitStack() as handles:
        for name, module in network.named_modules():
            if name in chosen or (name.rpartition(".")[0] in parents and norm_kind(module) is not None):

                def record(_module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                    seen[name] = (inputs[0] if inputs else None, output)

                handles.callback(module.register_forward_hook(record).remove)
        yield seen


def _measure(network: nn.Module, name: str, placement: str, seen: dict[str, tuple[Any, Any]]) -> Site:
    given, output = seen.get(name, (None, None))
    flow = given if placement == "beside" else output
    if not isinstance(flow, Tensor) or not isinstance(output, Tensor) or flow.ndim not in (3, 4):
        raise ModelError(
            f"experts cannot go {placement} '{name}', which gives {getattr(flow, 'shape', type(flow).__name__)}; "
            "allowed are tokens (B, T, d) or maps of four axes: leave this module out by a predicate"
        )
    if flow.shape != output.shape:
        raise ModelError(
            f"experts cannot go beside '{name}', which turns {tuple(flow.shape)} into {tuple(output.shape)}; allowed "
            "are modules that keep the shape: leave this module out by a predicate"
        )
    axis = 1 if flow.ndim == 4 and _is_convolutional(network.get_submodule(name)) else -1
    parent = name.rpartition(".")[0]
    norms = (
        other
        for other, (_, normed) in seen.items()
        if other != name and other.rpartition(".")[0] == parent and normed is given
    )
    return Site(name, placement, flow.shape[axis], axis, next(norms, None) if placement == "beside" else None)


def _is_convolutional(module: nn.Module) -> bool:
    """Whether the first layer with weights tells that a module takes (B, d, H, W) rather than (B, H, W, d)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            # timm's LayerNorm2d is a LayerNorm by inheritance, over axis 1.
            return part.__class__.__name__.endswith("2d")
        if isinstance(part, nn.Conv2d):
            return True
    return False


def to_tokens(flow: Tensor, axis: int) -> Tensor:
    """(B, T, d) or a map of four axes -> (B, T, d)."""
    return flow if flow.ndim == 3 else flow.movedim(axis, -1).flatten(1, 2)


def from_tokens(tokens: Tensor, like: Tensor, axis: int) -> Tensor:
    """Inverse of :func:`to_tokens`, in the shape and type of ``like``."""
    if like.ndim == 4:
        height, width = like.movedim(axis, -1).shape[1:3]
        tokens = tokens.unflatten(1, (height, width)).movedim(-1, axis)
    return tokens.to(like.dtype)
