"""EATA: the step against its equations in float64, and what it becomes with its knobs off."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from metaopt import MethodConfig, OnlineAdapter, SourceModel, build_method, load_method
from metaopt.errors import ConfigError

from ..tiny import CLASSES, assert_goes_on, batch_normalised, entropies, random_images, tiny_model, tiny_net

BATCHES = [random_images(12, seed, torch.float64) for seed in range(6)]
CLEAN = random_images(24, 50, torch.float64)
LR, MARGIN, SIMILARITY, WEIGHT = 1e-2, 0.95, 0.93, 3.0
FILTER = {"margin": MARGIN, "similarity": SIMILARITY}
PARTS = {"batch_statistics": {}, "sample_filter": FILTER, "fisher": {"weight": WEIGHT}}


def model() -> SourceModel:
    return tiny_model(dtype=torch.float64)


def adapter(config: MethodConfig) -> OnlineAdapter:
    method = build_method(replace(config, lr=LR))
    method.prepare(model(), lambda: CLEAN, 12)
    return OnlineAdapter(model(), method)


def adapted(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in net.named_parameters() if name.startswith("bn")}


def published_fisher() -> dict[str, Tensor]:
    net, found = batch_normalised(), dict[str, Tensor]()
    for images in CLEAN.split(12):
        net.zero_grad()
        logits = net(images)
        functional.cross_entropy(logits, logits.argmax(dim=1)).backward()
        for name, tensor in adapted(net).items():
            assert tensor.grad is not None
            found[name] = found.get(name, 0) + tensor.grad.square() / 2
    return found


def test_a_stream_is_the_papers_equations() -> None:
    net, fisher, mean = batch_normalised(), published_fisher(), None
    source = {name: tensor.detach().clone() for name, tensor in adapted(net).items()}
    optimizer = torch.optim.SGD(adapted(net).values(), lr=LR, momentum=0.9)
    found, passed = adapter(load_method("eata", parts=PARTS)), []
    threshold = MARGIN * math.log(CLASSES)
    for images in BATCHES:
        logits = net(images)
        p, entropy = logits.detach().softmax(dim=1), entropies(logits)
        counts = entropy < threshold
        if mean is not None:
            counts &= functional.cosine_similarity(mean[None], p, dim=1).abs() < SIMILARITY
        passed.append(int(counts.sum()))
        loss = (entropy[counts] * (threshold - entropy[counts].detach()).exp()).mean()
        held = [(fisher[n] * (t - source[n]).square()).sum() for n, t in adapted(net).items()]
        loss = loss + WEIGHT * torch.stack(held).sum()
        now = p[counts].mean(dim=0)
        mean = now if mean is None else 0.9 * mean + 0.1 * now
        torch.testing.assert_close(found(images), logits.detach(), rtol=0, atol=1e-10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(passed) > 0 and sum(passed) < 12 * len(BATCHES) - 6  # the filters let some pass, not all
    torch.testing.assert_close(found.state["sample_filter"], mean, rtol=0, atol=1e-12)
    for name, tensor in adapted(net).items():
        torch.testing.assert_close(found.parameters[f"module.{name}"].detach(), tensor.detach(), rtol=0, atol=1e-10)


def test_without_the_second_filter_and_fisher_it_descends_filtered_entropy() -> None:
    parts = {"batch_statistics": {}, "sample_filter": {"similarity": None}}
    configs = (
        load_method("eata", parts=parts, lr=LR),
        MethodConfig("plain", update="sgd", lr=LR, objective={"filtered": 1.0}, parts={"batch_statistics": {}}),
    )
    net = tiny_net(dtype=torch.float64)
    net.linear.weight.data *= 20  # so that some predictions pass the published margin
    first, second = (OnlineAdapter(SourceModel(net), build_method(config)) for config in configs)
    for images in BATCHES:
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=1e-12)
    assert first.updates == len(BATCHES)


def test_a_batch_without_a_reliable_sample_changes_nothing() -> None:
    found = adapter(load_method("eata", parts={**PARTS, "sample_filter": {"margin": 1e-9}}))
    before = {name: tensor.detach().clone() for name, tensor in found.parameters.items()}
    found(BATCHES[0])
    assert all(torch.equal(tensor.detach(), before[name]) for name, tensor in found.parameters.items())
    assert (found.steps, found.updates, found.events["refused"]) == (1, 0, 1)
    assert found.state["sample_filter"].numel() == 0


def test_a_saved_stream_goes_on_bit_for_bit(tmp_path) -> None:
    assert_goes_on(lambda: adapter(load_method("eata", parts=PARTS)), BATCHES, 3, tmp_path / "adaptation.pt")


def test_without_clean_images_it_says_what_it_needs() -> None:
    found = OnlineAdapter(model(), build_method(load_method("eata")))
    with pytest.raises(ConfigError, match=r"needs clean unlabeled images: set source\.images=PATH"):
        found(BATCHES[0])


@pytest.mark.parametrize("parts", [{"sample_filter": {"margin": 1.5}}, {"fisher": -1.0}])
def test_settings_out_of_range_are_refused(parts: dict) -> None:
    with pytest.raises(ConfigError, match="; allowed "):
        MethodConfig("eata", update="sgd", objective={"entropy": 1.0}, parts=parts)
