"""Compose a method from its parts: what the files under ``configs/method/`` say, made into a policy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metaopt.activation_memory import (
    ALLOCATIONS,
    DEFAULT_ALLOCATION,
    Allocation,
    LearnedPrecision,
    LearnedPrecisionConfig,
    build_allocation,
)
from metaopt.errors import ConfigError
from metaopt.experts import ExpertsConfig, LearnedExperts, TeacherConfig
from metaopt.generator import HAND_MADE_RULES, GeneratorConfig, GradientGenerator
from metaopt.objectives import OBJECTIVE_TERMS, WeightedObjective
from metaopt.policy.adapts import ADAPTS
from metaopt.policy.balance import ClassBalance
from metaopt.policy.gate import Gate, LearnedGate, PeriodicGate
from metaopt.policy.initialization import LearnedInitialization
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.prior import FixedPrior, LearnedPrior, Prior
from metaopt.policy.restoration import RestorationConfig, SourceRestoration
from metaopt.types import SourceStatistics, UpdateRule

UPDATES = ("none", *HAND_MADE_RULES, "generator")
WATCHABLE = ("norm", "experts_norm")  # what may adapt where shifts are watched
PREDICTORS = ("student", "teacher")


@dataclass(frozen=True)
class MethodConfig:
    """One way of adapting online.

    ``lr`` None means the policy's own base rate for ``update="generator"``, and the rule's default otherwise.
    ``objective`` without a weight above 0 means the policy's own, with its learned weights. ``pruning`` is the rule
    that chooses what is kept of each layer's activations where memory is pruned. ``betas`` are Adam's; None: its
    default. ``adapts`` says which tensors change, and ``predict_with`` whose logits count. ``experts`` and ``teacher``
    None: there are none.
    ``restoration`` brings the source back where the stream shifts: as the policy learned to, and without one that did,
    as ``RestorationConfig`` begins. ``update_every`` is the number of a domain's batches from one update to the next;
    None: the policy's gate decides where it has learned one, else every batch updates. ``prior`` is the number of
    images for which the source counts in BatchNorm layers; None: as many as the policy has learned where its
    generator runs, else none. ``balance`` is the strength with which predictions are corrected by what a batch as a
    whole holds; None: that of the policy where its generator runs, else 0, not at all.
    """

    name: str
    batch_statistics: bool = True
    update: str = "none"
    lr: float | None = None
    objective: Mapping[str, float] = field(default_factory=dict)
    objective_from_policy: bool = False
    pruning: str = "rate_distortion"
    betas: tuple[float, float] | None = None
    adapts: str = "norm"
    experts: ExpertsConfig | None = None
    teacher: TeacherConfig | None = None
    predict_with: str = "student"
    restoration: bool = False
    update_every: int | None = None
    prior: float | None = None
    initialization: bool = False
    balance: float | None = None

    def __post_init__(self) -> None:
        """Check each choice and what they need of one another."""
        for name, allowed in (("update", UPDATES), ("adapts", ADAPTS), ("predict_with", PREDICTORS)):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ConfigError(f"method.{name} is {value!r}; allowed are {', '.join(allowed)}: choose one")
        if self.betas is not None and self.update != "adam":
            raise ConfigError(f"method.betas does not go with update={self.update}; allowed is adam: leave it null")
        if self.adapts.startswith("experts") and self.experts is None:
            raise ConfigError(
                f"method.adapts is {self.adapts!r} and there are no experts; allowed without them are norm, all: give "
                "method.experts, as configs/method/moase.yaml does"
            )
        if self.restoration and self.adapts not in WATCHABLE:
            raise ConfigError(
                f"method.restoration does not go with adapts={self.adapts}: a shift is seen before the first "
                f"normalisation layer, which nothing before may have changed; allowed are {', '.join(WATCHABLE)}: set "
                "method.adapts=norm, or method.restoration=false"
            )
        if self.predict_with == "teacher" and self.teacher is None:
            raise ConfigError(
                "method.predict_with is 'teacher' and there is none; allowed without one is student: give "
                "method.teacher, as configs/method/cotta.yaml does"
            )
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"method.lr is {self.lr}; it must be positive and finite: set for example 0.001")
        if self.prior is not None and not self.batch_statistics:
            raise ConfigError(
                f"method.prior is {self.prior:g} and batch_statistics is false; a prior stands beside the batch's "
                "statistics: set method.batch_statistics=true, or method.prior=null"
            )
        if self.prior is not None:
            FixedPrior(self.prior)  # checks its own range
        if self.balance:
            ClassBalance(self.balance)  # checks its own range
        if self.update in HAND_MADE_RULES:
            self.rule()  # checks its own settings

    def rule(self) -> UpdateRule:
        """The hand-made update rule."""
        settings = {"lr": self.lr, "betas": self.betas}
        return HAND_MADE_RULES[self.update](**{name: value for name, value in settings.items() if value is not None})


def build_method(
    config: MethodConfig, *, policy: AdaptationPolicy | None = None, statistics: SourceStatistics | None = None
) -> AdaptationPolicy:
    """The composition that ``config`` describes.

    Args:
        config: the method.
        policy: meta-trained policy, which the generator and, where asked, the objective come from.
        statistics: source statistics, where the objective needs them and no policy brings them.

    Raises:
        ConfigError: a generator without a policy, an update without an objective, or one that asks a teacher without
            a teacher.
    """
    if config.update == "none":
        return AdaptationPolicy(
            config.name,
            batch_statistics=config.batch_statistics,
            prior=_prior(config, None),
            balance=_balance(config, None),
            initialization=_initialization(config, policy),
        )
    if policy is not None and policy.statistics is not None:
        statistics = policy.statistics
    objective = _objective(config, policy)
    if objective.needs_teacher and config.teacher is None:
        raise ConfigError(
            f"method {config.name!r} has the objective's term teacher and no teacher; allowed without one are all "
            "others: give method.teacher, as configs/method/cotta.yaml does"
        )
    rule = _generator(config, policy) if config.update == "generator" else config.rule()
    method = AdaptationPolicy(
        config.name,
        batch_statistics=config.batch_statistics,
        prior=_prior(config, policy),
        balance=_balance(config, policy),
        objective=objective,
        rule=rule,
        statistics=statistics,
        pruning=_pruning(config, policy),
        predict_with=config.predict_with,
        **_adapted(config, policy),
        restoration=_restoration(config, policy),
        gate=_gate(config, policy),
        initialization=_initialization(config, policy),
    )
    if policy is not None:
        method.source, method.training = policy.source, policy.training
    return method


def _adapted(config: MethodConfig, policy: AdaptationPolicy | None) -> dict[str, Any]:
    """What adapts, with which experts and teacher: a policy's own where its generator runs, which knows the tensors."""
    if config.update == "generator" and policy is not None and policy.learned_experts is not None:
        return {
            "adapts": policy.adapts,
            "learned_experts": policy.learned_experts,
            "teacher": config.teacher or policy.teacher,
        }
    return {"adapts": config.adapts, "experts": config.experts, "teacher": config.teacher}


