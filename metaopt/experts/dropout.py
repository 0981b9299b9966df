r"""Spatial differentiable dropout (SDD): keep the largest, or the smallest, activations and set the rest to zero.

Of :math:`n` activations :math:`a_i` the hard mask keeps exactly :math:`K = \max(1, \lfloor q n \rfloor)`, ties going to
the lower index; q is the share kept (MoASE, AAAI 2026, equation 2). The soft mask is

.. math:: m_i = \sigma\big((s_i - \tau(q)) / T\big), \quad s_i = \pm a_i,

where :math:`\tau(q)` interpolates the sorted scores linearly at :math:`q n`, halfway between the K-th and the next
where :math:`q n = K` is whole. So for T → 0 it becomes the hard mask there. Masks and their derivatives:

================== =============== ========================= =================
mode               value           derivative in activations derivative in q
================== =============== ========================= =================
"hard"             hard · a        1 where kept, else 0      none
"soft"             soft · a        exact, through τ as well  exact, through τ
"straight_through" hard · a        hard, plus a · ∂soft      a · ∂soft
================== =============== ========================= =================
"""

import math

import torch
from torch import Tensor

_WHOLE = 1e-4
"""How far below a whole number q · n may fall by rounding and still count as it."""

_OPEN_END = 60.0
"""Temperatures that the threshold may fall below the smallest score, where all are kept."""


def kept_count(size: int, share: Tensor | float) -> Tensor | int:
    """K, how many of ``size`` activations a share keeps, from 1 to ``size``; a tensor of int64 for one of shares."""
    if not isinstance(share, Tensor):
        return min(size, max(1, math.floor(size * share + _WHOLE)))
    # A share of NaN, from images that hold one, counts as the least: the activations are NaN themselves and stay so.
    return (size * share.detach() + _WHOLE).nan_to_num(nan=1.0).floor().clamp(1, size).long()


def hard_mask(scores: Tensor, count: Tensor | int) -> Tensor:
    """True at the ``count`` largest scores of each row, ties going to the lower index.

    Args:
        scores: (..., n).
        count: a whole number, or (...) of them, broadcast against the rows.
    """
    scores = scores.detach()
    if isinstance(count, int):  # one rank is selected faster than all are sorted: twice as fast from 64 on
        least = torch.kthvalue(scores, scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
    else:
        # Not a stable sort, which is slower: only values are read, and ties are told apart below.
        ranked = torch.sort(scores, dim=-1, descending=True).values
        count = count.expand(scores.shape[:-1]).unsqueeze(-1)
        least = ranked.gather(-1, count - 1)
    above, ties = scores > least, scores == least
    free = count - above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= free))


def soft_mask(scores: Tensor, share: Tensor | float, temperature: float) -> Tensor:
    """The mask m in (0, 1) of the module's equation, differentiable in scores and share.

    Args:
        scores: (..., n).
        share: q in (0, 1], a number, or (...), broadcast against the rows.
        temperature: T, in units of the scores.
    """
    size = scores.shape[-1]
    share = torch.as_tensor(share, dtype=scores.dtype, device=scores.device)
    ordered = torch.sort(scores, dim=-1, descending=True, stable=True).values
    ordered = torch.cat([ordered, ordered[..., -1:] - _OPEN_END * temperature], dim=-1)
    position = (size * share - 0.5).clamp(0.5, size - 0.5).expand(scores.shape[:-1]).unsqueeze(-1)
    below = position.detach().nan_to_num(nan=0.5).floor().long()
    threshold = torch.lerp(ordered.gather(-1, below), ordered.gather(-1, below + 1), position - below)
    return torch.sigmoid((scores - threshold) / temperature)


def spatial_dropout(
    activations: Tensor,
    share: Tensor | float,
    sign: Tensor | float = 1.0,
    *,
    mode: str = "hard",
    temperature: float = 0.1,
    rank_by: str = "value",
) -> Tensor:
    """Activations with all but a share of each row set to zero.

    Args:
        activations: (..., n); each row is one token's features, or all of a sample's.
        share: q in (0, 1], a number, or (...), broadcast against the rows.
        sign: 1 keeps the largest, −1 the smallest; a number, or (...), broadcast against the rows.
        mode: "hard", "soft" or "straight_through", see the module's table.
        temperature: T of the soft mask, in units of the activations.
        rank_by: rank activations by "value" or by "magnitude".
    """
    scores = activations.abs() if rank_by == "magnitude" else activations
    scores = scores * (sign.unsqueeze(-1).to(scores.dtype) if isinstance(sign, Tensor) else sign)
    if mode == "soft":
        return activations * soft_mask(scores, share, temperature)
    mask = hard_mask(scores, kept_count(scores.shape[-1], share))
    if mode == "hard":
        return activations * mask
    soft = soft_mask(scores, share, temperature)
    # The sum is exact: soft − soft is zero, so the value is the hard mask's to the last bit.
    return activations * (mask + (soft - soft.detach()))
