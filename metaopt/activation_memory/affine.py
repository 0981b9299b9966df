"""a * x + b by channel, a piece of a tensor at a time, by those kernels that are fast at it."""

import torch
from torch import Tensor


def _cut(operand: Tensor, rows: slice) -> Tensor:
    """The rows of an operand that goes with some rows of a physical view."""
    return operand if operand.shape[0] == 1 else operand[rows]


class Operands:
    """What the rows of a physical view are multiplied with, and what is added.

    Vectors along a narrow last dimension are repeated once: element-wise kernels are slow on short inner loops.
    """

    def __init__(self, factor: Tensor, shift: Tensor, width: int = 1024) -> None:
        self.factor, self.shift = factor, shift
        times = width // factor.shape[-1]
        self._wide: tuple[Tensor, Tensor] | None = None
        if times > 1 and factor.numel() == factor.shape[-1]:
            self._wide = factor.reshape(-1).repeat(times), shift.reshape(-1).repeat(times)

    def of(self, rows: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, factor and shift for some rows of the view, which may be seen in another shape."""
        if self._wide is not None and rows.is_contiguous() and rows.numel() % len(self._wide[0]) == 0:
            return rows.view(-1, len(self._wide[0])), *self._wide
        return rows, _cut(self.factor, part), _cut(self.shift, part)


def affine(rows: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a * rows + b``: one kernel for two vectors along the last dimension, two for what repeats along it.

    In the latter case torch's one kernel takes three times as long.
    """
    if a.shape[-1] == 1:
        return torch.mul(rows, a, out=out).add_(b)
    return torch.addcmul(b, rows, a, out=out)
