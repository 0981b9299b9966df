"""Compositions: each method is what its name says, by independent computations."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from metaopt.errors import ConfigError
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.online import OnlineAdapter
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator
from metaopt.optimizers.sgd import SGD
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method, new_policy

from ..tiny import BARE, TinyNet, random_images, statistics_of, tiny_model, tiny_net, tiny_policy

TENT = MethodConfig("tent", update="adam", lr=1e-2, objective={"entropy": 1.0}, parts=dict(BARE))
BATCHES = [random_images(12, seed, torch.float64) for seed in range(6)]


def batch_normalised(net: TinyNet) -> TinyNet:
    """The same network, in torch's own training mode: BatchNorm by the batch."""
    return copy.deepcopy(net).train()


def norm_tensors(net: TinyNet) -> list[torch.nn.Parameter]:
    return [net.bn1.weight, net.bn1.bias, net.bn2.weight, net.bn2.bias]


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def descend(net: TinyNet, optimizer: torch.optim.Optimizer, loss_of: object, count: int = 5) -> list[Tensor]:
    """Predict, then one step of torch's optimizer, on each of the first batches: the logits."""
    logits = []
    for images in BATCHES[:count]:
        output = net(images)
        logits.append(output.detach())
        optimizer.zero_grad()
        loss_of(output).backward()  # type: ignore[operator]
        optimizer.step()
    return logits


def test_source_is_the_model_in_eval() -> None:
    net = tiny_net(dtype=torch.float64)
    method = build_method(MethodConfig("source"))
    adapter = OnlineAdapter(net, method)
    plain = tiny_net(dtype=torch.float64).eval()
    for images in BATCHES:
        assert torch.equal(adapter(images), plain(images))
    assert not method.updates and adapter.updates == 0


def test_bn_is_the_model_under_batch_statistics() -> None:
    adapter = OnlineAdapter(tiny_net(dtype=torch.float64), build_method(MethodConfig("bn", parts=dict(BARE))))
    reference = batch_normalised(tiny_net(dtype=torch.float64))
    for images in BATCHES:
        expected = reference(images)
        torch.testing.assert_close(adapter(images), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, tiny_net(dtype=torch.float64)(BATCHES[-1]))


@pytest.mark.parametrize(
    ("update", "optimizer"),
    [
        ("adam", lambda tensors: torch.optim.Adam(tensors, lr=1e-2)),
        ("sgd", lambda tensors: torch.optim.SGD(tensors, lr=1e-2, momentum=0.9)),
    ],
)
def test_tent_is_torchs_optimizer_on_the_entropy(update: str, optimizer) -> None:
    config = replace(TENT, update=update)
    adapter = OnlineAdapter(tiny_net(dtype=torch.float64), build_method(config))
    reference = batch_normalised(tiny_net(dtype=torch.float64))
    expected = descend(reference, optimizer(norm_tensors(reference)), entropy)
    for images, logits in zip(BATCHES[:5], expected, strict=True):
        torch.testing.assert_close(adapter(images), logits, rtol=0, atol=1e-10)
    for tensor, trained, start in zip(
        adapter.parameters.values(),
        norm_tensors(reference),
        norm_tensors(tiny_net(dtype=torch.float64)),
        strict=True,
    ):
        torch.testing.assert_close(tensor.detach(), trained.detach(), rtol=0, atol=1e-10)
        assert (tensor.detach() - start.detach()).abs().max() > 1e-3


