"""Compose a method from its parts: what the files under ``configs/method/`` say, made into a policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from metaopt import registry
from metaopt.errors import ConfigError, check_kind, check_one_of, check_positive, check_range
from metaopt.objectives import WeightedObjective
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.policy.adapts import ADAPTS
from metaopt.policy.part import Part, settings
from metaopt.policy.policy import AdaptationPolicy
from metaopt.settings import checked
from metaopt.types import UpdateRule

RESTORABLE = ("norm", "experts_norm")  # what may adapt where shifts are told


@dataclass(frozen=True)
class MethodConfig:
    """One way of adapting online: an update rule, an objective, and parts.

    Attributes:
        name: for reports.
        update: an update rule of `metaopt.registry.RULES`, "generator" for a policy's, or "none".
        lr: of the rule; None: the policy's own base rate, or the rule's default.
        rule: further settings of the rule, such as Adam's ``betas``; the rule has their defaults.
        objective: weight of each term; without one above 0, the policy's, with its learned weights.
        objective_from_policy: take that where a policy is given, and ``objective`` where none is.
        adapts: which tensors change (`metaopt.policy.adapts.ADAPTS`).
        layers: patterns of the norm layers that adapt, such as ``["layer3*"]``; None: all, or those of the policy.
        parts: settings of each part by its name: a mapping of those that differ from its defaults, or a plain value
            for the first; true for the one that the policy has learned, where one is given; false or null for none.
        inherit: have all parts of the policy that ``parts`` does not name.
    """

    name: str
    update: str = "none"
    lr: float | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)
    objective_from_policy: bool = False
    adapts: str = "norm"
    layers: tuple[str, ...] | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    inherit: bool = False

    def __post_init__(self) -> None:
        """Check each choice and what they need of one another."""
        check_one_of("method.update", self.update, ("none", *registry.RULES, "generator"))
        check_one_of("method.adapts", self.adapts, ADAPTS)
        for key in ("rule", "objective", "parts"):
            if not isinstance(values := getattr(self, key), Mapping):
                raise ConfigError(f"method.{key} is {values!r}; it takes a mapping of settings: set {{}} for none")
        self._check_layers()
        named = self.named_parts()
        if self.adapts.startswith("experts") and "experts" not in named:
            raise ConfigError(
                f"method.adapts is {self.adapts!r} and there are no experts; allowed without them are norm, all: give "
                "method.parts.experts, as configs/method/moase.yaml does"
            )
        if "restoration" in named and self.adapts not in RESTORABLE:
            raise ConfigError(
                f"method.parts.restoration does not go with adapts={self.adapts}: a shift is told before the first "
                f"normalisation layer, which nothing before may have changed; allowed are {', '.join(RESTORABLE)}: set "
                "method.adapts=norm, or method.parts.restoration=false"
            )
        if self.lr is not None:
            check_positive("method.lr", self.lr)
        for name, weight in self.objective.items():
            registry.get("objective term", name)
            check_range(f"method.objective.{name}", weight, 0, example="1, or 0 to leave it out")
        if self.update in registry.RULES:
            self.build_rule()  # checks its own settings
        elif self.rule:
            raise ConfigError(
                f"method.rule does not go with update={self.update}; allowed are {', '.join(registry.RULES)}: leave it "
                "out"
            )

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        if isinstance(self.layers, str) or not self.layers or not all(isinstance(each, str) for each in self.layers):
            raise ConfigError(
                f"method.layers is {self.layers!r}; allowed are patterns of names of norm layers, or null for all: set "
                "for example method.layers=[layer3*]"
            )
        if self.adapts not in RESTORABLE:
            raise ConfigError(
                f"method.layers does not go with adapts={self.adapts}, which adapts more than norm layers, or none; "
                f"allowed are {', '.join(RESTORABLE)}: set method.adapts=norm, or leave method.layers out"
            )

    def named_parts(self) -> dict[str, Any]:
        """Class and settings of each part that is asked for, in the order of the registry.

        Raises:
            ConfigError: a part is unknown, or a setting of one is unknown or out of range.
        """
        for name in self.parts:
            registry.get("part", name)
        wanted = {name: value for name, value in self.parts.items() if not (value is None or value is False)}
        wanted |= self._used_by(wanted)
        return {
            name: (wanted[name], settings(registry.get("part", name).Config, wanted[name], f"method.parts.{name}"))
            for name in registry.PARTS
            if name in wanted
        }

    def _used_by(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Parts that wanted ones do not act without, helpers aside: as learned, where a policy is given."""
        used = {kind.name: user for user in wanted for kind in registry.get("part", user).uses if not kind.helper}
        for name, user in used.items():
            if name in self.parts and name not in wanted:
                raise ConfigError(
                    f"method.parts.{name} is {self.parts[name]} and parts.{user} does not act without; allowed is both "
                    f"or neither: set method.parts.{user}=false, or leave parts.{name} out"
                )
        return {name: True for name in used if name not in wanted}

    def build_rule(self) -> UpdateRule:
        """The hand-made update rule.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        kind = registry.get("update rule", self.update)
        if "lr" in self.rule:
            raise ConfigError(f"method.rule.lr is {self.rule['lr']}; a rule's rate is method.lr: set that instead")
        values = checked(kind, self.rule, "method.rule")
        return kind(**values, **({} if self.lr is None else {"lr": self.lr}))

    @property
    def needs_policy(self) -> bool:
        """Whether the method cannot run without a meta-trained policy."""
        return self.update == "generator" or any(
            value is True and registry.get("part", name).learned_only for name, (value, _) in self.named_parts().items()
        )

    @property
    def takes_objective(self) -> bool:
        """Whether the objective is a policy's, where one is given."""
        return self.update != "none" and (self.objective_from_policy or not any(self.objective.values()))


