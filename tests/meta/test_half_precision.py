"""Meta-training on a network in half precision: the policy learns in float32, and runs on the network in any type."""

import copy

import pytest
import torch

from metaopt import meta_train
from metaopt.data import load_digits
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.parameters import flatten

from ..tiny import random_images, small_digits, tiny_config, tiny_model


@pytest.mark.parametrize("gradient", ["first_order", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_policy_learns_on_a_half_network(dtype: torch.dtype, gradient: str) -> None:
    model = SourceModel(copy.deepcopy(tiny_model().module).to(dtype))
    images = small_digits(load_digits().unlabeled)[:32]
    policy = meta_train(model, images, config=tiny_config(gradient=gradient, batch_size=8))
    tensors = policy.state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    for own in (dtype, torch.float32):  # the same weights in the wider type
        adapter = OnlineAdapter(SourceModel(copy.deepcopy(model.module).to(own)), policy)
        adapter(random_images(8))
        assert adapter.updates == 1 and (flatten(adapter.parameters) - flatten(adapter.start)).abs().max() > 0