def test_adam_descends_the_policys_objective_with_its_learned_weights() -> None:
    model = tiny_model(dtype=torch.float64)
    policy = tiny_policy(model, objective={"slr": 1.0, "diversity": 0.5})
    config = replace(TENT, name="adam", objective={"entropy": 3.0}, objective_from_policy=True)
    adapter = OnlineAdapter(model, build_method(config, policy=policy))
    assert policy.objective is not None
    weights = {name: float(weight.detach()) for name, weight in policy.objective.weights().items()}
    assert abs(weights["slr"] - 1.0) > 1e-3

    def objective(logits: Tensor) -> Tensor:
        p = logits.softmax(dim=1).clamp(1e-5, 1 - 1e-5)
        ratio = -(logits.softmax(dim=1) * (p.log() - (1 - p).log())).sum(dim=1).mean()
        mean = logits.softmax(dim=1).mean(dim=0)
        return weights["slr"] * ratio + weights["diversity"] * (mean * mean.log()).sum()

    reference = batch_normalised(tiny_net(dtype=torch.float64))
    expected = descend(reference, torch.optim.Adam(norm_tensors(reference), lr=1e-2), objective)
    for images, logits in zip(BATCHES[:5], expected, strict=True):
        torch.testing.assert_close(adapter(images), logits, rtol=0, atol=1e-10)


def test_a_generator_at_its_start_is_adam() -> None:
    model = tiny_model(dtype=torch.float64)
    config = GeneratorConfig(lr=1e-2, clamp=1e6)
    policy = new_policy(model, config, {"entropy": 1.0}, BARE, learned_objective=False).to(torch.float64)
    adapter = OnlineAdapter(model, policy)
    reference = batch_normalised(tiny_net(dtype=torch.float64))
    optimizer = torch.optim.Adam(norm_tensors(reference), lr=1e-2, betas=(0.9, 0.99))
    for images, logits in zip(BATCHES[:5], descend(reference, optimizer, entropy), strict=True):
        torch.testing.assert_close(adapter(images), logits, rtol=0, atol=1e-10)


def test_another_rate_scales_the_generator_and_nothing_else() -> None:
    policy = tiny_policy(tiny_model())
    same = build_method(MethodConfig("policy", update="generator"), policy=policy)
    assert same.rule is policy.rule and same.objective is policy.objective
    faster = build_method(MethodConfig("policy", update="generator", lr=0.05), policy=policy)
    assert isinstance(faster.rule, GradientGenerator) and isinstance(policy.rule, GradientGenerator)
    assert (faster.rule.config.lr, policy.rule.config.lr) == (0.05, GeneratorConfig().lr)
    for name, tensor in policy.rule.state_dict().items():
        assert torch.equal(faster.rule.state_dict()[name], tensor)
    assert faster.source == policy.source and faster.objective is policy.objective


LEARNED: dict[str, Any] = {"pruning": "learned", "initialization": {"lr": 0.2}, "update_gate": {"share": 0.5}}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*LEARNED.items(), *((name, each) for name in LEARNED for each in ({}, True)), ("initialization", 0.2)],
)
def test_a_part_that_only_training_learns_is_the_policys_under_the_same_settings(name: str, settings: object) -> None:
    policy = tiny_policy(tiny_model(), parts={**BARE, name: LEARNED[name]})
    for inherit in (True, False):
        config = MethodConfig("policy", update="generator", parts={name: settings}, inherit=inherit)
        if name != "pruning" or settings == "learned":  # the defaults of pruning are those of one that is not learned
            assert build_method(config, policy=policy).part(name) is policy.part(name)
    if settings is True:
        found = build_method(config, policy=tiny_policy(tiny_model())).part(name)
        assert found is None or name == "pruning"


@pytest.mark.parametrize(
    ("name", "settings", "setting"),
    [
        ("initialization", 0.1, "lr"),
        ("initialization", {"decay": 1.0}, "decay"),
        ("update_gate", {"share": 0.3}, "share"),
    ],
)
def test_settings_other_than_those_that_a_part_was_learned_with_are_refused(
    name: str, settings: object, setting: str
) -> None:
    policy = tiny_policy(tiny_model(), parts={**BARE, name: LEARNED[name]})
    config = MethodConfig("policy", update="generator", parts={name: settings}, inherit=True)
    words = rf"method.parts.{name}.{setting} is [\d.]+ and the policy has learned .* set method.parts.{name}=true"
    with pytest.raises(ConfigError, match=words):
        build_method(config, policy=policy)