def build_method(
    config: MethodConfig, *, policy: AdaptationPolicy | None = None, seed: int | None = None
) -> AdaptationPolicy:
    """The composition that ``config`` describes.

    Args:
        config: the method.
        policy: meta-trained policy, which the generator and, where asked, objective and parts come from.
        seed: of what the method draws online; None: the policy's, and 0 without one.

    Raises:
        ConfigError: a generator or learned part without a policy, an update without an objective, one that asks a
            teacher without a teacher, or a setting other than the policy's of what the policy has learned.
    """
    named = f"load_method({config!r})" if isinstance(config, str) else 'load_method("tent")'
    check_kind("config", config, MethodConfig, "a MethodConfig", f"give metaopt.{named}")
    if policy is not None:
        check_kind("policy", policy, AdaptationPolicy, "a policy or None", "give AdaptationPolicy.load(path)")
    if seed is not None:
        check_range("seed", seed, 0, example="0")
    parts, layers = _parts(config, policy), _layers(config, policy)
    seed = (0 if policy is None else policy.seed) if seed is None else seed
    if config.update == "none":
        return AdaptationPolicy(config.name, parts=parts, seed=seed)
    _check_adapts(config, policy)
    objective = _objective(config, policy)
    check_teacher(config.name, objective, parts)
    from_policy = policy is not None and config.update == "generator" and policy.part("experts") is not None
    method = AdaptationPolicy(
        config.name,
        objective,
        _generator(config, policy) if config.update == "generator" else config.build_rule(),
        parts,
        policy.adapts if policy is not None and from_policy else config.adapts,
        seed,
        layers=layers,
    )
    if policy is not None:
        method.source, method.training = policy.source, policy.training
    return method


def _check_adapts(config: MethodConfig, policy: AdaptationPolicy | None) -> None:
    """A generator has a learned step size for each tensor that it was trained on, and for no other."""
    if policy is None or config.update != "generator" or config.adapts in ("norm", policy.adapts):
        return
    raise ConfigError(
        f"method.adapts is {config.adapts!r} and the policy was trained on {policy.adapts}; allowed is that, for its "
        "generator has learned step sizes of those tensors alone: leave method.adapts out, or run a hand-made rule on "
        "the policy's objective, method=adam"
    )


def _layers(config: MethodConfig, policy: AdaptationPolicy | None) -> tuple[str, ...] | None:
    """Patterns of the layers that adapt: those of the policy, where its generator is used."""
    asked = None if config.layers is None else tuple(config.layers)
    if policy is None or config.update != "generator":
        return asked
    if asked not in (None, policy.layers):
        raise ConfigError(
            f"method.layers is {list(asked or ())} and the policy has learned for {policy.layers or 'all'}; allowed "
            "are the policy's: leave it out, or meta-train with layers=[...]"
        )
    return policy.layers


