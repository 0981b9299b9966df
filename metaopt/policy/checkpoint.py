"""The policy's file: versioned, primitives and tensors only, tied to the source model that it was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaopt.activation_memory import LearnedPrecision, LearnedPrecisionConfig
from metaopt.errors import CheckpointError, MetaoptError
from metaopt.experts import LearnedExperts, TeacherConfig
from metaopt.files import atomic_save, safe_load
from metaopt.generator import GeneratorConfig, GradientGenerator
from metaopt.models import ModelSpec, SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.parameters import ParameterLayout, adapted_layout
from metaopt.policy.balance import ClassBalance
from metaopt.policy.gate import LearnedGate
from metaopt.policy.initialization import LearnedInitialization
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.prior import LearnedPrior
from metaopt.policy.restoration import RestorationConfig, SourceRestoration
from metaopt.types import SourceStatistics

FORMAT = "metaopt-policy"
VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """Which source model a policy was trained on."""

    spec: ModelSpec
    sha256: str  # of the weights (metaopt.files.weights_sha256)
    layout: ParameterLayout

    @classmethod
    def of(cls, model: SourceModel, layout: ParameterLayout | None = None) -> "SourceRecord":
        """Record of a model, and of what adapts in it: its norm layers, unless told otherwise."""
        return cls(model.spec, model.weights_sha256(), layout or adapted_layout(model))


def policy_to_dict(policy: AdaptationPolicy) -> dict[str, Any]:
    """All of a learned policy as primitives and tensors.

    Raises:
        CheckpointError: the policy has no learned generator, or is not tied to a source model.
    """
    if not isinstance(policy.rule, GradientGenerator) or policy.objective is None or policy.source is None:
        raise CheckpointError(
            f"method {policy.method!r} cannot be saved as a policy; allowed is a meta-trained one: train it first"
        )
    statistics, rates = policy.statistics, policy.pruning
    experts, teacher, restoration = policy.learned_experts, policy.teacher, policy.restoration
    parts = {  # that a policy may do without; a file without them says nothing of them
        "rates": rates.config.to_dict() if isinstance(rates, LearnedPrecision) else None,
        "restoration": None if restoration is None else restoration.config.to_dict(),
        "gate": {} if isinstance(policy.gate, LearnedGate) else None,
        "experts": None if experts is None else experts.to_dict(),
        "teacher": None if teacher is None else teacher.to_dict(),
        "prior": list(policy.prior.layers) if isinstance(policy.prior, LearnedPrior) else None,
        "initialization": None if policy.initialization is None else policy.initialization.sizes,
        "balance": None if policy.balance is None else policy.balance.strength,
        "adapts": None if policy.adapts == "norm" else policy.adapts,
    }
    return {
        **{name: part for name, part in parts.items() if part is not None},
        "format": FORMAT,
        "version": VERSION,
        "method": policy.method,
        "batch_statistics": policy.batch_statistics,
        "generator": policy.rule.config.to_dict(),
        "tensors": list(policy.rule.tensors),
        "objective": policy.objective.to_config(),
        "weights": {name: tensor.detach().cpu().clone() for name, tensor in policy.state_dict().items()},
        "statistics": None
        if statistics is None
        else {"mean": [m.cpu() for m in statistics.mean], "std": [s.cpu() for s in statistics.std]},
        "source": {
            "spec": policy.source.spec.to_dict(),
            "sha256": policy.source.sha256,
            "layout": policy.source.layout.to_list(),
        },
        "training": dict(policy.training),
    }


def policy_from_dict(values: Mapping[str, Any], path: str | Path = "policy") -> AdaptationPolicy:
    """Inverse of :func:`policy_to_dict`.

    Raises:
        CheckpointError: another format or version, or a part is missing or does not fit.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' is not a policy; allowed are files written by pretrain/meta_train.py: give one of those"
        )
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"'{path}' has version {values.get('version')}; this release reads version {VERSION}: train the policy "
            "again"
        )
    try:
        return _build(values)
    except (MetaoptError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"'{path}' is damaged ({reason}); train the policy again or restore the file") from error


