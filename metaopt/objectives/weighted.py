"""A weighted sum of objective terms, whose weights can be learned."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.objectives.registry import get_term
from metaopt.types import ForwardOutput, SourceStatistics


class InvertiblePair(NamedTuple):
    """How a learned scalar lives unconstrained: ``constrain`` gives its value, ``unconstrain`` its parameter."""

    constrain: Callable[[Tensor], Tensor]
    unconstrain: Callable[[Tensor], Tensor]


POSITIVE = InvertiblePair(constrain=torch.exp, unconstrain=torch.log)
"""Positive scalars as logarithms: a step of an optimizer is a relative change, and the sign cannot flip."""


class WeightedObjective(nn.Module):
    """Label-free loss L = Σ_i w_i · T_i over named terms T_i with positive weights w_i = exp(log_weights_i).

    Args:
        weights: weight of each term by its registered name; their order is the order of everything below.
        learned: whether the log weights require gradients, so that meta-training moves them.

    Terms are computed in float32 at least, and in the outputs' own type where that is wider.

    Raises:
        ConfigError: no terms, an unknown term, or a weight that is not a finite positive number.
    """

    needs_features: bool
    needs_view: bool
    needs_teacher: bool

    def __init__(self, weights: Mapping[str, float], learned: bool = False) -> None:
        super().__init__()
        if not weights:
            raise ConfigError(
                "the objective has 0 terms, needs at least 1; give weights such as {slr: 1, diversity: 1}"
            )
        # Names rather than the terms themselves, whose functions may be lambdas: the objective stays picklable.
        self._initial_weights = {str(name): _checked_weight(name, weight) for name, weight in weights.items()}
        self.learned = bool(learned)
        self.needs_features = any(get_term(name).needs_features for name in self._initial_weights)
        self.needs_view = any(get_term(name).needs_view for name in self._initial_weights)
        self.needs_teacher = any(get_term(name).needs_teacher for name in self._initial_weights)
        initial = torch.tensor(list(self._initial_weights.values()), dtype=torch.float64)
        log_weights = POSITIVE.unconstrain(initial).to(torch.get_default_dtype())
        self.log_weights = nn.Parameter(log_weights, requires_grad=self.learned)  # (terms,)

    def weights(self) -> dict[str, Tensor]:
        """Scalar weight of each term now; differentiable in ``log_weights`` where they are learned."""
        return dict(zip(self._initial_weights, POSITIVE.constrain(self.log_weights).unbind(), strict=True))

    def terms(self, output: ForwardOutput, statistics: SourceStatistics | None = None) -> dict[str, Tensor]:
        """Unweighted scalar value of each term on this batch: the mean over the samples where it is per sample.

        Raises:
            ConfigError: a term lacks the features, the view, the teacher or the source statistics that it reads.
        """
        output = _widened(output)
        values = {}
        for name in self._initial_weights:
            term = get_term(name)
            value = term.function(output, statistics)
            values[name] = value.mean() if term.per_sample else value
        return values

    def per_sample(self, output: ForwardOutput, statistics: SourceStatistics | None = None) -> dict[str, Tensor]:
        """Unweighted value (B,) of each term that is defined per sample; the others are left out."""
        output = _widened(output)
        terms = {name: get_term(name) for name in self._initial_weights}
        return {name: term.function(output, statistics) for name, term in terms.items() if term.per_sample}

    def loss(
        self, output: ForwardOutput, statistics: SourceStatistics | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum on this batch, a scalar, and the unweighted terms that it was summed from.

        The terms are not detached: they hold the graph for as long as they are kept.
        """
        terms = self.terms(output, statistics)
        weights = self.weights()
        parts = [weights[name].to(term) * term for name, term in terms.items()]
        return torch.stack(parts).sum(), terms

    def to_config(self) -> dict[str, Any]:
        """What it was built from, as primitives; learned values travel in the ``state_dict``."""
        return {"weights": dict(self._initial_weights), "learned": self.learned}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "WeightedObjective":
        """The inverse of ``to_config``.

        Raises:
            ConfigError: a key other than ``weights`` and ``learned``, no ``weights``, or a bad value of them.
        """
        unknown = sorted(set(config) - {"weights", "learned"})
        if unknown:
            raise ConfigError(f"unknown objective setting {unknown[0]!r}; allowed: weights, learned; remove it")
        if not isinstance(config.get("weights"), Mapping):
            raise ConfigError(
                f"objective weights are {config.get('weights')!r}, must map terms to numbers; "
                "give weights such as {slr: 1, diversity: 1}"
            )
        return cls(config["weights"], learned=config.get("learned", False))

    def extra_repr(self) -> str:
        """The terms with their weights now."""
        parts = ", ".join(f"{name}={weight.item():.4g}" for name, weight in self.weights().items())
        return f"{parts}, learned={self.learned}"


def _checked_weight(name: str, weight: float) -> float:
    get_term(name)  # an unknown term is the better complaint than its weight
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"weight of objective term {name!r} is {weight!r}, must be a number above 0; give 1.0, say")
    if weight == 0:
        raise ConfigError(f"weight of objective term {name!r} is 0, must be above 0; drop the term instead")
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"weight of objective term {name!r} is {weight}, must be finite and above 0; give 1.0, say")
    return float(weight)


def _widened(output: ForwardOutput) -> ForwardOutput:
    """Half precision as float32: sums of squares overflow in it and the softmax's tails vanish."""

    def widen(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    view, teacher = (None if other is None else widen(other) for other in (output.view_logits, output.teacher_logits))
    return ForwardOutput(widen(output.logits), tuple(widen(block) for block in output.features), view, teacher)
