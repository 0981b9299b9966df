r"""The network runs in its own type, or under the caller's autocast; all around it is in float32 at least.

Small updates vanish in half precision (:math:`1 + 10^{-3} = 1` in bfloat16), and so does Adam's
:math:`\epsilon = 10^{-8}` in float16. So the adapted tensors are float32 copies of the network's, as in mixed precision
training (Micikevicius et al., ICLR 2018); each forward pass takes them in the network's own types, differentiably, and
gives its logits and features in float32.

float16 has few exponents, and small gradients are zero in it. A forward pass in it therefore scales what comes back,
as loss scaling does, by the power of two that brings the largest gradient of its outputs to about 1, and divides it out
of the float32 gradients. Of a ResNet-20 on CIFAR-10-C in batches of 200, the float16 gradient of the entropy has cosine
0.999 with the float64 one, with the scale and without; of a thousandth of the entropy, 0.999 and 0.30. The scale is
measured in each backward pass: no loss is too small or too large for it, it has no state, and no step is lost in
finding it. bfloat16 has float32's exponents and needs none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.parameters import call_with, own_tensor
from metaopt.types import ForwardOutput, Parameters, widened

Autocast = Callable[[], AbstractContextManager[Any]]
"""What a forward pass of the network runs within: the caller's autocast, or nothing."""


@contextmanager
def network_alone_autocasts(device_type: str) -> Iterator[Autocast]:
    """Within it the caller's autocast is off, but in forward passes that run within what it gives.

    Args:
        device_type: of the network.
    """
    if not torch.is_autocast_enabled(device_type):
        yield nullcontext
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        # Without the cache, which would keep each step's tensors until the caller's own context ends.
        yield lambda: torch.autocast(device_type, dtype=dtype, cache_enabled=False)


def run_network(
    model: nn.Module, tensors: Parameters, images: Tensor, how: Mapping[str, Any], autocast: Autocast = nullcontext
) -> ForwardOutput:
    """A forward pass with other tensors in the place of the model's own, brought to their types.

    Args:
        model: source model.
        tensors: by their names in it; the very tensors are used where types agree.
        images: (B, 3, H, W) in [0, 1].
        how: further arguments of the model.
        autocast: what the pass runs within.

    Returns:
        Logits and features in float32 at least, differentiable in ``tensors``.
    """
    own = {name: own_tensor(model, name) for name in tensors}
    first = next(model.parameters(), None)
    with autocast():
        scale = GradientScale() if _runs_in_float16([first, *own.values()], images.device.type) else None
        taken = tensors if scale is None else {name: scale.taken_in(tensor) for name, tensor in tensors.items()}
        inside = {n: tensor if tensor.dtype == own[n].dtype else tensor.to(own[n].dtype) for n, tensor in taken.items()}
        output: ForwardOutput = call_with(model, inside, (images,), how)
    output = output._replace(logits=widened(output.logits), features=tuple(map(widened, output.features)))
    return output if scale is None else scale.given_out(output)


def _runs_in_float16(tensors: Iterable[Tensor | None], device_type: str) -> bool:
    if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
        return True
    return any(each.dtype == torch.float16 for each in tensors if each is not None)


class GradientScale:
    """Scales the gradients inside one forward pass, in each of its backward passes anew."""

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        self.differentiated = False  # whether a gradient was taken with a graph of its own

    def taken_in(self, tensor: Tensor) -> Tensor:
        """The same values, whose gradient is divided by the factor."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        tensor = tensor.view_as(tensor)
        tensor.register_hook(lambda gradient: gradient if self.factor is None else gradient / self.factor)
        return tensor

    def given_out(self, output: ForwardOutput) -> ForwardOutput:
        """The same outputs, whose gradients are multiplied by the factor, which is found from all of them."""
        logits, *features = _GivenOut.apply(self, output.logits, *output.features)  # type: ignore[misc]
        return output._replace(logits=logits, features=tuple(features))

    def measure(self, gradients: list[Tensor]) -> None:
        """Find the factor: none where second derivatives will be asked, which would pass only one of the two places."""
        self.differentiated |= torch.is_grad_enabled()
        if self.differentiated:
            self.factor = None
            return
        largest = torch.stack([gradient.abs().amax() for gradient in gradients]).amax()
        factor = torch.exp2(-largest.log2().ceil().clamp(-100, 100))
        self.factor = torch.where(largest.isfinite(), factor, 1.0)


class _GivenOut(torch.autograd.Function):
    """The identity, whose gradients are scaled."""

    @staticmethod
    def forward(ctx: Any, scale: GradientScale, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        known = [gradient for gradient in gradients if gradient is not None]
        ctx.scale.measure(known)
        factor = ctx.scale.factor
        return None, *(None if g is None else g if factor is None else g * factor for g in gradients)
