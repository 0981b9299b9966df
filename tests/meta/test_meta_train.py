"""The library call, on a user's own module, images and shifts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import metaopt
from metaopt.data import shifts
from metaopt.errors import DataError, ModelError

from ..tiny import random_images, tiny_config, tiny_net


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(shifts, "_SHIFTS", dict(shifts._SHIFTS))


def test_ones_own_module_and_shift(own_registry: None, tmp_path: Path) -> None:
    strengths: list[float] = []

    def lens_dirt(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        strengths.append(strength)
        dirt = torch.rand(1, 1, *images.shape[2:], generator=generator).to(images)
        return (images * (1 - 0.1 * strength * dirt)).clamp(0, 1)

    metaopt.register_shift("lens_dirt", lens_dirt, family="deployment")
    net = tiny_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    policy = metaopt.meta_train(net, random_images(32), shifts=["lens_dirt"], config=tiny_config(), quiet=True)
    assert len(strengths) > 10 and all(0.5 <= strength <= 5 for strength in strengths)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert policy.training["epochs"] == 2
    assert bool(policy.state_dict()["rule.log_step_sizes"].any())

    policy.save(tmp_path / "ckpt.pt")
    adapter = metaopt.OnlineAdapter(net, metaopt.AdaptationPolicy.load(tmp_path / "ckpt.pt"))
    first = adapter(random_images(8))
    assert first.shape == (8, 10) and not torch.equal(first, adapter(random_images(8)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_call_is_the_trainer(own_registry: None) -> None:
    from metaopt.meta import MetaTrainer
    from metaopt.models import SourceModel

    policy = metaopt.meta_train(tiny_net(), random_images(32), config=tiny_config(), quiet=True)
    trained = MetaTrainer(SourceModel(tiny_net()), random_images(32), None, tiny_config()).run()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name])


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    metaopt.meta_train(tiny_net(), random_images(16), config=tiny_config(epochs=1))
    shown = capsys.readouterr()
    assert "Meta-training" in shown.err and not shown.out
    metaopt.meta_train(tiny_net(), random_images(16), config=tiny_config(epochs=1), quiet=True)
    assert capsys.readouterr().err == ""


def test_bad_input_is_refused() -> None:
    bytes_ = (random_images(8) * 255).to(torch.uint8)
    broken = random_images(8)
    broken[0, 0, 0, 0] = float("nan")
    for images, message in (
        (bytes_, "uint8"),
        (random_images(8) * 2, "lie in"),
        (broken, "NaN"),
        (random_images(8)[:, :1], "shape"),
        (random_images(8)[:0], "at least one image"),
    ):
        with pytest.raises(DataError, match=message):
            metaopt.meta_train(tiny_net(), images, config=tiny_config(), quiet=True)
    bare = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    with pytest.raises(ModelError, match="no normalisation layer"):
        metaopt.meta_train(bare, random_images(8), config=tiny_config(), quiet=True)
