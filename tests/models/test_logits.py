"""What a network may give: one row of two logits or more for each image, all or some of which count."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import metaopt
from metaopt.cli.adapt import main as adapt
from metaopt.errors import CheckpointError, ModelError
from metaopt.meta import MetaTrainConfig
from metaopt.models import ModelSpec, SourceModel, load_source_model

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Logits of any shape, by what is done to (B, classes, 14, 14) maps."""

    def __init__(self, classes: int = 6, ending: str = "pooled") -> None:
        super().__init__()
        self.num_classes, self.ending = classes, ending
        self.conv, self.norm = nn.Conv2d(3, classes, 3), nn.BatchNorm2d(classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.norm(self.conv(x))
        pooled = maps.mean(dim=(2, 3))
        endings = {"pooled": pooled, "maps": maps, "views": pooled.repeat(2, 1), "flat": pooled.flatten()}
        return endings[self.ending]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def tent() -> metaopt.AdaptationPolicy:
    return metaopt.build_method(metaopt.load_method("tent", lr=0.01))


@pytest.mark.parametrize(
    ("ending", "shape"), [("maps", r"\(8, 6, 14, 14\)"), ("views", r"\(16, 6\)"), ("flat", r"\(48,\)")]
)
def test_anything_but_a_row_for_each_image_is_refused(ending: str, shape: str) -> None:
    adapter = metaopt.OnlineAdapter(Net(ending=ending), tent())
    with pytest.raises(ModelError, match=f"logits of shape {shape} for 8 images; allowed is") as refusal:
        adapter(IMAGES)
    assert "\n" not in str(refusal.value)


def test_a_single_logit_is_refused_and_as_two_it_works() -> None:
    with pytest.raises(ModelError, match=r"num_classes=1; allowed is 2 or more.*give \(0, z\)"):
        SourceModel(Net(classes=1))
    unnamed = Net(classes=1)
    unnamed.num_classes = 2
    with pytest.raises(ModelError, match=r"logits of shape \(8, 1\)"):
        SourceModel(unnamed)(IMAGES)


def test_another_count_than_the_spec_says_is_refused(net: Net) -> None:
    net.num_classes = 4
    with pytest.raises(ModelError, match=r"gives 6 logits and its class count is 4.*ModelSpec\('custom:Net', 6\)"):
        SourceModel(net)(IMAGES)
    assert SourceModel(net, spec=ModelSpec("custom:Net", 6))(IMAGES).logits.shape == (8, 6)


def test_a_head_that_was_replaced_counts() -> None:
    network = load_source_model("resnet10t").module
    network.fc = nn.Linear(512, 7)  # timm's num_classes still says 1000
    assert SourceModel(network)(IMAGES).logits.shape == (8, 7)


@pytest.mark.parametrize("make", [list, tuple, numpy.array, torch.tensor])
def test_some_of_the_logits_are_kept_in_the_order_given(net: Net, make) -> None:
    some = SourceModel(net, classes=make([4, 0, 3]))
    assert some.spec == ModelSpec("custom:Net", 3, classes=(4, 0, 3)) and some.num_classes == 3
    assert torch.equal(some(IMAGES).logits, SourceModel(net)(IMAGES).logits[:, [4, 0, 3]])
    assert some.weights_sha256() == SourceModel(net).weights_sha256()
    assert list(some.state_dict()) == [f"module.{name}" for name in net.state_dict()]


def test_a_method_sees_those_alone(net: Net) -> None:
    kept = SourceModel(net, classes=[4, 0, 3])
    cut = Net(classes=3)
    cut.load_state_dict({name: t[[4, 0, 3]] if t.ndim else t for name, t in net.state_dict().items()})
    adapters = [metaopt.OnlineAdapter(model, tent()) for model in (kept, cut)]
    for _ in range(3):
        first, second = (adapter(IMAGES) for adapter in adapters)
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([1], "has 1 indices"),
        ([1, 1], "1 of them different"),
        ([0, 6], r"reach from 0 to 6; allowed is 0 to 5"),
        ([-1, 2], "reach from -1"),
        ([0.5, 1.0], "allowed are integers"),
        ([True, False], "allowed are integers"),
    ],
)
def test_indices_of_no_use_are_refused(net: Net, classes: list, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SourceModel(net, classes=classes)


def test_a_policy_knows_which_were_kept(net: Net, tmp_path: Path) -> None:
    config = MetaTrainConfig(epochs=1, unrolls=1, steps=2, first_steps=1, batch_size=4, selection_tasks=1)
    kept = SourceModel(net, classes=[4, 0, 3])
    metaopt.meta_train(kept, IMAGES, ["gaussian_blur"], config, quiet=True).save(tmp_path / "ckpt.pt")
    policy = metaopt.AdaptationPolicy.load(tmp_path / "ckpt.pt")
    assert metaopt.OnlineAdapter(kept, policy)(IMAGES).shape == (8, 3)
    with pytest.raises(CheckpointError, match=r"trained on logits \[4, 0, 3\] and the model keeps logits \[0, 3, 4\]"):
        metaopt.OnlineAdapter(SourceModel(net, classes=[0, 3, 4]), policy)
    with pytest.raises(CheckpointError, match="6"):
        metaopt.OnlineAdapter(net, policy)


def test_files_from_before_there_were_classes_are_read() -> None:
    stored = ModelSpec("net", 10).to_dict()
    del stored["classes"]
    assert ModelSpec.from_dict(stored) == ModelSpec("net", 10)


def test_by_command_labels_count_within_the_kept(net: Net, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load_source_model("cifar_resnet20").module.state_dict(), "weights.pt")
    numpy.save("x.npy", numpy.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=numpy.uint8))
    command = ["method=tent", "model=cifar_resnet20", "model.checkpoint=weights.pt", "data=arrays", "data.images=x.npy"]
    command += ["data.labels=y.npy", "out=run"]
    numpy.save("y.npy", numpy.array([0, 1, 2, 2, 1, 0]))
    assert adapt([*command, "model.classes=[7,2,5]"]) == 0
    assert {line.split(",")[3] for line in Path("run/predictions.csv").read_text().splitlines()[1:]} <= {"0", "1", "2"}
    numpy.save("y.npy", numpy.array([0, 1, 7, 2, 1, 0]))
    assert adapt([*command, "model.classes=[7,2,5]"]) == 2
    error = capsys.readouterr().err
    assert "a label is 7: model.classes keeps 3 classes, which labels call 0..2 in that order" in error
    assert adapt([*command, "model.classes=[7,10]"]) == 2
    assert "allowed is 0 to 9" in capsys.readouterr().err