def _build(values: Mapping[str, Any]) -> AdaptationPolicy:
    statistics, source = values["statistics"], values["source"]
    policy = AdaptationPolicy(
        values["method"],
        batch_statistics=values["batch_statistics"],
        objective=WeightedObjective.from_config(values["objective"]),
        rule=GradientGenerator(GeneratorConfig.from_dict(values["generator"]), values["tensors"]),
        statistics=None
        if statistics is None
        else SourceStatistics(tuple(statistics["mean"]), tuple(statistics["std"])),
        pruning=LearnedPrecision(LearnedPrecisionConfig(**values["rates"])) if "rates" in values else None,
        restoration=SourceRestoration(RestorationConfig(**values["restoration"])) if "restoration" in values else None,
        gate=LearnedGate(**values["gate"]) if "gate" in values else None,
        prior=LearnedPrior(values["prior"]) if "prior" in values else None,
        initialization=LearnedInitialization(values["initialization"]) if "initialization" in values else None,
        balance=ClassBalance(values["balance"]) if "balance" in values else None,
        adapts=values.get("adapts", "norm"),
        learned_experts=LearnedExperts.from_dict(values["experts"]) if "experts" in values else None,
        teacher=TeacherConfig.from_dict(values["teacher"]) if "teacher" in values else None,
    )
    dtypes = {tensor.dtype for tensor in values["weights"].values()}
    if len(dtypes) == 1:
        policy.to(dtypes.pop())
    policy.load_state_dict(values["weights"])
    tensors = [*policy.state_dict().values(), *(statistics["mean"] + statistics["std"] if statistics else ())]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError("a tensor holds NaN or infinity")
    layout = ParameterLayout.from_list(source["layout"])
    policy.source = SourceRecord(ModelSpec.from_dict(source["spec"]), str(source["sha256"]), layout)
    policy.training = dict(values["training"])
    return policy


def save_policy(policy: AdaptationPolicy, path: str | Path) -> None:
    """Write a policy atomically; what was at ``path`` stays until the new file is complete.

    Raises:
        CheckpointError: the policy cannot be saved (see :func:`policy_to_dict`).
        OutputError: the file cannot be written.
    """
    atomic_save(policy_to_dict(policy), path)


def load_policy(path: str | Path) -> AdaptationPolicy:
    """Read a policy; no code in the file is ever run.

    Raises:
        CheckpointError: the file is missing, unreadable, unsafe, foreign or damaged.
    """
    return policy_from_dict(safe_load(path, checksums=True), path)


def check_source(policy: AdaptationPolicy, model: nn.Module) -> None:
    """Refuse a model that the policy was not trained on. A method that was never trained fits any model.

    Raises:
        CheckpointError: another architecture, class count, normalisation or weights.
    """
    if policy.source is None or not isinstance(model, SourceModel):
        return
    trained, given = policy.source.spec, model.spec
    if trained.name != given.name:
        raise CheckpointError(
            f"the policy was trained on {trained.name} and the model is {given.name}; allowed is the same "
            f"architecture: set model={trained.name}, train a policy for {given.name}, or set transfer=generator"
        )
    if trained.num_classes != given.num_classes:
        raise CheckpointError(
            f"the policy was trained on {trained.num_classes} classes and the model has {given.num_classes}; allowed "
            "is the same number: load the model that the policy was trained on"
        )
    if (trained.mean, trained.std) != (given.mean, given.std):
        raise CheckpointError(
            f"the policy's model normalised images by {trained.mean} and {trained.std}, this one by {given.mean} and "
            f"{given.std}; allowed are the same: wrap the module by SourceModel(module, mean=..., std=...)"
        )
    found = model.weights_sha256()
    if policy.source.sha256 != found:
        raise CheckpointError(
            f"the policy was trained on weights {policy.source.sha256[:12]} and the model's are {found[:12]}; allowed "
            "are the same weights: set model.checkpoint to their file, train one for these, or set transfer=generator"
        )
