"""Transfer: a policy that was meta-trained on one model, on another.

A generator works on each adapted scalar alone, so that it runs on any model. What belongs to one model is its step
sizes, one for each tensor: another model's tensors take theirs by kind (``batch_norm.weight``) and depth (0 at the
first normalisation layer, 1 at the last), in between linearly. A kind that the first model did not have starts at step
size 1, which is the published rule's.
"""

import copy
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from metaopt.errors import CheckpointError
from metaopt.models import SourceModel
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.parameters import AdaptedTensor, adapted_layout
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.source_record import SourceRecord


def transferred(policy: AdaptationPolicy, model: SourceModel) -> tuple[AdaptationPolicy, list[str]]:
    """The policy for another model, and a line on each part: what came along, and what starts anew.

    What objective and parts take of clean images (`AdaptationPolicy.prepare`) they have to take of this model's anew.

    Args:
        policy: meta-trained on some model; it is not changed.
        model: the one to adapt.

    Raises:
        CheckpointError: the policy has no learned generator.
    """
    if not isinstance(policy.rule, GradientGenerator) or policy.objective is None or policy.source is None:
        raise CheckpointError(
            f"method {policy.method!r} has no learned generator to transfer; allowed is a meta-trained policy: give "
            "one of pretrain/meta_train.py"
        )
    before = copy.deepcopy(policy)
    assert isinstance(before.rule, GradientGenerator) and before.objective is not None
    rule, notes = _generator(before.rule, policy.source.layout.tensors, adapted_layout(model).tensors)
    for term in before.objective.named_terms.values():
        term.load_dict({})
    notes.append("objective weights: as learned")
    if policy.layers is not None:
        notes.append(f"layers: {', '.join(policy.layers)} were the other model's; all norm layers of this one adapt")
    parts = []
    for part in before.listed:
        found, words = part.transferred(model)
        parts += [] if found is None else [found]
        notes.append(f"{part.name}: {words}")
    found = AdaptationPolicy(policy.method, before.objective, rule, parts, seed=policy.seed)
    found.source, found.training = SourceRecord.of(model), dict(policy.training)
    return found, notes


def _generator(
    trained: GradientGenerator, before: Sequence[AdaptedTensor], after: Sequence[AdaptedTensor]
) -> tuple[GradientGenerator, list[str]]:
    """The same generator with step sizes for other tensors."""
    generator = GradientGenerator(trained.config, [tensor.name for tensor in after] if trained.tensors else ())
    generator.to(next(trained.parameters()))
    weights = trained.state_dict()
    notes = ["gradient memory: as learned"] if trained.memory is not None else []
    if trained.log_step_sizes is not None and trained.tensors:
        sizes = [_log_step_size(tensor, before, trained.log_step_sizes.detach()) for tensor in after]
        weights["log_step_sizes"] = torch.stack(
            [trained.log_step_sizes.new_zeros(()) if s is None else s for s in sizes]
        )
        known = sum(size is not None for size in sizes)
        missing = sorted({tensor.kind for tensor, size in zip(after, sizes, strict=True) if size is None})
        notes.append(f"step sizes: {known} of {len(after)} tensors by kind and depth")
        if missing:
            notes.append(f"step sizes of {', '.join(missing)}: not learned, they start at 1")
    generator.load_state_dict(weights)
    return generator, notes


def _log_step_size(tensor: AdaptedTensor, known: Sequence[AdaptedTensor], sizes: Tensor) -> Tensor | None:
    """Linear between the nearest known tensors of the same kind by depth; None where there is none of that kind."""
    same = sorted((other.depth, place) for place, other in enumerate(known) if other.kind == tensor.kind)
    if not same:
        return None
    depths, places = zip(*same, strict=True)
    return sizes.new_tensor(numpy.interp(tensor.depth, depths, sizes[list(places)].tolist()))
