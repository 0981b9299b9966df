r"""The learned initialization: where the normalisation layers start, in place of the source's own values.

.. math:: \theta_0 = \theta_S + \delta

with one learned number :math:`\delta` for each scalar of their weights and biases. Meta-training finds the start from
which the first updates help most, as MAML does (Finn et al., ICML 2017); where restoration brings something back, it
brings this back. The network's file stays as it is: :math:`\delta` is a part of the policy.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaopt.models import SourceModel
from metaopt.parameters import adapted_layout
from metaopt.types import Parameters


class LearnedInitialization(nn.Module):
    """delta of each adapted scalar, 0 before meta-training.

    Args:
        sizes: number of scalars in each tensor, by its name in the model.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.offset = nn.Parameter(torch.zeros(sum(self.sizes.values())))

    @classmethod
    def of(cls, model: SourceModel) -> "LearnedInitialization":
        """For all normalisation layers of a model.

        Raises:
            ModelError: it has none.
        """
        return cls({tensor.name: tensor.numel for tensor in adapted_layout(model).tensors})

    def forward(self, parameters: Parameters) -> Parameters:
        """theta_S + delta; tensors that it does not know stay as they are.

        Args:
            parameters: the source's values, by their names in the model.
        """
        pieces = dict(zip(self.sizes, self.offset.split([*self.sizes.values()]), strict=True))
        return {
            name: tensor + pieces[name].view_as(tensor).to(tensor) if name in pieces else tensor
            for name, tensor in parameters.items()
        }

    def penalty(self) -> Tensor:
        """Sum of squares of delta, scalar."""
        return self.offset.square().sum()