def _objective(config: MethodConfig, policy: AdaptationPolicy | None) -> WeightedObjective:
    learned = config.objective_from_policy or not any(config.objective.values())
    if policy is not None and policy.objective is not None and learned:
        return policy.objective
    weights = {name: weight for name, weight in config.objective.items() if weight != 0}
    if not weights:
        raise ConfigError(
            f"method {config.name!r} has no objective; allowed are positive weights of {', '.join(OBJECTIVE_TERMS)}: "
            "set for example method.objective.entropy=1, or give a policy"
        )
    return WeightedObjective(weights)


def _generator(config: MethodConfig, policy: AdaptationPolicy | None) -> GradientGenerator:
    if policy is None or not isinstance(policy.rule, GradientGenerator):
        raise ConfigError(
            f"method {config.name!r} needs a meta-trained policy and got none; train one with pretrain/meta_train.py "
            "and give it by --policy ckpt.pt"
        )
    trained = policy.rule
    if config.lr is None:
        return trained
    values = trained.config.to_dict() | {"lr": config.lr}
    generator = GradientGenerator(GeneratorConfig.from_dict(values), trained.tensors)
    generator.to(next(trained.parameters()))
    generator.load_state_dict(trained.state_dict())
    return generator


def _pruning(config: MethodConfig, policy: AdaptationPolicy | None) -> Allocation:
    """The rule that is named; a policy that was meta-trained without a learned one allocates by its importance."""
    if config.pruning != "learned":
        return build_allocation(config.pruning)
    if policy is None:
        raise ConfigError(
            f"method {config.name!r} has pruning=learned and no policy; allowed without one are "
            f"{', '.join(ALLOCATIONS)}: set method.pruning=rate_distortion, or give a policy"
        )
    return policy.pruning or build_allocation(DEFAULT_ALLOCATION)


