"""Which handler stores what an operator saves: one table over torch's functions and methods.

A handler is called once the operator has run. It fills the slots it understands; the rest is stored as the unknown is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.activation_memory import activations, attention, linear, norms
from metaopt.activation_memory.packs import Derived
from metaopt.activation_memory.store import Call, Store

Handler = Callable[[Store, Call], None]

_OPERATORS: tuple[tuple[str, Handler, tuple[Callable, ...]], ...] = (
    ("batch_norm", norms.batch_norm, (functional.batch_norm, torch.batch_norm)),
    ("layer_norm", norms.layer_norm, (functional.layer_norm, torch.layer_norm)),
    ("group_norm", norms.group_norm, (functional.group_norm, torch.group_norm)),
    ("rms_norm", norms.rms_norm, (functional.rms_norm, torch.rms_norm)),
    ("relu", activations.relu, (functional.relu, functional.relu_, torch.relu, torch.relu_)),
    ("relu", activations.relu, (Tensor.relu, Tensor.relu_)),
    ("hardtanh", activations.hardtanh, (functional.relu6, functional.hardtanh, functional.hardtanh_)),
    ("hardsigmoid", activations.hardsigmoid, (functional.hardsigmoid,)),
    ("leaky_relu", activations.leaky_relu, (functional.leaky_relu, functional.leaky_relu_)),
    ("gelu", activations.gelu, (functional.gelu,)),
    ("silu", activations.silu, (functional.silu,)),
    ("hardswish", activations.hardswish, (functional.hardswish,)),
    ("mish", activations.mish, (functional.mish,)),
    ("sigmoid", activations.by_result, (functional.sigmoid, torch.sigmoid, torch.sigmoid_)),
    ("sigmoid", activations.by_result, (Tensor.sigmoid, Tensor.sigmoid_, functional.tanh)),
    ("sigmoid", activations.by_result, (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)),
    ("attention", attention.fused_attention, (functional.scaled_dot_product_attention,)),
    ("matmul", attention.matmul, (torch.matmul, Tensor.matmul, Tensor.__matmul__)),
    ("softmax", attention.softmax, (functional.softmax, torch.softmax, Tensor.softmax)),
    ("convolution", linear.convolution, (torch.conv1d, torch.conv2d, torch.conv3d)),
    ("convolution", linear.convolution, (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)),
    ("product", linear.product, (functional.linear, torch.bmm, Tensor.bmm)),
    ("product", linear.product, (torch.einsum, torch.addmm, torch.baddbmm, torch.mul, Tensor.mul, Tensor.mul_)),
    ("product", linear.product, (Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)),
    ("pooling", linear.pooling, (functional.avg_pool1d, functional.avg_pool2d, functional.adaptive_avg_pool1d)),
    ("pooling", linear.pooling, (functional.adaptive_avg_pool2d, torch.max_pool2d, functional.max_pool2d)),
    ("dropout", linear.dropout, (functional.dropout, torch.dropout, torch.dropout_)),
)

HANDLERS: dict[Callable | None, tuple[str, Handler]] = {
    function: (kind, handler) for kind, handler, functions in _OPERATORS for function in functions
}
"""The operator's kind, for the records, and its handler."""


def reshaped(store: Store, call: Call) -> None:
    """Another shape of what is known."""
    call.remember_result(store)


def shifted(store: Store, call: Call) -> None:
    """A known tensor plus or times a number, or a tensor that is small beside it: a bias on attention scores."""
    other = call.get(1, "other")
    source, function, result = call.source, call.function, call.result
    if source is None or function is None or not isinstance(result, Tensor) or call.named:
        return
    if not isinstance(other, Tensor):
        store.remember(result, Derived(lambda: function(source.unpack(), other), source))
    elif 8 * other.numel() <= result.numel():
        kept = store.keep(other)
        store.remember(result, Derived(lambda: function(source.unpack(), kept.unpack()), source, kept))


FOLLOWERS: dict[Callable, Handler] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), reshaped),
    **dict.fromkeys((Tensor.transpose, Tensor.permute, torch.transpose, torch.permute, Tensor.contiguous), reshaped),
    **dict.fromkeys((Tensor.add, Tensor.__add__, torch.add, Tensor.mul, Tensor.__mul__, torch.mul), shifted),
}
"""Operators whose output is known where their input is, whether they save anything or not."""
