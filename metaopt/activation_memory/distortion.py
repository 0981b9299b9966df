"""What a precision does to a layer's normalised activation, told by the codecs themselves."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from metaopt.activation_memory.precision import Precision
from metaopt.activation_memory.saved_activations import SavedActivations

SAMPLES = (64, 16, 16, 16)  # of a standard normal, on which distortions are measured


@lru_cache(maxsize=256)
def distortion(precision: Precision) -> float:
    """Relative squared error of a normalised activation at a precision, on standard normal values; in [0, 1]."""
    values = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))
    error = (as_kept(values, precision) - values).square().sum() / values.square().sum()
    return min(1.0, float(error))


def as_kept(inputs: Tensor, precision: Precision, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What backward gets to see of the input of a batch normalisation that was kept at a precision.

    Args:
        inputs: (B, C, ...).
        precision: how it was kept.
        weight: of the normalisation, (C,), and its
        bias: which place the codec's bins; None: 1 and 0.
    """
    layer = nn.BatchNorm1d(inputs.shape[1], track_running_stats=False).to(inputs)
    with torch.no_grad():
        for own, given in ((layer.weight, weight), (layer.bias, bias)):
            if given is not None:
                own.copy_(given)
    with torch.enable_grad(), SavedActivations(layer, memory="pruned", default=precision):
        # Not a leaf: the batch that a model is called with is alive anyway, and the engine leaves it alone.
        middle = inputs.detach().reshape(*inputs.shape[:2], -1).requires_grad_().clone()
        node = layer(middle).grad_fn
    assert node is not None
    with torch.no_grad():
        return node._saved_input.detach().reshape(inputs.shape)  # type: ignore[attr-defined]  # reading it unpacks it
