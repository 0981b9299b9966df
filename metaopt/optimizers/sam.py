r"""Sharpness-aware minimisation: gradient descent on the loss at the worst point nearby, in two passes.

.. math:: \hat\epsilon = \rho\, g / \lVert g \rVert, \quad g = \nabla L(\theta), \qquad
    \theta \leftarrow \theta - \alpha\, v, \quad v \leftarrow \mu v + \nabla L(\theta + \hat\epsilon)

(Foret et al., ICLR 2021; SAR: Niu et al., ICLR 2023, equation 4, with the constants of its released code). The norm is
that of all adapted scalars together.
"""

from dataclasses import dataclass

from metaopt.errors import check_range
from metaopt.optimizers.sgd import SGD
from metaopt.parameters import flatten
from metaopt.types import Parameters

EPS = 1e-12  # added to the norm, as in the released code


@dataclass(frozen=True)
class SAM(SGD):
    """Gradient descent with momentum on the loss at distance ``rho`` uphill."""

    rho: float = 0.05

    def __post_init__(self) -> None:
        """Check every value against its range."""
        super().__post_init__()
        check_range("method.rule.rho", self.rho, 0, example="0.05")

    def ascend(self, gradients: Parameters) -> Parameters:
        """ε̂: what is added to the parameters for the second pass."""
        scale = self.rho / (flatten(gradients).norm() + EPS)
        return {name: scale * gradient for name, gradient in gradients.items()}
