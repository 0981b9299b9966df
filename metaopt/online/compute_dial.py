r"""The compute dial: what an adaptation may cost in the mean, from forward passes alone to an update on every batch.

Cost is counted, not timed, so that predictions are the same in every run: each pass of the network over the batch is 1
forward pass, one with its backward pass is 2 (`metaopt.policy.step.DIFFERENTIATED`), whatever it is for: views, a
teacher, a second look of SAM or `class_skew`. With ``compute`` = c, a token bucket b earns c for each batch and pays
all that is spent; with q for an update, its prediction included, one is made where

.. math:: b + c - \mathrm{spent} - q \ge -(c - 1) \max(0, \mathrm{AHEAD} - a)

at the a-th batch of a domain: what its first AHEAD batches will earn may be spent where it begins, which is where an
update helps most, and a stream's mean is over c by no more than that first loan. The bucket holds no more than one
update: what a long rest has earned is not spent in a row. Where looks alone cost more than c, no update is made, and
the cost is theirs.

An update that is made on a share s of the batches stands for 1/s of them, and goes as far as a sum of so many steps
that agree only in part: its length is :math:`s^{-1/2}` times the rule's, at most LONGEST. On training images under
shifts of their own, one update at the first of ten batches brings 41 % of what one on each brings, and 65 % at twice
the length.
"""

import math
from collections.abc import Mapping
from typing import Any

from metaopt.errors import ConfigError, check_range
from metaopt.policy import AdaptationPolicy
from metaopt.policy.step import DIFFERENTIATED, StepContext
from metaopt.types import StepOutput

AHEAD = 10  # batches of a domain whose compute may be spent at its beginning
LONGEST = 2.5  # times the rule's own step
RESTED = "rested"  # event: not updated on, for an update was not paid for


class ComputeDial:
    """Says which batches of a stream may be updated on.

    Args:
        compute: forward passes a batch in the mean; 1: forward passes alone.

    Raises:
        ConfigError: fewer than 1, or no finite number.
    """

    def __init__(self, compute: float) -> None:
        check_range("compute", compute, 1, example="1.3")
        self.compute = compute
        self.reset()

    def reset(self) -> None:
        """As before the first batch."""
        self.saved = 0.0  # what the bucket holds, in passes of single images; below 0: a loan
        self.price = DIFFERENTIATED  # of an update, the prediction included, in passes of its batch: the latest one's
        self.age = 0  # batches since the domain began
        self._allowed = 0.0, 0  # passes before the update, and images of it, while one is under way

    @property
    def forward_only(self) -> bool:
        """Whether no update is ever made."""
        return self.compute == 1

    @property
    def length(self) -> float:
        """Of an update, as a multiple of the rule's own."""
        return 1.0 if self.forward_only else min(max(1.0, self._every**0.5), LONGEST)

    @property
    def frugal(self) -> bool:
        """Whether passes are to be saved: at less than an update and a look on every batch."""
        return self.compute < self.price + 1

    @property
    def _every(self) -> float:
        """Batches that one update stands for."""
        return (self.price - 1) / (self.compute - 1)

    def allows(self, context: StepContext, own: int) -> bool:
        """Whether a batch may be updated on, once it is known what it is like.

        Args:
            context: of the batch; it is told where not.
            own: images that were not answered before.
        """
        self.age = 0 if context.begun else self.age
        spent, images = sum(context.passes), len(context.images)
        left = self.saved + self.compute * own - spent - self.price * images
        loan = (self.compute - 1) * max(0, AHEAD - self.age) * images
        if self.forward_only or left < -loan:
            context.events.append(RESTED)
            return False
        self._allowed = spent, images
        return True

    def take(self, images: int, output: StepOutput, stepped: int) -> None:
        """Take from the bucket what an answer has cost.

        Args:
            images: that were answered.
            output: the answer.
            stepped: images of the step that it came with; 0 while more are waited for.
        """
        spent, learned_from = self._allowed
        if output.updated and learned_from:
            self.price = (output.passes - output.looked - spent) / learned_from
        self._allowed = 0.0, 0
        self.saved += self.compute * images - output.passes
        if stepped:
            self.saved, self.age = min(self.saved, self.price * stepped), self.age + 1

    def state_dict(self) -> dict[str, Any]:
        """All that another needs to go on bit for bit; how it is turned is no part of it."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: the values are none of a stream.
        """
        for name, kind in STATE.items():
            value: Any = values.get(name)
            if type(value) is not kind or not math.isfinite(value) or (value < 0 and name != "saved"):
                raise ValueError(f"the compute dial's {name} is {value!r:.80}")
        for name in STATE:
            setattr(self, name, values[name])


STATE = {"saved": float, "price": float, "age": int}
"""What a dial remembers, by name."""


def dial_of(policy: AdaptationPolicy, compute: float | None, budget_mib: float | None) -> ComputeDial | None:
    """The dial of a method's adapter, None where nothing limits it; where nothing may be held, none but forward passes.

    Args:
        policy: the method.
        compute: forward passes a batch in the mean; None: no limit.
        budget_mib: bound on what is held for backward; None: none.

    Raises:
        ConfigError: ``compute`` is below 1, or the method never updates.
    """
    dial = None if compute is None else ComputeDial(compute)
    if policy.updates:
        return ComputeDial(1) if holds_nothing(budget_mib) else dial
    if compute is not None:
        raise ConfigError(
            f"compute={compute:g} does not go with method {policy.method!r}, which never updates, so that nothing is "
            "left to save; allowed are methods that adapt: leave compute out, or set method=tent"
        )
    return None


def holds_nothing(budget_mib: float | None) -> bool:
    """Whether a budget, a number of MiB or None, is 0: forward passes alone."""
    return isinstance(budget_mib, int | float) and not isinstance(budget_mib, bool) and budget_mib == 0
