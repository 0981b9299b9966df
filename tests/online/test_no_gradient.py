"""Networks in which an update would change nothing: refused at the first step, with the reason, and nothing counted."""

import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import ModelError
from metaopt.online import OnlineAdapter

from ..tiny import tiny_net
from .methods import BATCHES, METHODS


class Features(nn.Module):
    """A network of two halves, of which a user took one out of the graph."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how, self.num_classes = tiny_net(), how, 10
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad" and torch.is_grad_enabled()):
            features = self.net(x)
        if self.how == "detached":
            return self.head(features.detach()) + 0 * self.head.weight.sum()
        if self.how == "rounded":  # as a head of whole numbers does
            return features.mul(100).to(torch.int8).to(features.dtype)
        return self.head(features)


@pytest.mark.parametrize("how", ["no_grad", "detached", "rounded"])
@pytest.mark.parametrize("memory", ["dense", "exact"])
def test_an_update_that_would_change_nothing_is_refused_at_the_first_step(how: str, memory: str) -> None:
    adapter = OnlineAdapter(Features(how), METHODS["tent"](), memory=memory)
    with pytest.raises(ModelError, match=r"would change nothing.*no_grad, detach and quantised") as error:
        adapter(BATCHES[0])
    assert "\n" not in str(error.value) and adapter.updates == adapter.steps == 0


def test_a_head_of_whole_numbers_does_for_batch_statistics() -> None:
    adapter = OnlineAdapter(Features("rounded"), METHODS["bn"]())
    assert adapter(BATCHES[0]).shape == (8, 10) and adapter.updates == 0
