"""One network has one identity, in whatever wrapper its user has it."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import cast

import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import Normalize, Resize

import metaopt
from metaopt.errors import ModelError
from metaopt.meta import MetaTrainConfig
from metaopt.models import ModelSpec, SourceModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=10).eval()


class Normalise(nn.Module):
    """As RobustBench has it: buffers, of another shape."""

    mu: Tensor
    sigma: Tensor

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mu) / self.sigma


class Around(nn.Module):
    """A class of the user's own, which normalises itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1))


class Standardised(Around):
    """By the image itself, which no mean and no standard deviation say."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(dim=(2, 3), keepdim=True))


WRAPPERS: dict[str, Callable[[nn.Module], object]] = {
    "data_parallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "ema": ModelEma,
    "ema_v2": ModelEmaV2,
    "ema_v3": ModelEmaV3,
    "twice": lambda net: nn.DataParallel(cast(nn.Module, torch.compile(net))),
    "normalised": lambda net: nn.Sequential(Normalise(), net),
    "normalised_by_torchvision": lambda net: nn.Sequential(Normalize(MEAN, STD), net),
    "named": lambda net: nn.Sequential(OrderedDict(normalize=Normalise(), model=net)),
    "wrapped_inside": lambda net: nn.Sequential(Normalise(), cast(nn.Module, torch.compile(net))),
    "alone": nn.Sequential,
    "own_class": Around,
}


@pytest.fixture
def parallel(tmp_path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def assert_same(found: SourceModel, plain: SourceModel) -> None:
    assert found.spec == plain.spec
    assert found.weights_sha256() == plain.weights_sha256()
    torch.testing.assert_close(found(IMAGES).logits, plain(IMAGES).logits)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_identity_is_that_of_the_network_inside(net: nn.Module, wrapper: str) -> None:
    plain = SourceModel(net)
    assert plain.spec == ModelSpec("resnet10t", 10, (3, 176, 176), MEAN, STD)
    assert_same(SourceModel(WRAPPERS[wrapper](net)), plain)  # type: ignore[arg-type]


def test_of_distributed_training_too(net: nn.Module, parallel: Callable[[nn.Module], nn.Module]) -> None:
    assert_same(SourceModel(parallel(net)), SourceModel(net))


@pytest.mark.parametrize("memory", ["dense", "exact", "compact", "pruned"])
def test_a_compiled_part_adapts_as_the_plain_one_does(net: nn.Module, memory: str) -> None:
    method = metaopt.build_method(metaopt.load_method("tent", lr=0.01))

    def adapted(network: nn.Module) -> list[Tensor]:
        adapter = metaopt.OnlineAdapter(network, method, memory=memory)
        return [adapter(IMAGES) for _ in range(2)]

    expected = adapted(net)
    names = list(net.state_dict())
    net.layer2 = torch.compile(net.layer2)  # type: ignore[assignment]
    for found in (adapted(net), adapted(torch.compile(net))):  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)
    assert list(SourceModel(net).module.state_dict()) == names
    assert type(net.layer2).__name__ == "OptimizedModule"  # the user's own stays as it was


def test_a_policy_of_a_compiled_network_runs_on_the_plain_one(net: nn.Module) -> None:
    config = MetaTrainConfig(epochs=1, unrolls=1, steps=2, first_steps=1, batch_size=4, selection_tasks=1)
    policy = metaopt.meta_train(torch.compile(net), IMAGES, ["gaussian_blur"], config, quiet=True)  # type: ignore[arg-type]
    for network in (net, nn.DataParallel(net), nn.Sequential(Normalise(), net)):
        assert metaopt.OnlineAdapter(network, policy)(IMAGES).shape == (8, 10)


def test_what_an_outer_module_does_beside_stays(net: nn.Module) -> None:
    scaled = SourceModel(nn.Sequential(Normalise((0.5, 0.4, 0.3), (0.5, 0.5, 0.5)), net))
    assert scaled.spec == ModelSpec("resnet10t", 10, (3, 176, 176), (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
    halves = SourceModel(nn.Sequential(net, nn.Linear(10, 4)))  # timm's normalisation, and a head on top
    assert halves.spec == ModelSpec("custom:Sequential", 4, None, MEAN, STD)
    resized = SourceModel(nn.Sequential(Resize(48), Normalise(), net))
    assert resized.spec == ModelSpec("custom:Sequential", 10)
    torch.testing.assert_close(resized(IMAGES).logits, net(Normalise()(Resize(48)(IMAGES))))


def test_what_cannot_be_told_is_refused_until_it_is_given(net: nn.Module) -> None:
    traced = torch.fx.symbolic_trace(net)
    for unclear in (Standardised(net), nn.Sequential(net, nn.Linear(10, 10), timm.create_model("resnet10t")), traced):
        with pytest.raises(ModelError, match=r"SourceModel\(module, mean=\.\.\., std=\.\.\.\)"):
            SourceModel(unclear)
    with pytest.raises(ModelError, match="norm layers have become functions"):
        SourceModel(torch.fx.symbolic_trace(timm.create_model("vit_tiny_patch16_224", img_size=32)))
    found = SourceModel(traced, mean=MEAN, std=STD)
    torch.testing.assert_close(found(IMAGES).logits, SourceModel(net)(IMAGES).logits)
    assert SourceModel(Standardised(net), mean=(0,) * 3, std=(1,) * 3).num_classes == 10


def test_what_is_no_network_of_torch_is_refused(net: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and still met
        scripted = torch.jit.trace(net, IMAGES)
    with pytest.raises(ModelError, match="compiled program: give the module"):
        SourceModel(cast(nn.Module, scripted))
    with pytest.raises(ModelError, match="the model is OrderedDict"):
        SourceModel(net.state_dict())  # type: ignore[arg-type]


def test_the_trial_leaves_no_trace(net: nn.Module) -> None:
    outer = Around(net.train())
    before = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    SourceModel(outer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in outer.state_dict().items())
    assert not any(part._forward_hooks for part in outer.modules())
