"""What a stream hands to an adapter: broken images are left out, and what is silently wrong elsewhere is refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaopt.errors import DataError
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter

from ..tiny import random_images, tiny_net
from .methods import BATCHES, DEFAULT, METHODS, UPDATING, new_adapter, run, same


def spoiled(images: Tensor, row: int, value: float) -> Tensor:
    images = images.clone()
    images[row, 1, 4, 4] = value
    return images


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -3.0])
def test_the_rest_of_a_batch_with_a_broken_image_goes_on_as_if_alone(method: str, value: float) -> None:
    adapter, other = new_adapter(method), new_adapter(method)
    run(adapter, BATCHES[:3])
    run(other, BATCHES[:3])
    rest = [0, 1, 3, 4, 5, 6, 7]
    output, expected = adapter.step(spoiled(BATCHES[3], 2, value)), other.step(BATCHES[3][rest])
    assert torch.equal(output.logits[rest], expected.logits) and bool(output.logits[2].isnan().all())
    assert output.events == ("broken_images", *expected.events) and output.updated == expected.updated
    assert adapter.events == other.events | {"broken_images": 1}
    assert (adapter.steps, adapter.updates) == (other.steps, other.updates)
    assert same(run(adapter, BATCHES[4:]), run(other, BATCHES[4:]))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_broken_images_changes_nothing(method: str) -> None:
    adapter, undisturbed = new_adapter(method), new_adapter(method)
    run(adapter, BATCHES[:3])
    run(undisturbed, BATCHES[:3])
    logits = adapter(torch.full_like(BATCHES[3], float("nan")))
    assert logits.shape == (8, adapter.model.num_classes) and bool(logits.isnan().all())
    assert adapter.events == undisturbed.events | {"broken_images": 1}
    assert same(run(adapter, BATCHES[4:]), run(undisturbed, BATCHES[4:]))


class Overflowing(nn.Module):
    """A network that is not finite on bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.num_classes = tiny_net(), 10

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.where(x.mean(dim=(1, 2, 3)) > 0.95, torch.inf, 1.0).unsqueeze(1)


@pytest.mark.parametrize("method", [name for name in UPDATING if name != "two views"])  # whose views count batches
def test_where_the_network_is_not_finite_the_batch_leaves_nothing_behind(method: str) -> None:
    def adapter() -> OnlineAdapter:
        policy: Any = METHODS[method]()
        policy.source = None
        wrapped = copy.deepcopy(Overflowing())
        if policy.part("initialization") is not None:
            policy.parts["initialization"].sizes = {
                name.replace("module.", "module.net."): size
                for name, size in policy.part("initialization").sizes.items()
            }
        if getattr(policy.rule, "tensors", ()):
            policy.rule.tensors = tuple(name.replace("module.", "module.net.") for name in policy.rule.tensors)
        return OnlineAdapter(SourceModel(wrapped), policy)

    first, undisturbed = adapter(), adapter()
    run(first, BATCHES[:3])
    run(undisturbed, BATCHES[:3])
    bright = torch.ones_like(BATCHES[3])
    assert not first.step(bright).updated
    assert first.events == undisturbed.events | {"nonfinite": 1}
    assert first.updates == undisturbed.updates
    assert same(run(first, BATCHES[4:]), run(undisturbed, BATCHES[4:]))


@pytest.mark.parametrize("method", ["source", "bn", *DEFAULT])
def test_bytes_arrays_and_doubles_are_images_too(method: str) -> None:
    data = (BATCHES[0] * 255).round().to(torch.uint8)
    floats = data.float() / 255
    expected = new_adapter(method)(floats)
    for given in (data, data.numpy(), floats.double(), floats.numpy(), floats.half().float(), floats + 1e-7):
        found = new_adapter(method)(given)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
    assert torch.equal(new_adapter(method)(data), expected) and torch.equal(new_adapter(method)(data.numpy()), expected)


REFUSED: dict[str, tuple[Any, str]] = {
    "bytes as floats": (BATCHES[0] * 255, "bytes as floats: divide them by 255"),
    "normalised": ((BATCHES[0] - 0.45) / 0.22, "normalised already"),
    "one normalised image": ((BATCHES[0][:1] - 0.45) / 0.22, "normalised already"),
    "pair": ((BATCHES[0], torch.zeros(8)), "labels beside the images"),
    "list": ([BATCHES[0][0]], "stack them"),
    "single image": (BATCHES[0][0], "images\\[None\\]"),
    "channels last": (BATCHES[0].permute(0, 2, 3, 1).numpy(), "permute"),
    "integers": ((BATCHES[0] * 255).long(), "torch.int64"),
    "strings": (np.array(["a"]), "array of"),
    "none": (BATCHES[0][:0], "at least one image"),
    "nothing": (None, "NoneType"),
}


@pytest.mark.parametrize("given", REFUSED)
@pytest.mark.parametrize("method", ["bn", "tent", *DEFAULT])
def test_what_would_be_silently_wrong_is_refused_in_one_line_and_changes_nothing(method: str, given: str) -> None:
    adapter, undisturbed = new_adapter(method), new_adapter(method)
    run(adapter, BATCHES[:2])
    run(undisturbed, BATCHES[:2])
    images, message = REFUSED[given]
    with pytest.raises(DataError, match=message) as error:
        adapter(images)
    assert "\n" not in str(error.value)
    assert (adapter.steps, adapter.events) == (undisturbed.steps, undisturbed.events)
    assert same(run(adapter, BATCHES[2:]), run(undisturbed, BATCHES[2:]))


def test_a_dead_pixel_in_each_image_is_no_other_scale() -> None:
    images = random_images(8, seed=1)
    images[:, :, 3, 3] = 200.0
    output = new_adapter("tent").step(images)
    assert bool(output.logits.isnan().all()) and output.events == ("broken_images",)
