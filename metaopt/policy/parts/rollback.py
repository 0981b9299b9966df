"""Roll-back: where the verdict says that adaptation does harm, it goes back to where it last did good.

Whenever the source was asked, the verdict (`metaopt.policy.parts.verdict`) is heard. Where it takes the adapted model
for better than the source, parameters and all state are noted every so often: numbered snapshots, of which the latest
few are kept. Where it says at two hearings running, and each time beyond doubt, that the adapted model errs more, the
latest snapshot comes back and is taken from the list, and nothing is learned for ``hold`` batches. Without any
snapshot, everything begins anew, and meanwhile the source itself answers. Each further roll-back holds twice as long as
the one before, until a new snapshot is taken. What the verdict has seen is forgotten at both ends of a hold: it was of
another model.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metaopt.errors import check_range
from metaopt.policy.part import Part
from metaopt.policy.parts.verdict import VerdictPart, source_logits
from metaopt.policy.step import StepContext
from metaopt.types import Parameters, StepOutput

HEARINGS = 2  # running, at which harm is told: one in forty of them is wrong by chance
DOUBLINGS = 10  # of a hold, at most


class Snapshot(NamedTuple):
    """Parameters and state after a batch, packed into one vector, whose structure that of other batches tells."""

    number: Tensor  # (); 0: none
    values: Tensor  # (n,), float64, which holds what states hold exactly; empty without any
    shapes: Tensor  # of the tensors, each its dimensions after their number, (m,), int64


class RollbackState(NamedTuple):
    """What is known of the stream so far."""

    taken: Tensor  # snapshots so far, ()
    since: Tensor  # hearings since the last one, ()
    harmful: Tensor  # hearings running that told of harm, ()
    rolled: Tensor  # roll-backs since the last snapshot, ()
    hold: Tensor  # batches until something is learned again, ()
    source: Tensor  # 1 where the source answers meanwhile, ()
    snapshots: tuple[Snapshot, ...]  # the latest first


@dataclass(frozen=True)
class RollbackConfig:
    """How often snapshots are taken, how many are kept, and for how long nothing is learned after a roll-back."""

    snapshots: int = 3  # kept, each as large as the adapted parameters and the state
    every: int = 4  # hearings that told of good, from one snapshot to the next
    hold: int = 20  # batches

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_range("rollback.snapshots", self.snapshots, 1, 100, example="3")
        check_range("rollback.every", self.every, 1, example="4")
        check_range("rollback.hold", self.hold, 1, example="20")


class Rollback(Part):
    """Goes back to where adaptation did good, where the verdict says that it does harm."""

    Config = RollbackConfig
    name = "rollback"
    uses = (VerdictPart,)
    lasting = True  # adaptation that does harm can look like a shift
    events = ("rolled_back", "held")

    def init(self, parameters: Parameters) -> RollbackState:
        """Nothing yet."""
        zero = next(iter(parameters.values())).detach().new_zeros(())
        snapshots = tuple(_none(zero) for _ in range(self.config.snapshots))
        return RollbackState(
            zero.clone(), zero.clone(), zero.clone(), zero.clone(), zero.clone(), zero.clone(), snapshots
        )

    def decide(self, context: StepContext) -> Tensor:
        """Below 0 in a hold; without limit above it elsewhere, where others decide."""
        hold = context.state[self.name].hold
        return torch.where(hold > 0, -1.0, torch.inf).to(hold)

    def predict(self, context: StepContext) -> Tensor | None:
        """The source's answer, where a hold asks for it."""
        if not bool(context.state[self.name].source):
            return None
        with torch.no_grad():
            return source_logits(context)

    def judge(self, context: StepContext, output: StepOutput) -> None:
        """Hear the verdict, and go back or take a snapshot."""
        judge, state = context.policy.part(VerdictPart.name), context.state[self.name]
        if not judge.fitted:
            return
        if bool(state.hold > 0):
            self._wait(context, state)
            return
        if (int(context.state[judge.name].batches) - 1) % judge.config.every:
            return
        told = judge.verdict(context.state[judge.name])
        good = told.estimated_error < told.source_estimated_error
        state = state._replace(
            harmful=state.harmful + 1 if told.harmful else torch.zeros_like(state.harmful),
            since=state.since + good,
        )
        if float(state.harmful) >= HEARINGS:
            self._go_back(context, state)
        elif good and float(state.since) >= self.config.every:
            self._take(context, state)
        else:
            context.remember(self.name, state)

    def _wait(self, context: StepContext, state: RollbackState) -> None:
        """One batch of a hold."""
        context.events.append("held")
        hold = state.hold - 1
        over = bool(hold <= 0)
        source = torch.zeros_like(state.source) if over else state.source
        context.remember(self.name, state._replace(hold=hold, source=source))
        if over:
            context.remember(VerdictPart.name, self._unheard(context))

    def _take(self, context: StepContext, state: RollbackState) -> None:
        """Keep what adaptation has come to, and forget the oldest of what is kept."""
        zero, number = torch.zeros_like(state.taken), state.taken + 1
        latest = Snapshot(number, *packed(self._kept(context)))
        snapshots = (latest, *state.snapshots[:-1])
        context.remember(self.name, state._replace(taken=number, since=zero, rolled=zero.clone(), snapshots=snapshots))

    def _go_back(self, context: StepContext, state: RollbackState) -> None:
        """Back to the latest snapshot, or to the start; the source answers meanwhile there."""
        latest, zero = state.snapshots[0], torch.zeros_like(state.hold)
        if bool(latest.number > 0):
            kept = unpacked(latest.values, latest.shapes, self._kept(context))
            context.parameters = {name: tensor.requires_grad_() for name, tensor in kept["parameters"].items()}
            context.state = {**context.state, **kept["state"]}
            context.events.append("rolled_back")
        else:
            context.parameters = {n: t.detach().clone().requires_grad_() for n, t in context.start.items()}
            context.begin_anew("rolled_back")
        context.remember(VerdictPart.name, self._unheard(context))
        context.remember(
            self.name,
            state._replace(
                since=zero,
                harmful=zero.clone(),
                rolled=state.rolled + 1,
                hold=zero + self.config.hold * 2.0 ** min(float(state.rolled), DOUBLINGS),
                source=zero + float(latest.number == 0),
                snapshots=(*state.snapshots[1:], _none(zero)),
            ),
        )

    def _kept(self, context: StepContext) -> dict[str, Any]:
        """What a snapshot is of."""
        own = (self.name, VerdictPart.name)
        return {
            "parameters": {name: tensor.detach() for name, tensor in context.parameters.items()},
            "state": {name: state for name, state in context.state.items() if name not in own},
        }

    def _unheard(self, context: StepContext) -> Any:
        return context.policy.part(VerdictPart.name).init(context.parameters)

    def not_exported(self, state: RollbackState) -> str:
        """An exported network has nobody to watch it."""
        return "rollback, which undoes adaptation that does harm"

    def check_state(self, state: RollbackState, classes: int) -> None:
        """Refuse counts below 0, and snapshots whose values are not those of their shapes."""
        if any(float(count) < 0 or not math.isfinite(float(count)) for count in state[:6]):
            raise ValueError("rollback has a count below 0")
        for snapshot in state.snapshots:
            if sum(math.prod(shape) for shape in _shapes(snapshot.shapes)) != snapshot.values.numel():
                raise ValueError("rollback has a snapshot that is cut off")


