"""Experts come and go without a trace, and travel with their model."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaopt.errors import ModelError
from metaopt.experts import (
    Experts,
    ExpertsConfig,
    attach_experts,
    detach_experts,
    expert_layout,
    get_experts,
)
from metaopt.models import SourceModel
from metaopt.parameters import adapted_layout
from tests.experts.families import FAMILIES, build, stir


@torch.no_grad()
def logits(model: SourceModel, images: Tensor, **settings: Any) -> Tensor:
    return model(images, **settings).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("reads", ["mlp_input", "residual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_comes_and_goes_without_a_trace(family: str, reads: str) -> None:
    model, images = build(family)
    before, modules, names = logits(model, images), list(model.named_modules()), list(model.state_dict())
    backbone, digest = {k: v.clone() for k, v in model.module.state_dict().items()}, model.weights_sha256()

    experts = attach_experts(model, ExpertsConfig(reads=reads))
    assert len(experts.sites) == FAMILIES[family][3]
    assert torch.equal(logits(model, images), before)
    assert torch.equal(
        logits(model, images, batch_statistics=True), logits(build(family)[0], images, batch_statistics=True)
    )
    assert list(model.module.state_dict()) == list(backbone)
    assert model.weights_sha256() == digest

    stir(experts)
    changed = logits(model, images)
    assert float((changed - before).abs().max()) > 1e-3
    with experts.bypassed():
        assert torch.equal(logits(model, images), before)
    assert torch.equal(logits(model, images), changed)

    assert detach_experts(model) is experts
    assert torch.equal(logits(model, images), before)
    assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert list(model.state_dict()) == names and hooks(model) == 0
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.module.state_dict().items())


def test_beside_an_mlp_they_see_its_input_or_the_residual_stream() -> None:
    for reads in ("mlp_input", "residual"):
        model, images = build("vit", torch.float64)
        stir(attach_experts(model, ExpertsConfig(reads=reads)))
        seen: dict[str, Tensor] = {}
        block: Any = model.module.get_submodule("blocks.0")
        block.norm2.register_forward_hook(
            lambda _m, inputs, output, seen=seen: seen.update(residual=inputs[0], mlp_input=output)
        )
        block.register_forward_hook(lambda _m, _i, output, seen=seen: seen.update(output=output))
        logits(model, images)
        with torch.no_grad(), get_experts(model).bypassed():
            added = get_experts(model).get_submodule("blocks/0/mlp")(seen[reads])
            expected = seen["residual"] + block.mlp(seen["mlp_input"]) + added
        torch.testing.assert_close(seen["output"], expected)


def test_after_a_stage_they_are_1x1_convolutions() -> None:
    model, images = build("cifar_resnet", torch.float64)
    config = ExpertsConfig(sdd=False, dag=False, asg=False)
    experts = stir(attach_experts(model, config))
    seen: dict[str, Tensor] = {}

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen["after"] = output

    model.module.get_submodule("layer1").register_forward_hook(record)
    model.module.get_submodule("layer2.0.conv1").register_forward_hook(lambda _m, i, _o: seen.update(next=i[0]))
    with get_experts(model).bypassed():
        logits(model, images)
        stage = seen["after"]
    logits(model, images)
    made: Any = experts.get_submodule("layer1")
    maps = nn.functional.conv2d(stage, made.down_weight.flatten(0, 1)[..., None, None], made.down_bias.flatten()).relu()
    up = made.up_weight.transpose(0, 1).flatten(1)[..., None, None]
    added = nn.functional.conv2d(maps, up, made.up_bias.sum(0)) * (0.8 / 4)
    torch.testing.assert_close(seen["next"], (stage + added).detach())


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_carry_their_own_experts(travel: Any) -> None:
    model, images = build("vit")
    experts = stir(attach_experts(model, ExpertsConfig(reads="residual")))
    before = logits(model, images)
    other = travel(model)
    assert torch.equal(logits(other, images), before)
    stir(get_experts(other))
    assert torch.equal(logits(model, images), before)
    assert not torch.equal(logits(other, images), before)
    detach_experts(other)
    assert hooks(other) == 0 and get_experts(model) is experts
    assert torch.equal(logits(model, images), before)
    attach_experts(other, ExpertsConfig())


def test_functional_call_swaps_their_tensors() -> None:
    model, images = build("vit")
    attach_experts(model, ExpertsConfig())
    layout = expert_layout(model)
    parameters = {
        name: torch.randn_like(tensor).mul(0.3).requires_grad_() for name, tensor in layout.take(model).items()
    }
    before = logits(model, images)
    swapped = functional_call(model, parameters, (images,)).logits
    gradients = torch.autograd.grad(swapped.square().sum(), list(parameters.values()), allow_unused=True)
    reached = {tensor.kind for tensor, gradient in zip(layout.tensors, gradients, strict=True) if gradient is not None}
    assert {t.kind for t in layout.tensors} - reached == {"asg.weight", "asg.bias"}  # hard dropout
    assert torch.equal(logits(model, images), before)
    model.load_state_dict({**model.state_dict(), **{name: tensor.detach() for name, tensor in parameters.items()}})
    torch.testing.assert_close(logits(model, images), swapped.detach())


def test_layout_goes_beside_that_of_the_norm_layers() -> None:
    model, _ = build("vit")
    norms = adapted_layout(model)
    attach_experts(model, ExpertsConfig())
    assert adapted_layout(model) == norms
    layout = expert_layout(model, gates=False)
    assert layout.names[:4] == tuple(
        f"experts.blocks/0/mlp.{role}" for role in ("down_weight", "down_bias", "up_weight", "up_bias")
    )
    assert {tensor.depth for tensor in layout.tensors} == {0.0, 1.0}
    assert {tensor.kind for tensor in expert_layout(model, experts=False).tensors} == {
        "dag.weight",
        "dag.bias",
        "asg.weight",
        "asg.bias",
    }
    assert layout.take(model)["experts.blocks/1/mlp.up_bias"].shape == (4, 24)


def test_first_values_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    made = [attach_experts(build("vit")[0], ExpertsConfig(), seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["blocks/0/mlp.down_weight"], made[2]["blocks/0/mlp.down_weight"])


def test_dropout_for_meta_training_predicts_the_same_or_softly_and_has_all_gradients() -> None:
    found = {}
    for dropout in ("hard", "soft", "straight_through"):
        model, images = build("vit")
        experts = attach_experts(model, ExpertsConfig(dropout=dropout, temperature=0.5))
        torch.manual_seed(0)
        stir(experts)
        found[dropout] = logits(model, images)
    assert not torch.equal(found["soft"], found["hard"])
    assert torch.equal(found["straight_through"], found["hard"])
    model(images).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


@pytest.mark.parametrize("family", ["vit", "convnext", "cifar_resnet"])
def test_runs_under_autocast_and_in_half_precision(family: str) -> None:
    model, images = build(family)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(images).logits
        stir(attach_experts(model, ExpertsConfig()), lambda _tensor: 0.02)
        after = model(images).logits
    assert after.dtype == before.dtype
    torch.testing.assert_close(after.float(), before.float(), rtol=0.5, atol=0.5)
    assert logits(model.bfloat16(), images.bfloat16()).dtype == torch.bfloat16


def test_channels_last_gives_the_same_and_stays() -> None:
    results = []
    for channels_last in (False, True):
        model, images = build("cifar_resnet", torch.float64, channels_last)
        stage = model.module.get_submodule("layer2")
        formats: list[bool] = []
        torch.manual_seed(0)
        stir(attach_experts(model, ExpertsConfig()))

        def note(_module: nn.Module, _inputs: Any, output: Tensor, formats: list[bool] = formats) -> None:
            formats.append(output.is_contiguous(memory_format=torch.channels_last))

        stage.register_forward_hook(note)
        results.append(logits(model, images))
        assert formats == [channels_last]
    torch.testing.assert_close(results[0], results[1])


def test_a_predicate_chooses_the_sites() -> None:
    model, images = build("vit")
    experts = attach_experts(model, ExpertsConfig(), lambda name, _m: "after" if name == "blocks.1" else None)
    assert [(site.name, site.placement, site.width, site.axis) for site in experts.sites] == [
        ("blocks.1", "after", 24, -1)
    ]
    stir(experts)
    assert logits(model, images).shape == (2, 7)


class Plain(nn.Module):
    """No module with a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.idle = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, r"Plain has no module for experts; allowed are those a predicate names"),
        ({"linear": "beside"}, r"cannot go beside 'linear', which gives torch\.Size\(\[1, 4\]\)"),
        ({"conv": "beside"}, r"cannot go beside 'conv', which turns \(1, 3, 64, 64\) into \(1, 4, 62, 62\)"),
        ({"idle": "after"}, r"cannot go after 'idle', which gives NoneType"),
        ({"conv": "inside"}, r"the predicate answers 'inside' for 'conv'"),
    ],
)
def test_modules_that_cannot_have_experts(answers: dict[str, str], message: str) -> None:
    model = SourceModel(Plain())
    predicate = (lambda name, _m: answers.get(name)) if answers else None
    with pytest.raises(ModelError, match=message):
        attach_experts(model, ExpertsConfig(), predicate)
    assert hooks(model) == 0 and not hasattr(model, "experts")


def test_experts_are_attached_once_and_detached_once() -> None:
    model, _ = build("vit")
    with pytest.raises(ModelError, match="has no experts; allowed are models with: call attach_experts first"):
        detach_experts(model)
    assert isinstance(attach_experts(model, ExpertsConfig()), Experts)
    with pytest.raises(ModelError, match="has experts already; allowed is one set: call detach_experts"):
        attach_experts(model, ExpertsConfig())
