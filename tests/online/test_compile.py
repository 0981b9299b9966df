"""Adapters whose network runs by torch.compile."""

import copy
import logging
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

import metaopt
from metaopt.errors import ModelError
from metaopt.models import SourceModel

BATCHES = torch.rand(3, 12, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """Small, for compiling takes a while."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def run(adapter: metaopt.OnlineAdapter) -> list[Tensor]:
    answers = [adapter(batch) for batch in BATCHES]
    with adapter.frozen():
        return [*answers, adapter(BATCHES[0]), adapter(BATCHES[1, :5])]


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def built(net: nn.Module, method: str, **settings: object) -> metaopt.AdaptationPolicy:
    made = metaopt.build_method(metaopt.load_method(method, lr=0.01, **settings))
    made.prepare(SourceModel(net), lambda: BATCHES.flatten(0, 1))
    return made


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parts"),
    [("tent", {"batch_statistics": 16, "restoration": True}), ("sar", {"batch_statistics": False})],
)
def test_answers_are_those_of_the_plain_network(net: nn.Module, method: str, parts: dict) -> None:
    policy, before = built(net, method, parts=parts), graphs()
    plain = run(metaopt.OnlineAdapter(net, policy))
    assert graphs() == before
    compiled = metaopt.OnlineAdapter(net, policy, compile=True)
    torch.testing.assert_close(run(compiled), plain, rtol=1e-5, atol=1e-5)
    assert graphs() > before
    assert list(compiled.model.state_dict()) == list(SourceModel(net).state_dict())


@pytest.mark.parametrize("memory", ["exact", "compact", "pruned"])
def test_small_memory_keeps_what_it_kept(net: nn.Module, memory: str, caplog) -> None:
    policy = built(net, "tent")
    plain = run(metaopt.OnlineAdapter(net, policy, memory=memory))
    with caplog.at_level(logging.WARNING, "metaopt"):
        compiled = metaopt.OnlineAdapter(net, policy, memory=memory, compile=True)
    assert f"memory={memory} sees each operator" in caplog.text and len(caplog.records) == 1
    torch.testing.assert_close(run(compiled), plain, rtol=1e-5, atol=1e-5)


def test_features_are_read_from_the_plain_network(net: nn.Module, caplog) -> None:
    policy = built(net, "tent", objective={"discrepancy": 1.0})
    plain = run(metaopt.OnlineAdapter(net, policy))
    with caplog.at_level(logging.WARNING, "metaopt"):
        compiled = metaopt.OnlineAdapter(net, policy, compile=True)
    assert "reads features" in caplog.text
    torch.testing.assert_close(run(compiled), plain)


def test_copies_and_pickles_compile_anew(net: nn.Module) -> None:
    model = SourceModel(net)
    expected = model(BATCHES[0]).logits
    model.compile_network()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.compiled is not None and twin.compiled.module is twin.module
        torch.testing.assert_close(twin(BATCHES[0]).logits, expected)
    assert model.skeleton().compiled is None


def test_without_a_compiler_it_is_refused(net: nn.Module) -> None:
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ModelError, match="needs a C\\+\\+ compiler and found none"),
    ):
        metaopt.OnlineAdapter(net, built(net, "tent"), compile=True)


def test_what_cannot_be_compiled_is_refused_in_one_line(net: nn.Module) -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() is None else self.head(x)

    adapter = metaopt.OnlineAdapter(Broken().double(), built(net, "tent"), compile=True)
    with pytest.raises(ModelError, match="Broken cannot be compiled") as refusal:
        adapter(BATCHES[0])
    assert "\n" not in str(refusal.value)
