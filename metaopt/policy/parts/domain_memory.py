r"""A memory of domains that come back.

Where the stream shifts, restoration (:mod:`metaopt.policy.parts.restoration`) lets a large share of the start come
back, and what rule and parts remember starts anew. On streams whose domains come again and again that throws away what
was learned of them. This part keeps the domains that were left, the latest ``domains`` of them: the adapted tensors as
they were, the states of the rule and of the other parts, and with these the reference :math:`R_k` of the shift distance
D (:mod:`metaopt.policy.parts.shift_distance`), which is what a domain is known by. Where another domain begins, with
the threshold :math:`\tau` of restoration and the images x of the batch,

.. math:: k = \arg\min_k D(R_k, x), \qquad D(R_k, x) \le \tau

finds one that the batch could be of by the test by which it would not have been told from it had it just been left.
Then everything goes on as if the stream had never been elsewhere; without one it begins anew as before.

The state of the rule comes back with the tensors, and so does the count of updates that were made: a meta-trained
policy has learned what its first updates in a domain do, and, begun again and again on tensors that are adapted
already, ruins them (the error of ResNet-20 on seven domains in turn, eight times, rises from 24 to 54 % then).

A model for each of the domains that come back, told by statistics of early layers: Vray et al., ReservoirTTA (NeurIPS
2025). The update gate sees the distance from the domain that was left, so that it opens for the first batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.errors import check_range
from metaopt.parameters import detached, flatten
from metaopt.policy.part import Part
from metaopt.policy.parts.restoration import Restoration
from metaopt.policy.parts.shift_distance import ShiftDistance, ShiftReference, distance
from metaopt.policy.state import State
from metaopt.policy.step import StepContext
from metaopt.types import Parameters


class Domain(NamedTuple):
    """A domain as it was left; one without images in its reference is none."""

    parameters: Tensor  # adapted tensors, flat, (N,)
    state: State  # of the rule and the other parts

    @property
    def reference(self) -> ShiftReference:
        """What its images are like."""
        return self.state[ShiftDistance.name]


@dataclass(frozen=True)
class DomainMemoryConfig:
    """``domains``: how many are kept beside the present one; those that were left longest ago go first."""

    domains: int = 8

    def __post_init__(self) -> None:
        """Check the number."""
        check_range("domain_memory.domains", self.domains, 1, example="8, or domain_memory=false for none")


class DomainMemory(Part):
    """What was learned of a domain comes back where the domain does."""

    Config = DomainMemoryConfig
    name = "domain_memory"
    uses = (Restoration, ShiftDistance)
    events = ("recalled",)

    def init_beside(self, parameters: Parameters, states: State) -> tuple[Domain, ...]:
        """No domains yet."""
        return (Domain(torch.zeros_like(flatten(parameters).detach()), states),) * self.config.domains

    def restore(self, context: StepContext) -> None:
        """Where another domain begins: keep the one that was left, and go on in the one that came back."""
        if not context.begun:
            return
        assert context.left is not None
        free = context.state[self.name]
        parameters, states = context.left
        known = [domain for domain in states[self.name] if int(domain.reference.count) > 0]
        found = self._nearest(context, known)
        lasting = context.policy.lasting
        kept = [_left(parameters, {n: state for n, state in states.items() if n not in {self.name, *lasting}})]
        kept += [domain for domain in known if domain is not found]
        if found is not None:
            context.parameters = _shaped(found.parameters, context.parameters)
            context.state = {name: context.state[name] for name in lasting} | found.state
            context.events.append("recalled")
        context.remember(self.name, (*kept, *free)[: self.config.domains])

    def _nearest(self, context: StepContext, known: list[Domain]) -> Domain | None:
        """The domain that the batch may be of; None if it is of none."""
        images, effect = context.signals["image_statistics"], context.signals.get("design_effect", 1.0)
        distances = [distance(domain.reference, images) / effect for domain in known]
        if not distances:
            return None
        nearest = int(torch.stack(distances).argmin())
        anew = context.policy.part(Restoration.name).begins_anew(distances[nearest])
        return None if anew else known[nearest]

    def check_state(self, state: tuple[Domain, ...], classes: int) -> None:
        """Refuse a free place before one that is taken."""
        taken = [bool(domain.reference.count > 0) for domain in state]
        if taken != sorted(taken, reverse=True):
            raise ValueError("domain_memory has a free place before one that is taken")

    def not_exported(self, state: tuple[Domain, ...]) -> str:
        """An exported network is of one domain."""
        return "domain_memory, which brings back what was learned of a domain"


def _left(parameters: Parameters, states: State) -> Domain:
    """A domain as it is now; where the next update changes the tensors in place, without a graph."""
    flat = flatten(parameters)
    return Domain(flat.detach() if all(tensor.is_leaf for tensor in parameters.values()) else flat, states)


def _shaped(flat: Tensor, like: Parameters) -> Parameters:
    """Tensors of their own in the shapes of others, which gradients can be taken in."""
    pieces = flat.split([tensor.numel() for tensor in like.values()])
    values = {name: piece.reshape(own.shape).clone() for (name, own), piece in zip(like.items(), pieces, strict=True)}
    return values if flat.requires_grad else detached(values)
