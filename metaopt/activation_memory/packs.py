"""How one tensor is stored between forward and backward; packs in few bits an entry are in `codes` and beside it.

Every pack owns its buffers and gives the tensor back in its own shape, type and memory format. Packs never change, so
that one may serve several nodes and several backward passes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt.activation_memory.byte_counter import ByteCounter


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


class Half:
    """Half floats: float16 where the values fit, else bfloat16."""

    lossy = True

    def __init__(self, tensor: Tensor, counter: ByteCounter) -> None:
        self._dtype = tensor.dtype
        low, high = torch.aminmax(tensor.detach())
        fits = bool(torch.maximum(-low, high) < torch.finfo(torch.float16).max)
        self._values = tensor.detach().to(torch.float16 if fits else torch.bfloat16)
        self._hold = counter.hold(self._values)

    def unpack(self) -> Tensor:
        """The values in their own type."""
        return self._values.to(self._dtype)


class Derived:
    """What is computed from other packs, which costs nothing here."""

    def __init__(self, compute: Callable[[], Tensor], *parents: Packed) -> None:
        self._compute = compute
        self.lossy = any(parent.lossy for parent in parents)

    def unpack(self) -> Tensor:
        """Compute it again."""
        with torch.no_grad():
            return self._compute()
