"""Models by name, and weights of every common layout."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from metaopt.errors import CheckpointError, ModelError
from metaopt.models import cifar_resnet, digits_vit
from metaopt.models.registry import OWN_MODELS, load_source_model


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    state = cifar_resnet.cifar_resnet20().state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}


def assert_loaded(path: Path, weights: dict[str, Tensor], **arguments) -> None:
    state = load_source_model("cifar_resnet20", checkpoint=path, **arguments).module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


class TestNames:
    """What can be named."""

    @pytest.mark.parametrize("name", OWN_MODELS)
    def test_own_models_are_timms_with_their_data_configuration(self, name: str):
        model = timm.create_model(name, num_classes=7)
        config = resolve_model_data_config(model)
        assert config["input_size"] == (3, 32, 32)
        spec = load_source_model(name).spec
        assert (spec.mean, spec.std) == (config["mean"], config["std"])
        assert (spec.name, spec.num_classes, spec.input_size) == (name, 10, (3, 32, 32))
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)

    def test_all_that_are_registered_are_named(self):
        assert (*cifar_resnet.default_cfgs, *digits_vit.default_cfgs) == OWN_MODELS

    def test_any_timm_model_with_its_own_normalisation(self):
        assert load_source_model("vit_tiny_patch16_224").spec.mean == (0.5, 0.5, 0.5)
        spec = load_source_model("resnet10t", num_classes=3).spec
        assert (spec.num_classes, spec.mean) == (3, (0.485, 0.456, 0.406))

    def test_convolution_networks_are_channels_last_on_cpus(self):
        assert load_source_model("cifar_resnet20").channels_last
        assert not load_source_model("cifar_resnet20", channels_last=False).channels_last
        assert not load_source_model("digits_vit").channels_last

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("cifar_resnet_20", "nearest are .*cifar_resnet20"),
            ("hf-hub:someone/model", "any name of timm.list_models"),
            ("resnet50.no_such_tag", "timm cannot build 'resnet50.no_such_tag'"),
        ],
    )
    def test_unknown_names_are_refused(self, name: str, message: str):
        with pytest.raises(ModelError, match=message):
            load_source_model(name)

    def test_a_class_count_below_one_is_refused(self):
        with pytest.raises(ModelError, match="num_classes=0"):
            load_source_model("cifar_resnet20", num_classes=0)


class TestLayouts:
    """Files that hold the same weights in different ways."""

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda w: w,
            lambda w: OrderedDict(w),
            lambda w: {"state_dict": w, "epoch": 3, "best": 0.9},
            lambda w: {"model": w, "optimizer": {"state": {}}},
            lambda w: {"net": w},
            lambda w: {f"module.{name}": t for name, t in w.items()},
            lambda w: {"state_dict": {f"module.model.{name}": t for name, t in w.items()}},
            lambda w: {f"_orig_mod.{name}": t for name, t in w.items()},
            lambda w: {name: t for name, t in w.items() if "num_batches" not in name},
        ],
    )
    def test_loads(self, tmp_path: Path, weights: dict[str, Tensor], wrap):
        torch.save(wrap(weights), tmp_path / "a.pt")
        assert_loaded(tmp_path / "a.pt", {n: t for n, t in weights.items() if "num_batches" not in n})

    def test_safetensors(self, tmp_path: Path, weights: dict[str, Tensor]):
        save_file(weights, tmp_path / "a.safetensors")
        assert_loaded(tmp_path / "a.safetensors", weights)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_robustbench_wrappers_bring_their_normalisation(self, tmp_path: Path, weights, prefix: str):
        mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1)
        wrapped = {f"{prefix}mu": mean, f"{prefix}sigma": std}
        wrapped |= {f"{prefix}model.{name}": tensor for name, tensor in weights.items()}
        torch.save({"state_dict": wrapped}, tmp_path / "a.pt")
        assert_loaded(tmp_path / "a.pt", weights)
        model = load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")
        assert model.spec.mean == pytest.approx((0.1, 0.2, 0.3))
        assert torch.equal(model.std, std)

    def test_other_class_counts_on_request(self, tmp_path: Path):
        state = timm.create_model("cifar_resnet20", num_classes=100).state_dict()
        torch.save(state, tmp_path / "a.pt")
        assert_loaded(tmp_path / "a.pt", state, num_classes=100)


class TestRefusals:
    """One clear line for every file that does not fit."""

    def test_another_class_count(self, tmp_path: Path):
        torch.save(timm.create_model("cifar_resnet20", num_classes=100).state_dict(), tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=r"is for 100 classes; the model has 10: ask for num_classes=100"):
            load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")

    @pytest.mark.parametrize("other", ["cifar_resnet56", "digits_vit", "resnet10t"])
    def test_another_architecture(self, tmp_path: Path, other: str):
        torch.save(timm.create_model(other).state_dict(), tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="is not for CifarResNet"):
            load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")

    def test_another_width(self, tmp_path: Path, weights: dict[str, Tensor]):
        wide = {name: torch.zeros([2 * n for n in t.shape]) for name, t in weights.items()}
        torch.save(wide, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="of another shape"):
            load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")

    @pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {}}])
    def test_no_weights_at_all(self, tmp_path: Path, content):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="holds no state_dict"):
            load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")

    def test_a_pickled_network(self, tmp_path: Path):
        torch.save({"model": nn.Linear(2, 2)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match="only tensors and primitives"):
            load_source_model("cifar_resnet20", checkpoint=tmp_path / "a.pt")

    def test_missing_and_broken_files(self, tmp_path: Path):
        for name in ("a.pt", "a.safetensors"):
            with pytest.raises(CheckpointError, match="no file"):
                load_source_model("cifar_resnet20", checkpoint=tmp_path / name)
            (tmp_path / name).write_bytes(b"broken")
            with pytest.raises(CheckpointError, match="no readable"):
                load_source_model("cifar_resnet20", checkpoint=tmp_path / name)


@pytest.mark.parametrize(
    ("depth", "count", "error"), [(20, 2000, 18.7), pytest.param(56, 1000, 16.6, marks=pytest.mark.slow)]
)
def test_error_on_real_images(depth: int, count: int, error: float):
    """Public CIFAR-10 weights load strictly and give their known error."""
    root = os.environ.get("METAOPT_TEST_DATA")
    if not root:
        pytest.skip("METAOPT_TEST_DATA is not set: no real images and weights")
    folder = Path(root)
    model = load_source_model(f"cifar_resnet{depth}", checkpoint=folder / "weights" / f"cifar10_resnet{depth}.pt")
    pixels = np.load(folder / "cifar10" / "test_images.npy")[:count]
    labels = torch.from_numpy(np.load(folder / "cifar10" / "test_labels.npy")[:count])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        predictions = torch.cat([model(batch).logits.argmax(1) for batch in images.split(200)])
    wrong = (predictions != labels).sum().item()
    assert 100 * wrong / count == pytest.approx(error, abs=0.05 + 1e-9)
