"""A weighted sum of objective terms, whose weights can be learned."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaopt import registry
from metaopt.errors import ConfigError
from metaopt.objectives.term import Term
from metaopt.types import ForwardOutput


class WeightedObjective(nn.Module):
    """Label-free loss L = Σ_i w_i · T_i over named terms T_i with positive weights w_i = exp(log_weights_i).

    As logarithms, a step of a meta-optimizer is a relative change, and a sign cannot flip.

    Args:
        weights: weight of each term by its registered name; their order is the order of everything below.
        learned: whether the log weights require gradients, so that meta-training moves them.

    Terms are computed in float32 at least, and in the outputs' own type where that is wider.

    Raises:
        ConfigError: no terms, an unknown term, or a weight that is not a finite positive number.
    """

    def __init__(self, weights: Mapping[str, float], learned: bool = False) -> None:
        super().__init__()
        if not weights:
            raise ConfigError(
                "the objective has 0 terms, needs at least 1; give weights such as {slr: 1, diversity: 1}"
            )
        self._initial_weights = {str(name): _checked_weight(name, weight) for name, weight in weights.items()}
        self.learned = bool(learned)
        self.named_terms: dict[str, Term] = {name: registry.get("objective term", name)() for name in weights}
        self.terms = nn.ModuleList(self.named_terms.values())
        self.needs = frozenset[str]().union(*(term.needs for term in self.named_terms.values()))
        initial = torch.tensor(list(self._initial_weights.values()), dtype=torch.float64)
        log_weights = initial.log().to(torch.get_default_dtype())
        self.log_weights = nn.Parameter(log_weights, requires_grad=self.learned)  # (terms,)

    def weights(self) -> dict[str, Tensor]:
        """Scalar weight of each term now; differentiable in ``log_weights`` where they are learned."""
        return dict(zip(self.named_terms, self.log_weights.exp().unbind(), strict=True))

    def values(self, output: ForwardOutput, sample_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted scalar value of each term on this batch, the mean over the samples where it is per sample.

        Args:
            output: the predictions, and what the terms read beside them.
            sample_weights: (B,), factors of the samples in that mean; None: all 1.

        Returns:
            The values, not detached: they hold the graph for as long as they are kept.

        Raises:
            ConfigError: a term lacks the features, the view, the teacher or the source statistics that it reads.
        """
        output, values = _widened(output), {}
        for name, term in self.named_terms.items():
            value = term(output)
            if term.per_sample:
                value = (value if sample_weights is None else value * sample_weights.to(value)).mean()
            values[name] = value
        return values

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int = 64) -> None:
        """Let the terms take what they need of clean source images; ``images`` is called only where one does."""
        for term in self.named_terms.values():
            term.prepare(model, images, batch_size)

    def to_dict(self) -> dict[str, Any]:
        """What it was built from, as primitives and tensors; learned weights travel in the ``state_dict``."""
        terms = {name: term.to_dict() for name, term in self.named_terms.items()}
        return {"weights": dict(self._initial_weights), "learned": self.learned, "terms": terms}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WeightedObjective":
        """The inverse of ``to_dict``.

        Raises:
            ConfigError: an unknown or missing key, or a bad value of one.
        """
        if set(values) != {"weights", "learned", "terms"} or not isinstance(values["weights"], Mapping):
            raise ConfigError(f"an objective has {sorted(values)}; allowed are weights, learned and terms: give those")
        if not isinstance(values["learned"], bool) or set(values["terms"]) != set(values["weights"]):
            raise ConfigError("an objective has other terms than weights; allowed are the same: give both of each")
        objective = cls(values["weights"], learned=values["learned"])
        for name, term in objective.named_terms.items():
            term.load_dict(values["terms"][name])
        return objective

    def extra_repr(self) -> str:
        """The terms with their weights now."""
        parts = ", ".join(f"{name}={weight.item():.4g}" for name, weight in self.weights().items())
        return f"{parts}, learned={self.learned}"


def weighted_sum(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The loss: values times weights, summed; a scalar."""
    return torch.stack([weights[name].to(value) * value for name, value in values.items()]).sum()


def _checked_weight(name: str, weight: float) -> float:
    registry.get("objective term", name)  # an unknown term is the better complaint than its weight
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
    features = tuple(widen(block) for block in output.features)
    return ForwardOutput(widen(output.logits), features, view, teacher)
