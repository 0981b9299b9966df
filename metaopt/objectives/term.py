"""What a term of an objective is, and how a user adds one."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from metaopt import registry
from metaopt.types import ForwardOutput


class Term(nn.Module):
    """A label-free loss on a batch's predictions, which says what it reads beside the logits.

    It remembers nothing: a loss that does is a part of the policy (`metaopt.policy.part`, act ``terms``).
    """

    per_sample: ClassVar[bool] = True  # whether the value is one per sample, (B,), or a scalar for the whole batch
    needs: ClassVar[frozenset[str]] = frozenset()  # of "features", "view", "teacher": fields of ForwardOutput

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int) -> None:
        """Take what it needs of clean source images, (n, 3, H, W), which ``images`` gives; most need nothing."""

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`prepare` took, as primitives and tensors for a checkpoint."""
        return {}

    def load_dict(self, values: dict[str, Any]) -> None:
        """Inverse of :meth:`to_dict`."""


TermFunction = Callable[[ForwardOutput], Tensor]
"""Value of a term on a batch: (B,) where the term is per sample, else a scalar."""


class FunctionTerm(Term):
    """A user's own function as a term. It is found by its name, so that policies with it can be copied and pickled."""

    functions: ClassVar[dict[str, TermFunction]] = {}

    def __init__(self, name: str, per_sample: bool, needs: frozenset[str]) -> None:
        super().__init__()
        self.name, self.per_sample, self.needs = name, per_sample, needs  # type: ignore[misc]

    def forward(self, output: ForwardOutput) -> Tensor:
        """The function's value."""
        return self.functions[self.name](output)


def register_term(name: str, function: TermFunction, *, per_sample: bool, needs: frozenset[str] = frozenset()) -> None:
    """Add a function as a term under ``name``, from then on valid in every objective.

    Args:
        name: of the term.
        function: gives its value; its first docstring line is what ``--help`` says.
        per_sample: whether that is one value per sample.
        needs: which of "features", "view", "teacher" it reads.

    Raises:
        ConfigError: the name is taken or no identifier (it becomes a configuration key and a TensorBoard tag).
    """
    make = partial(FunctionTerm, name, per_sample, frozenset(needs))
    make.__doc__ = function.__doc__
    registry.register("objective term", name, make)
    FunctionTerm.functions[name] = function
