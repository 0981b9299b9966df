"""Transfer: a policy that was meta-trained on one model, on another.

A generator works on each adapted scalar alone, so that it runs on any model. What belongs to one model is its step
sizes, one for each tensor: another model's tensors take theirs by kind (``batch_norm.weight``) and depth (0 at the
first normalisation layer, 1 at the last), in between linearly. A kind that the first model did not have starts at step
size 1, which is the published rule's.
"""

import copy
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

from metaopt.errors import CheckpointError
from metaopt.generator import GradientGenerator
from metaopt.models import SourceModel, prior_layers
from metaopt.parameters import AdaptedTensor
from metaopt.policy.checkpoint import SourceRecord
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.prior import LearnedPrior
from metaopt.types import SourceStatistics


def transferred(
    policy: AdaptationPolicy, model: SourceModel, statistics: Callable[[], SourceStatistics]
) -> tuple[AdaptationPolicy, list[str]]:
    """The policy for another model, and a line on each part: what came along, and what starts anew.

    Args:
        policy: meta-trained on some model; it is not changed.
        model: the one to adapt.
        statistics: gives that model's source statistics; called only where the policy's objective needs them.

    Raises:
        CheckpointError: the policy has no learned generator.
    """
    if not isinstance(policy.rule, GradientGenerator) or policy.source is None:
        raise CheckpointError(
            f"method {policy.method!r} has no learned generator to transfer; allowed is a meta-trained policy: give "
            "one of pretrain/meta_train.py"
        )
    record = SourceRecord.of(model)
    found = copy.deepcopy(policy)
    found.rule, notes = _generator(policy.rule, policy.source.layout.tensors, record.layout.tensors)
    found.source = record
    if found.objective is not None and found.objective.needs_features:
        found.statistics = statistics()
        notes.append("source statistics: those of this model")
    parts = {"objective weights": policy.objective, "restoration": policy.restoration, "update gate": policy.gate}
    notes += [f"{name}: as learned" for name, part in parts.items() if part is not None]
    if policy.balance is not None:
        notes.append("class balance: the same")
    if isinstance(policy.prior, LearnedPrior):
        layers = prior_layers(model.module)
        found.prior = policy.prior.on(layers) if layers else None
        notes.append(f"source prior: {len(layers)} BatchNorm layers by depth")
    if policy.initialization is not None:
        found.initialization = None
        notes.append(
            "initialization: left out, it belongs to the other model's tensors; they start at the source's values"
        )
    if policy.learned_experts is not None:
        found.learned_experts, found.experts, found.adapts = None, None, "norm"
        notes.append("experts: left out, they belong to the other model's blocks")
    if policy.pruning is not None:
        notes.append("rates of what is kept: as learned, on this model's own layers")
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