@pytest.mark.parametrize("name", LEARNED)
def test_settings_of_a_part_that_the_policy_has_not_learned_are_refused(name: str) -> None:
    config = MethodConfig("policy", update="generator", parts={name: LEARNED[name]}, inherit=True)
    with pytest.raises(ConfigError, match=rf"method.parts.{name} is .* and the policy has not learned it; allowed"):
        build_method(config, policy=tiny_policy(tiny_model()))


def test_rates_default_to_the_rules_own() -> None:
    for update, rule in (("adam", Adam()), ("sgd", SGD())):
        assert build_method(MethodConfig("m", update=update, objective={"entropy": 1.0})).rule == rule


def test_an_objective_given_wins_over_the_policys_unless_asked() -> None:
    policy = tiny_policy(tiny_model())
    own = MethodConfig("mgtta", update="generator", objective={"entropy": 1.0, "discrepancy": 0.4, "slr": 0.0})
    method = build_method(own, policy=policy)
    assert method.objective is not None and list(method.objective.weights()) == ["entropy", "discrepancy"]
    # The policy's statistics of the source serve any objective.
    torch.testing.assert_close(statistics_of(method), statistics_of(policy), rtol=0, atol=0)
    assert build_method(MethodConfig("adam", update="adam"), policy=policy).objective is policy.objective
    none = MethodConfig("policy", update="generator", objective={"entropy": 0.0, "slr": 0.0})
    assert build_method(none, policy=policy).objective is policy.objective


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"method.update is 'adamw'; allowed are none, adam, sgd, .*generator"):
        MethodConfig("m", update="adamw")
    for lr in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="must be positive and finite"):
            MethodConfig("m", update="adam", lr=lr)
    with pytest.raises(ConfigError, match="needs a meta-trained policy and got none"):
        build_method(MethodConfig("policy", update="generator", objective={"entropy": 1.0}))
    with pytest.raises(ConfigError, match="needs a meta-trained policy"):
        build_method(MethodConfig("policy", update="generator"), policy=build_method(TENT))
    wrong: list[dict[str, Any]] = [{"parts": None}, {"parts": ["teacher"]}, {"objective": "slr"}, {"rule": 3}]
    for settings in wrong:
        with pytest.raises(ConfigError, match=rf"method\.{next(iter(settings))} is .*; it takes a mapping of settings"):
            MethodConfig("m", update="adam", **settings)
    words: list[dict[str, Any]] = [{"lr": "fast"}, {"lr": True}, {"objective": {"entropy": "much"}}]
    for settings in words:
        with pytest.raises(ConfigError, match=rf"method\.{next(iter(settings))}.* is (fast|True|much); .*: set"):
            MethodConfig("m", update="adam", **settings)
    for objective in ({}, {"entropy": 0.0}):
        with pytest.raises(ConfigError, match="has no objective"):
            build_method(MethodConfig("tent", update="adam", objective=objective))
    with pytest.raises(ConfigError, match="unknown objective term 'entrpy'"):
        MethodConfig("tent", update="adam", objective={"entropy": 1.0, "entrpy": 0.0})
    with pytest.raises(ConfigError, match="has the objective's term teacher and no teacher"):
        build_method(MethodConfig("tent", update="adam", objective={"teacher": 1.0}))
    with pytest.raises(ConfigError, match="has the objective's term teacher and no teacher"):
        new_policy(tiny_model(), objective={"teacher": 1.0})
    with pytest.raises(ConfigError, match=r"method.rule does not go with update=generator; allowed are adam, sgd"):
        MethodConfig("policy", update="generator", rule={"betas": [0.9, 0.99]})
    with pytest.raises(ValueError, match="learns from a teacher needs a part that is one"):
        AdaptationPolicy("taught", WeightedObjective({"teacher": 1.0}), Adam())
    with pytest.raises(ValueError, match="needs an update rule"):
        AdaptationPolicy("half", rule=Adam())


