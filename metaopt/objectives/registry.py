"""The table of objective terms: what a weighted objective can be made of, and how a user adds to it."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.objectives.consistency import view_consistency
from metaopt.objectives.discrepancy import feature_discrepancy
from metaopt.objectives.diversity import negative_mean_entropy
from metaopt.objectives.entropy import softmax_entropy
from metaopt.objectives.filtered import filtered_entropy
from metaopt.objectives.slr import soft_likelihood_ratio
from metaopt.objectives.teacher import teacher_cross_entropy
from metaopt.types import ForwardOutput, SourceStatistics

TermFunction = Callable[[ForwardOutput, SourceStatistics | None], Tensor]
"""Value of a term on a batch: (B,) where the term is per sample, else a scalar."""


@dataclass(frozen=True)
class ObjectiveTerm:
    """One label-free loss that a weighted objective can contain."""

    function: TermFunction
    per_sample: bool  # whether ``function`` gives one value per sample, (B,), or a scalar for the whole batch
    needs_features: bool = False  # whether it reads ``ForwardOutput.features``
    needs_view: bool = False  # whether it reads ``ForwardOutput.view_logits``
    needs_teacher: bool = False  # whether it reads ``ForwardOutput.teacher_logits``


OBJECTIVE_TERMS: dict[str, ObjectiveTerm] = {
    "entropy": ObjectiveTerm(lambda output, _: softmax_entropy(output.logits), per_sample=True),
    "filtered": ObjectiveTerm(lambda output, _: filtered_entropy(output.logits), per_sample=True),
    "slr": ObjectiveTerm(lambda output, _: soft_likelihood_ratio(output.logits), per_sample=True),
    "diversity": ObjectiveTerm(lambda output, _: negative_mean_entropy(output.logits), per_sample=False),
    "discrepancy": ObjectiveTerm(
        lambda output, statistics: feature_discrepancy(output.features, statistics),
        per_sample=False,
        needs_features=True,
    ),
    "consistency": ObjectiveTerm(
        lambda output, _: view_consistency(output.logits, output.view_logits), per_sample=True, needs_view=True
    ),
    "teacher": ObjectiveTerm(
        lambda output, _: teacher_cross_entropy(output.logits, output.teacher_logits),
        per_sample=True,
        needs_teacher=True,
    ),
}


def register_term(
    name: str,
    function: TermFunction,
    *,
    per_sample: bool,
    needs_features: bool = False,
    needs_view: bool = False,
    needs_teacher: bool = False,
) -> None:
    """Add a term under ``name``, from then on valid in every objective.

    Raises:
        ConfigError: the name is taken or no identifier (it becomes a configuration key and a TensorBoard tag).
    """
    if not name.isidentifier():
        raise ConfigError(f"objective term {name!r} is no identifier; use letters, digits and underscores")
    if name in OBJECTIVE_TERMS:
        raise ConfigError(f"objective term {name!r} is already registered; choose a name other than {_known()}")
    OBJECTIVE_TERMS[name] = ObjectiveTerm(function, per_sample, needs_features, needs_view, needs_teacher)


def get_term(name: str) -> ObjectiveTerm:
    """The term registered under ``name``.

    Raises:
        ConfigError: there is none; the message says the nearest name.
    """
    if name in OBJECTIVE_TERMS:
        return OBJECTIVE_TERMS[name]
    nearest = get_close_matches(str(name), OBJECTIVE_TERMS, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "choose one of them, or register_term(...) your own"
    raise ConfigError(f"unknown objective term {name!r}; known terms: {_known()}; {hint}")


def _known() -> str:
    return ", ".join(OBJECTIVE_TERMS)
