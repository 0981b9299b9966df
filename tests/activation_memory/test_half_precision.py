"""The engine on networks in half precision and under autocast: backward gets what it saved, in the type it saved."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from metaopt.activation_memory import Precision, SavedActivations
from metaopt.parameters import detached

from .networks import NETWORKS, build
from .test_networks import cosine, logits_and_gradient, peak

BIG = ("swin_tiny", "mobilenetv3_small_100", "convnext_atto", "vit_tiny")
# How the network runs, its own type, and how near 16 bits bring the gradient of all weights to the dense one's.
KINDS = {
    "bfloat16": (torch.bfloat16, None, 0.99),
    "float16": (torch.float16, None, 0.999),
    "autocast": (torch.float32, torch.bfloat16, 0.99),
}
CASES = [
    pytest.param(name, kind, marks=pytest.mark.slow if name in BIG else ())
    for name in NETWORKS
    for kind in KINDS
    if name != "resnet50"  # minutes in float16, and nothing that the others lack
    if name != "checkpointed" or kind != "autocast"  # torch's own checkpointing is told of autocast by its caller
]


def within(kind: str) -> AbstractContextManager:
    autocast = KINDS[kind][1]
    return nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of RMSNorm under autocast
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_of_all_weights_are_those_of_plain_torch(name: str, kind: str) -> None:
    dtype, _, near = KINDS[kind]
    net, _, images = build(name, images=8, dtype=dtype)
    leaves = detached(dict(net.named_parameters()))
    with within(kind):
        plain, truth = logits_and_gradient(net, leaves, 4 * images)
        logits, gradient = logits_and_gradient(net, leaves, 4 * images, "exact")
        _, coded = logits_and_gradient(net, leaves, 4 * images, "compact")
        _, pruned = logits_and_gradient(net, leaves, 4 * images, "pruned", default=Precision(bits=8, keep=0.5))
        _, halves = logits_and_gradient(net, leaves, 4 * images, "pruned", default=Precision(bits=16))
    assert torch.equal(logits, plain) and bool(truth.isfinite().all()) and truth.abs().max() > 0
    assert cosine(gradient, truth) > near and cosine(halves, truth) > near
    assert cosine(coded, truth) > 0.9 and cosine(pruned, truth) > 0.2


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("memory", ["exact", "compact", "halves"])
def test_a_half_network_holds_no_more_than_plain_torch(kind: str, memory: str) -> None:
    net, leaves, images = build("cifar_resnet20", images=16, dtype=KINDS[kind][0])
    options = {"memory": "pruned", "default": Precision(bits=16)} if memory == "halves" else {"memory": memory}
    assert peak(net, leaves, images, **options) < {"exact": 0.65, "compact": 0.4, "halves": 0.65}[memory] * peak(
        net, leaves, images
    )


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


@pytest.mark.parametrize("precision", [Precision(bits=16), Precision(bits=16, keep=1 - 1e-9)])
def test_what_has_two_bytes_already_is_kept_as_it_is(precision: Precision) -> None:
    """Values that float16 does not hold; pruned ones are rounded where they are centred."""
    x = torch.randn(64, 64).mul_(1e-9).bfloat16().requires_grad_()
    with SavedActivations(Square(), memory="pruned", default=precision) as saved:
        out = saved.model(x * 1)
    (found,) = torch.autograd.grad(out.sum(), [x])
    torch.testing.assert_close(found, 2 * x.detach(), rtol=0.0, atol=0.0 if precision.keep == 1 else 3e-11)