def _restoration(config: MethodConfig, policy: AdaptationPolicy | None) -> SourceRestoration | None:
    if not config.restoration:
        return None
    if config.update == "generator" and policy is not None:
        return policy.restoration  # a policy that was trained without one runs without one
    return policy.restoration if policy is not None and policy.restoration is not None else SourceRestoration()


def _prior(config: MethodConfig, policy: AdaptationPolicy | None) -> Prior | None:
    if config.prior is not None:
        return FixedPrior(config.prior) if config.prior > 0 else None
    return policy.prior if policy is not None and config.update == "generator" else None


def _balance(config: MethodConfig, policy: AdaptationPolicy | None) -> ClassBalance | None:
    if config.balance is not None:
        return ClassBalance(config.balance) if config.balance > 0 else None
    return policy.balance if policy is not None and config.update == "generator" else None


def _initialization(config: MethodConfig, policy: AdaptationPolicy | None) -> LearnedInitialization | None:
    if not config.initialization:
        return None
    if policy is None:
        raise ConfigError(
            f"method {config.name!r} has initialization=true and no policy, which learns it; allowed without one is "
            "false: set method.initialization=false, or give a policy"
        )
    return policy.initialization  # a policy that was trained without one starts at the source


def _gate(config: MethodConfig, policy: AdaptationPolicy | None) -> Gate | None:
    if config.update_every is not None:
        return PeriodicGate(config.update_every)
    return policy.gate if policy is not None and config.update == "generator" else None


def new_policy(
    generator: GeneratorConfig,
    objective: Mapping[str, float],
    tensors: tuple[str, ...],
    *,
    learned_objective: bool,
    statistics: SourceStatistics | None = None,
    rates: LearnedPrecisionConfig | None = None,
    experts: LearnedExperts | None = None,
    teacher: TeacherConfig | None = None,
    restoration: RestorationConfig | None = None,
    gate: bool = False,
    prior: LearnedPrior | None = None,
    initialization: LearnedInitialization | None = None,
    balance: ClassBalance | None = None,
    seed: int = 0,
) -> AdaptationPolicy:
    """A policy before meta-training: a fresh generator, drawn from ``seed``, and the objective's first weights.

    ``rates``: also fresh learned rates; ``restoration``: also one that starts there; ``gate``: also an update gate;
    ``experts``: also these, which adapt beside the norm layers; ``prior``, ``initialization``, ``balance``: also this
    one.

    Terms of weight 0 are left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rule = GradientGenerator(generator, tensors)
        pruning = None if rates is None else LearnedPrecision(rates)
    weights = {name: weight for name, weight in objective.items() if weight != 0}
    return AdaptationPolicy(
        "policy",
        objective=WeightedObjective(weights, learned=learned_objective),
        rule=rule,
        statistics=statistics,
        pruning=pruning,
        adapts="norm" if experts is None else "experts_norm",
        learned_experts=experts,
        teacher=teacher,
        restoration=None if restoration is None else SourceRestoration(restoration),
        gate=LearnedGate() if gate else None,
        # The objective can be had cheaply by other statistics, or another start: where it is the judge, they stay.
        prior=None if prior is None else prior.requires_grad_(learned_objective),
        initialization=initialization if learned_objective else None,
        balance=balance if learned_objective else None,
    )
