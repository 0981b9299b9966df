"""The tables of what a method is composed of, update rules, objective terms and parts, and of arrangements of streams.

A row names where its class lives, as ``"module:Class"``; nothing is imported before it is used, so that a method loads
what it is made of and no more. The first line of the class's docstring is what ``--help`` says of it.
"""

from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any

from metaopt.errors import ConfigError

RULES: dict[str, Any] = {
    "adam": "metaopt.optimizers.adam:Adam",
    "sgd": "metaopt.optimizers.sgd:SGD",
    "sam": "metaopt.optimizers.sam:SAM",
}
"""Hand-made update rules, by the name that ``method.update`` calls them."""

TERMS: dict[str, Any] = {
    "entropy": "metaopt.objectives.entropy:Entropy",
    "filtered": "metaopt.objectives.filtered:FilteredEntropy",
    "slr": "metaopt.objectives.slr:SoftLikelihoodRatio",
    "diversity": "metaopt.objectives.diversity:Diversity",
    "discrepancy": "metaopt.objectives.discrepancy:Discrepancy",
    "consistency": "metaopt.objectives.consistency:Consistency",
    "teacher": "metaopt.objectives.teacher:TeacherCrossEntropy",
}
"""Terms of an objective, by the name that ``objective.<name>`` weighs them under."""

PARTS: dict[str, Any] = {
    "batch_statistics": "metaopt.policy.parts.batch_statistics:BatchStatistics",
    "experts": "metaopt.policy.parts.experts:ExpertsPart",
    "initialization": "metaopt.policy.parts.initialization:Initialization",
    "restoration": "metaopt.policy.parts.restoration:Restoration",
    "domain_memory": "metaopt.policy.parts.domain_memory:DomainMemory",
    "shift_distance": "metaopt.policy.parts.shift_distance:ShiftDistance",
    "update_gate": "metaopt.policy.parts.update_gate:UpdateGate",
    "teacher": "metaopt.policy.parts.teacher:Teacher",
    "sample_weights": "metaopt.policy.parts.sample_weights:SampleWeights",
    "sample_filter": "metaopt.policy.parts.sample_filter:SampleFilter",
    "fisher": "metaopt.policy.parts.fisher:Fisher",
    "recovery": "metaopt.policy.parts.recovery:Recovery",
    "weight_ensembling": "metaopt.policy.parts.weight_ensembling:WeightEnsembling",
    "class_skew": "metaopt.policy.parts.class_skew:ClassSkew",
    "class_balance": "metaopt.policy.parts.class_balance:ClassBalance",
    "verdict": "metaopt.policy.parts.verdict:VerdictPart",
    "rollback": "metaopt.policy.parts.rollback:Rollback",
    "pruning": "metaopt.policy.parts.pruning:Pruning",
}
"""Parts of a policy, by name, in the order in which they act where two act at the same place of the step."""

ARRANGEMENTS: dict[str, Any] = {
    "shuffled": "metaopt.data.arrangements.by_domain:Shuffled",
    "sorted": "metaopt.data.arrangements.by_class:Sorted",
    "dirichlet": "metaopt.data.arrangements.by_class:Dirichlet",
    "few_classes": "metaopt.data.arrangements.by_class:FewClasses",
    "long_tail": "metaopt.data.arrangements.by_class:LongTail",
    "alternating": "metaopt.data.arrangements.by_domain:Alternating",
    "mixed": "metaopt.data.arrangements.by_domain:Mixed",
    "recurring": "metaopt.data.arrangements.by_domain:Recurring",
    "gradual": "metaopt.data.arrangements.by_domain:Gradual",
    "long": "metaopt.data.arrangements.by_domain:Long",
}
"""How the images of a stream are arranged, by the name that ``stream`` calls it."""

KINDS = {"update rule": RULES, "objective term": TERMS, "part": PARTS, "arrangement": ARRANGEMENTS}


def get(kind: str, name: str) -> Any:
    """The class of that name.

    Args:
        kind: one of ``KINDS``.
        name: its row.

    Raises:
        ConfigError: there is none; the message says the nearest name.
    """
    table = KINDS[kind]
    if name not in table:
        nearest = get_close_matches(str(name), table, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "choose one of them"
        raise ConfigError(f"unknown {kind} {name!r}; allowed are {', '.join(table)}: {hint}")
    entry = table[name]
    return resolve_name(entry) if isinstance(entry, str) else entry


def register(kind: str, name: str, entry: Any) -> None:
    """Add a row: a class, or where one lives.

    Raises:
        ConfigError: the name is taken or no identifier (it becomes a setting and a TensorBoard tag).
    """
    table = KINDS[kind]
    if not name.isidentifier():
        raise ConfigError(f"{kind} {name!r} is no identifier; use letters, digits and underscores")
    if name in table:
        raise ConfigError(f"{kind} {name!r} is already registered; choose a name other than {', '.join(table)}")
    table[name] = entry


def describe(kind: str) -> dict[str, str]:
    """One line on each row of a table, by name."""
    return {name: (get(kind, name).__doc__ or "").strip().splitlines()[0] for name in KINDS[kind]}
