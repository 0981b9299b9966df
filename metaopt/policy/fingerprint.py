"""What tells one policy from another of the same name: a fingerprint of its settings and of all that it learned."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor

from metaopt.files import weights_sha256
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.policy.policy import AdaptationPolicy


def policy_sha256(policy: AdaptationPolicy) -> str:
    """SHA-256 over the settings of rule, objective and parts, and over the learned tensors.

    What objective and parts took of clean images does not count: another machine takes it with another rounding. Nor
    does the seed of what is drawn online, which an adaptation brings along.
    """
    objective = None if policy.objective is None else policy.objective.to_dict()
    parts = [[part.name, part.to_dict()] for part in policy.listed]
    described = [policy.method, policy.adapts, _rule(policy.rule), objective, parts]
    text = json.dumps(_plain(described), sort_keys=True)
    return hashlib.sha256((text + weights_sha256(policy)).encode()).hexdigest()


def _rule(rule: Any) -> list[Any]:
    """Class and settings of an update rule."""
    if isinstance(rule, GradientGenerator):
        return ["generator", asdict(rule.config), rule.tensors]
    return [type(rule).__name__, asdict(rule) if is_dataclass(rule) and not isinstance(rule, type) else None]


def _plain(value: Any) -> Any:
    """The same without tensors, in what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, Tensor)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if not isinstance(item, Tensor)]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
