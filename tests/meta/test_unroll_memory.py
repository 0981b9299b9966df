"""What an unroll keeps alive."""

import pytest
import torch

from metaopt.evaluation import MemoryMeter
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import UnrollConfig

from .cases import LOSSES, TeacherLoss, policy_for, start, task, tiny_resnet

STEPS = {"short": 2, "long": 16}


def peaks(gradient: str, loss: str) -> dict[str, float]:
    """Peak MiB that autograd holds in a short and a long unroll."""
    network = tiny_resnet(width=8, dtype=torch.float32)
    policy = policy_for(network).float()
    found = {}
    for name, steps in STEPS.items():
        batches = task(steps, batch=16, size=24)
        batches = [type(b)(b.images.float(), b.targets.float()) for b in batches if b.targets is not None]
        own = [*network.parameters(), *network.buffers(), *policy.parameters(), *(b.images for b in batches)]
        with MemoryMeter(own) as meter:
            config = UnrollConfig(gradient)
            meta_gradient(policy, network, start(network), None, batches, LOSSES[loss](), config=config)
        found[name] = meter.peak_mib
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_first_order_holds_no_more_for_a_longer_unroll(loss: str) -> None:
    found = peaks("first_order", loss)
    assert found["short"] > 0.5
    assert found["long"] <= 1.05 * found["short"]


def test_full_does() -> None:
    found = peaks("full", "teacher")
    assert found["long"] > 4 * found["short"]


def test_nothing_is_held_afterwards() -> None:
    network = tiny_resnet()
    policy, batches = policy_for(network), task(3)
    for gradient in ("first_order", "full"):
        with MemoryMeter() as meter:
            result = meta_gradient(
                policy, network, start(network), None, batches, TeacherLoss(), config=UnrollConfig(gradient)
            )
        assert meter.held_mib == 0.0
        assert not any(tensor.requires_grad for tensor in [*result.losses, *result.gradients.values()])
