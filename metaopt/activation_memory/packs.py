"""How one tensor is stored between forward and backward; packs in few bits an entry are in `codes` and beside it.

Every pack owns its buffers and gives the tensor back in its own shape, type and memory format. Packs never change, so
that one may serve several nodes and several backward passes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt.activation_memory.byte_counter import ByteCounter, Hold


class Packed(Protocol):
    """One stored tensor."""

    lossy: bool

    def unpack(self) -> Tensor:
        """The tensor, or what stands for it in backward."""
        ...


class Plain:
    """The tensor itself.

    Hooks switch off autograd's check for tensors that were changed in place after they were saved; it is made here.
    """

    lossy = False

    def __init__(self, tensor: Tensor, counter: ByteCounter | None) -> None:
        # Detached: a saved output that still carries its grad_fn would keep its own node, and so itself, alive.
        self._tensor = tensor.detach()
        self._version = tensor._version
        self._hold = None if counter is None else counter.hold(tensor)

    def unpack(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: it was changed in place since.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs was changed in place after it was "
                f"saved (version {self._tensor._version}, saved at version {self._version}): change a clone instead"
            )
        return self._tensor


class Stub:
    """Stands for a tensor of which backward reads the shape and memory format alone."""

    lossy = False

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._strides = tuple(tensor.shape), tensor.stride()
        self._options: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}

    def unpack(self) -> Tensor:
        """Memory that nobody reads, in the strides that keep torch from copying it; zeros for second derivatives."""
        if torch.is_grad_enabled():
            return torch.zeros((), **self._options).expand(self._shape)
        return torch.empty_strided(self._shape, self._strides, **self._options)


class Derived:
    """What is computed when it is asked for: from other packs, which cost nothing here, or from what ``compute`` holds.

    Args:
        compute: gives the tensor.
        parents: packs that it reads.
        lossy: whether it loses something by itself.
        hold: counts what ``compute`` holds.
    """

    def __init__(
        self, compute: Callable[[], Tensor], *parents: Packed, lossy: bool = False, hold: Hold | None = None
    ) -> None:
        self._compute, self._hold = compute, hold
        self.lossy = lossy or any(parent.lossy for parent in parents)

    def unpack(self) -> Tensor:
        """Compute it."""
        with torch.no_grad():
            return self._compute()


def half(tensor: Tensor, counter: ByteCounter) -> Derived:
    """Half floats: float16 where the values fit, else bfloat16."""
    dtype = tensor.dtype
    low, high = torch.aminmax(tensor.detach())
    fits = bool(torch.maximum(-low, high) < torch.finfo(torch.float16).max)
    values = tensor.detach().to(torch.float16 if fits else torch.bfloat16)
    return Derived(lambda: values.to(dtype), lossy=True, hold=counter.hold(values))
