"""How finely one layer's activations are stored."""

from dataclasses import dataclass

from metaopt.errors import ConfigError

ALLOWED_BITS = (*range(1, 9), 16, 32)


@dataclass(frozen=True)
class Precision:
    """One decision of two numbers.

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