def check_teacher(name: str, objective: WeightedObjective, parts: list[Part]) -> None:
    """Refuse an objective that learns from a teacher where no part is one."""
    if "teacher" in objective.needs and not any("teach" in part.acts for part in parts):
        raise ConfigError(
            f"method {name!r} has the objective's term teacher and no teacher; allowed without one are all others: "
            "give method.parts.teacher, as configs/method/cotta.yaml does"
        )


def _parts(config: MethodConfig, policy: AdaptationPolicy | None) -> list[Part]:
    """Those that are named, and the policy's where they are inherited or belong to its generator."""
    learned = {} if policy is None else {part.name: part for part in policy.listed}
    found: dict[str, Part] = {}
    for name, (value, values) in config.named_parts().items():
        known = learned.get(name)
        if known is None:
            part = registry.get("part", name)(values)
        else:
            part = known if value is True else known.with_settings(values)
        if part is not learned.get(name) and part.learned_only:
            if name in learned and learned[name].learned_only:
                _check_as_learned(learned[name], value, values)
                part = learned[name]
            elif policy is None:
                raise ConfigError(
                    f"method {config.name!r} has parts.{name} and no policy, which learns it; allowed without one is "
                    f"false: set method.parts.{name}=false, or give a policy"
                )
            elif value is True or value == {}:
                continue  # a policy that was trained without one runs without one
            else:
                raise ConfigError(
                    f"method.parts.{name} is {value} and the policy has not learned it; allowed are true, which a "
                    f"policy without it runs without, and false: leave it out, or train with parts.{name}={value}"
                )
        found[name] = part
    if config.inherit:
        inherited = {name: part for name, part in learned.items() if name not in config.parts and not part.helper}
        acting = found.keys() | inherited.keys()
        found |= {n: part for n, part in inherited.items() if all(k.helper or k.name in acting for k in part.uses)}
    elif config.update == "generator" and "experts" in learned:  # its step sizes are theirs too
        found["experts"] = learned["experts"]
        if "teacher" in learned:
            found.setdefault("teacher", learned["teacher"])
    return [found[name] for name in registry.PARTS if name in found]


def _check_as_learned(part: Part, value: Any, values: Any) -> None:
    """Settings of a part that the policy has learned: none, or those that it was learned with."""
    names = [each.name for each in fields(values)]
    given = names if isinstance(value, type(values)) else value if isinstance(value, Mapping) else names[:1]
    for setting in () if value is True else given:
        asked, learned = getattr(values, setting), getattr(part.config, setting)
        if asked != learned:
            key = f"parts.{part.name}"
            raise ConfigError(
                f"method.{key}.{setting} is {asked} and the policy has learned this part with {learned}; allowed is "
                f"that: set method.{key}=true, or train with {key}.{setting}={asked}"
            )


def _objective(config: MethodConfig, policy: AdaptationPolicy | None) -> WeightedObjective:
    if policy is not None and policy.objective is not None and config.takes_objective:
        return policy.objective
    weights = {name: weight for name, weight in config.objective.items() if weight != 0}
    if not weights:
        raise ConfigError(
            f"method {config.name!r} has no objective; allowed are positive weights of {', '.join(registry.TERMS)}: "
            "set for example method.objective.entropy=1, or give a policy"
        )
    objective = WeightedObjective(weights)
    if policy is not None and policy.objective is not None:
        for name, term in policy.objective.named_terms.items():  # what was taken of the source serves any objective
            if name in objective.named_terms and (known := term.to_dict()):
                objective.named_terms[name].load_dict(known)
    return objective


def _generator(config: MethodConfig, policy: AdaptationPolicy | None) -> GradientGenerator:
    if policy is None or not isinstance(policy.rule, GradientGenerator):
        raise ConfigError(
            f"method {config.name!r} needs a meta-trained policy and got none; train one with pretrain/meta_train.py "
            "and give it by --policy ckpt.pt"
        )
    trained = policy.rule
    if config.lr is None:
        return trained
    generator = GradientGenerator(replace(trained.config, lr=config.lr), trained.tensors)
    generator.to(next(trained.parameters()))
    generator.load_state_dict(trained.state_dict())
    return generator
