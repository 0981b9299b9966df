"""What an exported network predicts: as the frozen adapter, where no batch comes in; and other programs can run it."""

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from metaopt.catalogue import load_method
from metaopt.models import ModelSpec, SourceModel
from metaopt.online import OnlineAdapter
from metaopt.policy import MethodConfig, build_method

from ..meta.cases import CLASSES, tiny_vit
from ..tiny import tiny_net
from .methods import BATCHES, METHODS, new_adapter, run


def normalised(adapter: OnlineAdapter, images: Tensor) -> Tensor:
    return (images - adapter.source.mean) / adapter.source.std


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_network_predicts_as_the_frozen_adapter(method: str) -> None:
    adapter = new_adapter(method)
    run(adapter)
    with adapter.frozen(as_exported=True) as frozen:
        expected = frozen(BATCHES[2])
        assert torch.equal(adapter(BATCHES[2]), expected)
    with torch.no_grad():
        found = adapter.export_model()(normalised(adapter, BATCHES[2]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    each = torch.cat([frozen(image[None]) for image in BATCHES[2]])  # no batch comes in
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_those_of_source_and_stream() -> None:
    adapter = OnlineAdapter(SourceModel(tiny_net()), build_method(MethodConfig("bn", parts={"batch_statistics": 12})))
    net = copy.deepcopy(tiny_net())
    seen: list[Tensor] = []
    net.bn1.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].detach()))
    net.eval()
    for images in BATCHES[:3]:
        adapter(images)
        net(normalised(adapter, images))
    x = torch.cat(seen)
    moments = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
    weights = adapter.export()
    for name, stream in (("running_mean", moments[0]), ("running_var", moments[1])):
        source = tiny_net().state_dict()[f"bn1.{name}"]
        torch.testing.assert_close(weights[f"bn1.{name}"], (12 * source + 24 * stream) / 36, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        adapter.source.module.state_dict()["bn1.running_mean"], tiny_net().state_dict()["bn1.running_mean"]
    )


def test_what_cannot_be_exported_is_said() -> None:
    adapter = new_adapter("default")
    assert any("no batch was met" in words for words in adapter.not_exported)
    adapter(BATCHES[0])
    said = " ".join(adapter.not_exported)
    assert "each batch's own statistics" in said and "class_skew" in said
    assert new_adapter("source").not_exported == ()


@pytest.mark.parametrize("net", ["convolutional", "transformer"])
def test_torch_export_and_onnx_run_it(net: str, tmp_path: Path) -> None:
    if net == "convolutional":
        adapter = new_adapter("default")
    else:
        method = load_method("tent", lr=0.01)
        adapter = OnlineAdapter(
            SourceModel(tiny_vit().module.float(), spec=ModelSpec("custom:vit", CLASSES)), build_method(method)
        )
    side = 8 if net == "transformer" else 16
    batches = [images[..., :side, :side] for images in BATCHES[:3]]
    run(adapter, batches)
    inputs = normalised(adapter, batches[2])
    with adapter.frozen(as_exported=True) as frozen:
        expected = frozen(batches[2])
    model = adapter.export_model()
    program = torch.export.export(model, (inputs,))
    torch.testing.assert_close(program.module()(inputs), expected, rtol=1e-4, atol=1e-4)
    torch.onnx.export(model, (inputs,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
