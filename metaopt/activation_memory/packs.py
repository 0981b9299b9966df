"""How one tensor is stored between forward and backward: the codecs, and the precision that chooses among them.

Every pack owns its buffers, says how many bytes they are, and gives the tensor back in its own shape, type and memory
format. Packs never change, so that one may serve several nodes and several backward passes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from metaopt.activation_memory.bits import packed_bytes
from metaopt.activation_memory.byte_counter import ByteCounter
from metaopt.errors import ConfigError

CODE_BITS = tuple(range(1, 9))
ALLOWED_BITS = (*CODE_BITS, 16, 32)


@dataclass(frozen=True)
class Precision:
    """How finely one layer's activations are stored: one decision of two numbers.

    Bits per entry: 32 as they are, 16 as half floats, 8 to 1 as codes per channel; and the share of the entries that is
    kept, those farthest from the channel's centre.
    """

    bits: int = 32
    keep: float = 1.0

    def __post_init__(self) -> None:
        """Check both against their range."""
        if self.bits not in ALLOWED_BITS:
            raise ConfigError(f"a precision has bits={self.bits}; allowed are 1 to 8, 16 or 32: set for example bits=4")
        if not 0.0 <= self.keep <= 1.0:
            raise ConfigError(f"a precision has keep={self.keep}; allowed is 0 to 1: set for example keep=0.5")

    @property
    def lossless(self) -> bool:
        """Whether tensors are stored as they are."""
        return self.bits == 32 and self.keep == 1.0


class Packed(Protocol):
    """One stored tensor."""

    lossy: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its own buffers."""
        ...

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

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, which views share; nothing for what is alive anyway."""
        return 0 if self._hold is None else self._tensor.untyped_storage().nbytes()

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
    nbytes = 0

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

    @property
    def nbytes(self) -> int:
        """Two bytes an element."""
        return self._values.untyped_storage().nbytes()

    def unpack(self) -> Tensor:
        """The values in their own type."""
        return self._values.to(self._dtype)


class Derived:
    """What is computed from other packs, which cost nothing here."""

    nbytes = 0

    def __init__(self, compute: Callable[[], Tensor], *parents: Packed, lossy: bool | None = None) -> None:
        self._compute, self._parents = compute, parents
        self.lossy = any(parent.lossy for parent in parents) if lossy is None else lossy

    def unpack(self) -> Tensor:
        """Compute it again."""
        with torch.no_grad():
            return self._compute()


def affine_bytes(numel: int, channels: int, precision: Precision) -> int:
    """Bytes of a float32 tensor of ``numel`` entries in ``channels`` channels at a precision."""
    if precision.bits >= 16:
        values = numel * precision.bits // 8
        return values if precision.keep == 1.0 else round(values * precision.keep) + packed_bytes(numel, 1)
    kept = numel if precision.keep == 1.0 else round(numel * precision.keep)
    mask = 0 if precision.keep == 1.0 else packed_bytes(numel, 1)
    return packed_bytes(kept, precision.bits) + mask + 2 * 4 * channels
