"""Attention, fused or not: queries, keys and values are stored, and what follows from them is computed again."""

from typing import Any

import torch
from torch import Tensor

from metaopt.activation_memory.packs import Derived, Packed
from metaopt.activation_memory.store import SMALL, Call, Store

_cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_attention(store: Store, call: Call) -> None:
    """F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale).

    The CPU's flash kernel keeps its output and each row's log-sum-exp as well: both are computed again. Other kernels'
    outputs are coded.
    """

    def codes(tensor: Tensor) -> Packed:
        return store.codes(tensor, (1, 3) if tensor.ndim == 4 else None)

    inputs = [call.get(position, name) for position, name in enumerate(("query", "key", "value"))]
    packs = [slot.fill(codes(slot.saved)) for tensor in inputs for slot in call.slots_of(tensor)]
    node = getattr(call.result.grad_fn, "name", lambda: "")()
    if node.startswith("ScaledDotProductFlashAttentionForCpu") and len(packs) == 3:
        _compute_again(store, call, packs)
    for slot in call.open:
        if slot.saved.is_floating_point() and slot.saved.shape == call.result.shape:
            slot.fill(codes(slot.saved))


def _compute_again(store: Store, call: Call, packs: list[Packed]) -> None:
    mask = call.get(3, "attn_mask")
    floats = [slot for slot in call.open if slot.saved.is_floating_point()]
    outputs = [slot for slot in floats if slot.saved.ndim >= 3]
    outputs = [slot for slot in outputs if not (isinstance(mask, Tensor) and slot.saved.shape == mask.shape)]
    if len(outputs) != 2 or any(slot.saved.numel() < SMALL for slot in outputs):
        return
    mask_pack = None
    for slot in floats:
        if slot not in outputs:
            mask_pack = slot.fill(store.any(slot.saved))
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
            both = _cpu_attention(query, key, value, self._dropout, attn_mask=mask, **self._options)
            self._waiting = dict(enumerate(both))
        return self._waiting.pop(which)


def matmul(store: Store, call: Call) -> None:
    """The factors as codes; the product is then known, for a softmax of it."""
    first, second = (_fill_factor(store, call, call.get(*which)) for which in ((0, "input"), (1, "other")))
    for slot in call.open:
        if slot.saved.is_floating_point():
            slot.fill(store.codes(slot.saved))
    if first is not None and second is not None and isinstance(call.result, Tensor):
        shape = call.result.shape
        store.remember(call.result, Derived(lambda: (first.unpack() @ second.unpack()).view(shape), first, second))


def _fill_factor(store: Store, call: Call, factor: Any) -> Packed | None:
    """The first slot with this factor, whose leading dimensions bmm makes one."""
    if not isinstance(factor, Tensor):
        return None
    size, known = (factor.numel(), factor.shape[-2:]), store.known(factor)
    slot = next((slot for slot in call.open if (slot.saved.numel(), slot.saved.shape[-2:]) == size), None)
    if slot is None or known is None:
        return None if slot is None else slot.fill(store.codes(slot.saved))
    shape, dtype = slot.saved.shape, slot.saved.dtype
    return slot.fill(Derived(lambda: known.unpack().reshape(shape).to(dtype), known))


def softmax(store: Store, call: Call) -> None:
    """The probabilities: computed again from a known product, else codes."""
    for slot in call.slots_of(call.result):
        again = call.again() if slot.saved.numel() >= SMALL else None
        slot.fill(store.codes(slot.saved) if again is None else store.remember(slot.saved, again))