def _none(like: Tensor) -> Snapshot:
    """No snapshot."""
    return Snapshot(like.new_zeros(()), like.new_zeros(0, dtype=torch.float64), like.new_zeros(0, dtype=torch.int64))


def packed(tree: Any) -> tuple[Tensor, Tensor]:
    """Values of a tree's tensors, (n,) in float64, and their shapes, (m,) in int64: copies."""
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    values = torch.cat([leaf.detach().reshape(-1).double() for leaf in leaves])
    shapes = [number for leaf in leaves for number in (leaf.ndim, *leaf.shape)]
    return values, torch.tensor(shapes, dtype=torch.int64, device=values.device)


def unpacked(values: Tensor, shapes: Tensor, like: Any) -> Any:
    """Inverse of `packed`, in the structure of a tree ``like``, with its types.

    Raises:
        ValueError: the tree has another number of tensors.
    """
    leaves, structure = pytree.tree_flatten(like)
    slots = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    found = _shapes(shapes)
    if len(found) != len(slots):
        raise ValueError(f"a snapshot of rollback has {len(found)} tensors, and {len(slots)} are adapted")
    parts = values.split([math.prod(shape) for shape in found])
    for index, part, shape in zip(slots, parts, found, strict=True):
        leaves[index] = part.reshape(shape).to(leaves[index], copy=True)
    return pytree.tree_unflatten(leaves, structure)


def _shapes(numbers: Tensor) -> list[list[int]]:
    """The shapes in what `packed` gave.

    Raises:
        ValueError: they are none.
    """
    left, found = numbers.tolist(), []
    while left:
        count, left = left[0], left[1:]
        if not 0 <= count <= len(left) or any(size < 0 for size in left[:count]):
            raise ValueError("rollback has a snapshot of no shapes")
        found.append(left[:count])
        left = left[count:]
    return found