@pytest.mark.parametrize("adapts", ["all", "experts_norm"])
def test_a_generator_adapts_what_it_was_trained_on(adapts: str) -> None:
    parts = {"experts": True} if adapts == "experts_norm" else {}
    config = MethodConfig("policy", update="generator", adapts=adapts, parts=parts)
    with pytest.raises(ConfigError, match=rf"method.adapts is '{adapts}' and the policy was trained on norm; .*leave"):
        build_method(config, policy=tiny_policy(tiny_model()))


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "policy by name": (lambda: OnlineAdapter(tiny_model(), "tent"), r"policy is 'tent'; .*load_method\('tent'\)"),  # type: ignore[arg-type]
    "configuration": (lambda: OnlineAdapter(tiny_model(), TENT), r"policy is a MethodConfig; .*build_method"),  # type: ignore[arg-type]
    "model by name": (lambda: OnlineAdapter("resnet", build_method(TENT)), "model is 'resnet'; .*Module"),  # type: ignore[arg-type]
    "parts": (lambda: new_policy(tiny_model(), parts="x"), "parts is 'x'; .*mapping"),  # type: ignore[arg-type]
    "objective": (lambda: new_policy(tiny_model(), objective="x"), "objective is 'x'; .*mapping"),  # type: ignore[arg-type]
    "generator": (lambda: new_policy(tiny_model(), "published"), "generator is 'published'; .*GeneratorConfig"),  # type: ignore[arg-type]
    "no source model": (lambda: new_policy(tiny_net()), "model is a TinyNet; .*SourceModel"),  # type: ignore[arg-type]
    "seed": (lambda: new_policy(tiny_model(), seed="x"), "seed is x; allowed"),  # type: ignore[arg-type]
    "method": (lambda: build_method("tent"), r"config is 'tent'; .*load_method\('tent'\)"),  # type: ignore[arg-type]
    "path": (lambda: build_method(TENT, policy="ckpt.pt"), r"policy is 'ckpt.pt'; .*AdaptationPolicy.load"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_of_another_kind_gets_one_line(wrong: str) -> None:
    call, words = WRONG[wrong]
    with pytest.raises(ConfigError, match=f"^{words}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_new_policies_are_drawn_from_their_seed_alone() -> None:
    model = tiny_model()

    def draw(seed: int) -> Tensor:
        policy = new_policy(model, objective={"entropy": 1.0}, seed=seed)
        return torch.cat([tensor.detach().flatten() for tensor in policy.parameters()])

    before = torch.random.get_rng_state()
    first = draw(0)
    torch.rand(3)
    assert torch.equal(first, draw(0)) and not torch.equal(first, draw(1))
    torch.random.set_rng_state(before)
    draw(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_moving_a_policy_moves_its_statistics() -> None:
    policy = tiny_policy(tiny_model()).to(torch.float64)
    statistics = statistics_of(policy)
    assert statistics is not None
    assert {tensor.dtype for tensor in (*statistics.mean, *statistics.std)} == {torch.float64}


def test_a_layer_norm_model_adapts_too() -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = torch.nn.Linear(768, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(x.flatten(1))))

    torch.manual_seed(0)
    module = Normed().double()
    reference = copy.deepcopy(module)
    adapter = OnlineAdapter(SourceModel(module), build_method(TENT))
    optimizer = torch.optim.Adam([reference.norm.weight, reference.norm.bias], lr=1e-2)
    for images in BATCHES:
        logits = reference(images)
        torch.testing.assert_close(adapter(images), logits.detach(), rtol=0, atol=1e-10)
        optimizer.zero_grad()
        functional.cross_entropy(logits, logits.softmax(dim=1)).sub(
            functional.kl_div(logits.log_softmax(dim=1), logits.softmax(dim=1), reduction="batchmean")
        ).backward()
        optimizer.step()
