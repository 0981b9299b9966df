"""Attention, fused or not: queries, keys and values are stored, and what follows from them is computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metaopt.activation_memory.packs import Derived, Packed
from metaopt.activation_memory.store import SMALL, Call, Store

_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_attention(store: Store, call: Call) -> str:
    """F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale).

    The CPU's flash kernel keeps its output and each row's log-sum-exp as well: both are computed again. Other kernels'
    outputs are coded.
    """
    packs: list[Packed] = []
    for position, name in enumerate(("query", "key", "value")):
        for slot in call.slots_of(call.get(position, name)):
            slot.fill(store.codes(slot.saved, (1, 3) if slot.saved.ndim == 4 else None))
            assert slot.packed is not None
            packs.append(slot.packed)
    node = getattr(call.result.grad_fn, "name", lambda: "")()
    if node.startswith("ScaledDotProductFlashAttentionForCpu") and len(packs) == 3:
        _computed_again(store, call, packs)
    for slot in call.open:
        if slot.saved.is_floating_point() and slot.saved.shape == call.result.shape:
            slot.fill(store.codes(slot.saved, (1, 3) if slot.saved.ndim == 4 else None))
    return "attention"


def _computed_again(store: Store, call: Call, packs: list[Packed]) -> None:
    mask = call.get(3, "attn_mask")
    outputs = [slot for slot in call.open if slot.saved.is_floating_point() and slot.saved.ndim >= 3]
    outputs = [slot for slot in outputs if not (isinstance(mask, Tensor) and slot.saved.shape == mask.shape)]
    if len(outputs) != 2 or any(slot.saved.numel() < SMALL for slot in outputs):
        return
    mask_pack = None
    for slot in call.open:
        if slot not in outputs and slot.saved.is_floating_point():
            slot.fill(store.any(slot.saved))
            mask_pack = slot.packed
    if mask is not None and mask_pack is None:
        return
    options = {"is_causal": bool(call.get(5, "is_causal", False)), "scale": call.named.get("scale")}
    again = _Again(packs, mask_pack, float(call.get(4, "dropout_p", 0.0)), options)
    for slot in outputs:
        slot.fill(Derived(lambda which=int(slot.saved.shape != call.result.shape): again.take(which), *packs))


class _Again:
    """Output and log-sum-exp of a fused attention; computed for the one, kept until the other is asked for."""

    def __init__(self, packs: list[Packed], mask: Packed | None, dropout: float, options: dict[str, Any]) -> None:
        self._packs, self._mask, self._dropout, self._options = packs, mask, dropout, options
        self._waiting: dict[int, Tensor] = {}

    def take(self, which: int) -> Tensor:
        """0: the output (B, h, N, d). 1: the log-sum-exp of each row, (B, h, N)."""
        if which not in self._waiting:
            query, key, value = (pack.unpack() for pack in self._packs)
            mask = None if self._mask is None else self._mask.unpack()
            self._waiting = dict(
                enumerate(_cpu_attention(query, key, value, self._dropout, attn_mask=mask, **self._options))
            )
        return self._waiting.pop(which)


def matmul(store: Store, call: Call) -> str:
    """The factors as codes; the product is then known, for a softmax of it."""
    packs: list[Packed | None] = []
    factors = [call.get(0, "input"), call.get(1, "other")]
    for factor in factors:
        packs.append(None)
        for slot in call.open:
            if isinstance(factor, Tensor) and _reshaped(slot.saved, factor):
                known = store.known(factor)
                slot.fill(_reshape(known, slot.saved) if known is not None else store.codes(slot.saved))
                packs[-1] = slot.packed
                break
    for slot in call.open:
        if slot.saved.is_floating_point():
            slot.fill(store.codes(slot.saved))
    first, second = packs
    if first is not None and second is not None and isinstance(call.result, Tensor):
        shape = call.result.shape
        store.remember(call.result, Derived(lambda: (first.unpack() @ second.unpack()).view(shape), first, second))
    return "matmul"


def _reshaped(saved: Tensor, factor: Tensor) -> bool:
    """Whether bmm saved this factor, its leading dimensions made one."""
    return saved.numel() == factor.numel() and saved.shape[-2:] == factor.shape[-2:]


def _reshape(pack: Packed, like: Tensor) -> Packed:
    shape = like.shape
    return Derived(lambda: pack.unpack().reshape(shape), pack)


def softmax(store: Store, call: Call) -> str:
    """The probabilities: computed again from a known product, else codes."""
    source, function, rest, named = call.source, call.function, call.arguments[1:], dict(call.named)
    named.pop("input", None)
    for slot in call.slots_of(call.result):
        if source is not None and function is not None and slot.saved.numel() >= SMALL:
            packed = Derived(lambda: function(source.unpack(), *rest, **named), source)
            slot.fill(store.remember(slot.saved, packed))
        else:
            slot.fill(store.codes(slot.saved))
    return "softmax"


ATTENTION_HANDLERS: dict[Callable | None, Callable] = {
    functional.scaled_dot_product_attention: fused_attention,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), matmul),
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), softmax),
}
