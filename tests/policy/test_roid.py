"""ROID: the step against its equations in float64, and what it becomes with its knobs at their ends."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metaopt import MethodConfig, OnlineAdapter, build_method, load_method
from metaopt.errors import ConfigError

from ..tiny import assert_goes_on, batch_normalised, random_images, tiny_model

BATCHES = [random_images(8, seed, torch.float64) for seed in range(6)]
MOMENTUM, KEEP, TEMPERATURE, LR = 0.9, 0.99, 1 / 3, 1e-2


def adapter(config: MethodConfig) -> OnlineAdapter:
    return OnlineAdapter(tiny_model(dtype=torch.float64), build_method(replace(config, lr=LR)))


def likelihood_ratio(logits: Tensor) -> Tensor:
    p = logits.softmax(dim=1)
    return -(p * (p.clamp(1e-5, 1 - 1e-5).log() - (1 - p).clamp(1e-5, 1 - 1e-5).log())).sum(dim=1)


def published_weights(logits: Tensor, mean: Tensor) -> Tensor:
    """As in the released code; NaN where all samples are alike."""
    p = logits.detach().softmax(dim=1)
    diversity = 1 - functional.cosine_similarity(mean[None], p, dim=1)
    diversity = (diversity - diversity.min()) / (diversity.max() - diversity.min())
    certainty = (p * p.log()).sum(dim=1)
    certainty = (certainty - certainty.min()) / (certainty.max() - certainty.min())
    weights = (diversity * certainty / TEMPERATURE).exp()
    weights[diversity < diversity.mean()] = 0
    return weights


def test_a_stream_is_the_papers_equations() -> None:
    net = batch_normalised()
    source = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    adapted = [net.bn1.weight, net.bn1.bias, net.bn2.weight, net.bn2.bias]
    optimizer, mean = torch.optim.Adam(adapted, lr=LR), torch.full((10,), 0.1, dtype=torch.float64)
    found = adapter(load_method("roid"))
    for images in BATCHES:
        logits = net(images)
        loss = (likelihood_ratio(logits) * published_weights(logits, mean)).sum() / len(images)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * logits.detach().softmax(dim=1).mean(dim=0)
        optimizer.zero_grad()
        loss.backward()
        output = found.step(images)
        torch.testing.assert_close(output.logits, logits.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(output.loss, loss.detach(), rtol=0, atol=1e-10)
        optimizer.step()
        with torch.no_grad():
            for name, tensor in net.named_parameters():
                tensor.copy_(KEEP * tensor + (1 - KEEP) * source[name])
    torch.testing.assert_close(found.state["sample_weights"], mean, rtol=0, atol=1e-12)


def test_without_weights_and_ensembling_it_is_adam_on_the_likelihood_ratio() -> None:
    roid = load_method("roid", parts={"batch_statistics": {}, "weight_ensembling": 1.0})
    plain = MethodConfig("adam", update="adam", objective={"slr": 1.0}, parts={"batch_statistics": {}})
    first, second = adapter(roid), adapter(plain)
    for images in BATCHES:
        assert torch.equal(first(images), second(images))


def test_samples_that_are_all_alike_count_alike() -> None:
    images = BATCHES[0][:1].expand(4, -1, -1, -1)
    parts = {"batch_statistics": False, "sample_weights": {}}
    weighted, plain = (
        adapter(load_method("roid", parts=each)).step(images).loss for each in (parts, {"batch_statistics": False})
    )
    assert weighted is not None and plain is not None and torch.isfinite(weighted)
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-12)


def test_all_of_the_source_comes_back_at_momentum_0() -> None:
    found = adapter(load_method("roid", parts={"batch_statistics": {}, "weight_ensembling": {"momentum": 0.0}}))
    before = copy.deepcopy({name: tensor.detach() for name, tensor in found.parameters.items()})
    found(BATCHES[0])
    assert all(torch.equal(found.parameters[name].detach(), tensor) for name, tensor in before.items())


def test_a_saved_stream_goes_on_bit_for_bit(tmp_path) -> None:
    assert_goes_on(lambda: adapter(load_method("roid")), BATCHES, 3, tmp_path / "adaptation.pt")


def test_a_refused_batch_leaves_the_mean_prediction() -> None:
    found = adapter(load_method("roid"))
    found(BATCHES[0])
    before = found.state["sample_weights"].clone()
    found(BATCHES[1] * float("nan"))
    assert torch.equal(found.state["sample_weights"], before) and found.events["broken_images"] == 1


@pytest.mark.parametrize("parts", [{"sample_weights": -1.0}, {"weight_ensembling": 1.5}])
def test_settings_out_of_range_are_refused(parts: dict) -> None:
    with pytest.raises(ConfigError):
        MethodConfig("roid", update="adam", objective={"slr": 1.0}, parts=parts)
