"""How much each layer's saved activations matter: SURGEON's importance (arXiv 2503.20354, section 3).

Symbols: GI_l = ‖g_l‖_F / √numel(g_l), the gradient importance of layer l, where g_l is the gradient of its own weight;
M_l, the bytes that the layer keeps for backward, dense (layer activation memory, LAM); and

    I_l = GI_l · log(Σ_k M_k / M_l),    r_l = I_l / max_k I_k,

the importance and the published keep ratio.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaopt.norm_layers import BIAS_NAMES, WEIGHT_NAMES
from metaopt.types import Parameters


def learning_layers(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The tensor whose gradient tells a layer's importance, by the name of the layer: its weight, else its bias."""
    found: dict[str, str] = {}
    for name in parameters:
        layer, _, role = name.rpartition(".")
        if role in WEIGHT_NAMES or (role in BIAS_NAMES and layer not in found):
            found[layer] = name
    order = {name: position for position, name in enumerate(parameters)}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def gradient_importance(gradients: Parameters, layers: Mapping[str, str]) -> Tensor:
    """GI of each learning layer, (n,) in float32, detached.

    Args:
        gradients: gradient of each adapted tensor.
        layers: the tensor that counts for each layer (:func:`learning_layers`).
    """
    squares = torch.stack([gradients[name].detach().float().square().mean() for name in layers.values()])
    return squares.sqrt()


def match_layers(names: Sequence[str], learning: Sequence[str]) -> list[int]:
    """Which learning layer's gradient stands for each layer that keeps activations.

    A layer with a weight that learns has its own, by name. Any other (ReLU, GELU, attention, a frozen convolution)
    takes that of the nearest learning layer upstream, which is where the gradient that it passes on is used next;
    layers before the first learning one take the first.

    Args:
        names: layers that keep activations, in forward order, by their qualified name.
        learning: layers whose weight learns, by their qualified name.

    Returns:
        A position in ``learning`` for each of ``names``.
    """
    positions = {name: position for position, name in enumerate(learning)}
    latest = next((positions[name] for name in names if name in positions), 0)
    found: list[int] = []
    for name in names:
        latest = positions.get(name, latest)
        found.append(latest)
    return found


def layer_importance(gradient: Tensor, dense_bytes: Tensor) -> Tensor:
    """I_l, normalised to a maximum of 1: the published keep ratios.

    Args:
        gradient: GI of each layer, (L,), not negative.
        dense_bytes: M_l, (L,), positive.

    Returns:
        (L,) in [0, 1]; all ones where no layer is important, as for a single layer or a gradient of zero.
    """
    importance = gradient * (dense_bytes.sum() / dense_bytes).log().to(gradient)
    highest = importance.max()
    return torch.where(highest > 0, importance / highest.clamp_min(torch.finfo(highest.dtype).tiny), 1.0)
