"""The same weights in another precision are the same model for a policy; other weights are not."""

import copy
from pathlib import Path

import pytest
import torch

from metaopt.errors import CheckpointError
from metaopt.models import SourceModel
from metaopt.online import OnlineAdapter
from metaopt.policy import AdaptationPolicy, SourceRecord

from ..tiny import BARE, random_images, tiny_model, tiny_net, tiny_policy

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def in_type(dtype: torch.dtype, seed: int = 0) -> SourceModel:
    return SourceModel(tiny_net(seed).to(dtype))


@pytest.mark.parametrize("given", TYPES)
@pytest.mark.parametrize("trained", TYPES)
def test_casts_of_the_same_weights_are_one_model(trained: torch.dtype, given: torch.dtype) -> None:
    """Of a float32 original; what each of two half precisions lost, the other cannot tell."""
    record = SourceRecord.from_dict(SourceRecord.of(in_type(trained)).to_dict())
    if {trained, given} == {torch.bfloat16, torch.float16}:
        with pytest.raises(CheckpointError, match="allowed are the same weights"):
            record.check(in_type(given))
    else:
        record.check(in_type(given))
    with pytest.raises(CheckpointError, match="allowed are the same weights"):
        record.check(in_type(given, seed=1))


def test_a_change_that_float32_tells_is_another_model() -> None:
    """Though both round to the same half precision."""
    net = tiny_net()
    record = SourceRecord.of(SourceModel(copy.deepcopy(net)))
    net.linear.bias.data[0] = torch.nextafter(net.linear.bias.data[0], torch.tensor(9.0))
    with pytest.raises(CheckpointError, match="allowed are the same weights"):
        record.check(SourceModel(net))
    record.check(SourceModel(net.bfloat16()))


def test_networks_of_two_types_are_told_by_the_narrower() -> None:
    net = tiny_net().bfloat16()
    for norm in (net.bn1, net.bn2):
        norm.float().load_state_dict(getattr(tiny_net(), "bn1" if norm is net.bn1 else "bn2").state_dict())
    mixed = SourceModel(net)
    SourceRecord.of(tiny_model()).check(mixed)
    SourceRecord.of(mixed).check(tiny_model())
    net.bn1.weight.data[0] += 0.5
    with pytest.raises(CheckpointError, match="allowed are the same weights"):
        SourceRecord.of(tiny_model()).check(mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_policy_of_float32_runs_on_the_half_network(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_policy(tiny_model(), parts=BARE).save(tmp_path / "ckpt.pt")
    adapter = OnlineAdapter(in_type(dtype), AdaptationPolicy.load(tmp_path / "ckpt.pt"))
    whole = OnlineAdapter(tiny_model(), AdaptationPolicy.load(tmp_path / "ckpt.pt"))
    for seed in range(3):
        found, expected = adapter(random_images(8, seed)), whole(random_images(8, seed))
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert adapter.updates == 3


def test_files_of_before_load_and_say_why_they_cannot_tell() -> None:
    values = SourceRecord.of(tiny_model()).to_dict()
    before = {name: values[name] for name in ("spec", "sha256", "layout")}
    record = SourceRecord.from_dict(before)
    record.check(tiny_model())
    with pytest.raises(CheckpointError, match=r"weights are in bfloat16 and the policy's file, of an earlier release"):
        record.check(in_type(torch.bfloat16))
    with pytest.raises(CheckpointError, match="allowed are the same weights"):
        record.check(tiny_model(seed=1))
