"""What meta-training counts, and the Lagrange multiplier of updates that it adjusts as it goes."""

import math
from dataclasses import dataclass, field

MULTIPLIER_SPAN = 1.0  # change of the price over a whole training with a share of updates that is wrong by 1


@dataclass
class TrainerState:
    """How far meta-training has come."""

    # Change at every unroll.
    epoch: int = 0  # epochs that are complete
    unroll: int = 0  # unrolls that are complete in the present epoch
    updates: int = 0  # meta-updates, skipped ones included
    skipped: int = 0  # meta-updates left out for a non-finite loss or gradient
    lagrange_multiplier: float = (
        0.0  # what an update costs in the meta-loss, raised until the gate opens as rarely as asked
    )
    # Change at every epoch that is scored.
    best_epoch: int = 0
    best_loss: float = math.inf
    selection: list[float] = field(default_factory=list)  # losses on the selection tasks: at the start, and of these

    def __post_init__(self) -> None:
        """Check what a file could say otherwise."""
        counts = (self.epoch, self.unroll, self.updates, self.skipped, self.best_epoch)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"its counts are {counts}")
        if not all(type(loss) in (int, float) for loss in (self.best_loss, *self.selection)):
            raise ValueError(f"its losses are {self.selection}, the best of them {self.best_loss}")
        if type(self.lagrange_multiplier) not in (int, float) or not 0 <= self.lagrange_multiplier < math.inf:
            raise ValueError(f"its price of an update is {self.lagrange_multiplier}")


def next_multiplier(multiplier: float, rate: float, allowed: float, unrolls: int) -> float:
    """Dual ascent: an update grows dearer while the gate opens more often than it may, and cheaper while less.

    Args:
        multiplier: the price of an update so far, in units of the meta-loss; never below 0.
        rate: share of the latest batches that were updated on.
        allowed: the share that is asked for.
        unrolls: of the whole training: a short one has to find its price sooner.
    """
    return max(0.0, multiplier + MULTIPLIER_SPAN / unrolls * (rate - allowed))
