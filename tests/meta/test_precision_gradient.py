"""How unrolls answer for learned precisions: gradients at each against autograd's, and what reaches the head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d, LayerNormAct2d  # type: ignore[attr-defined]
from torch import nn

from metaopt.activation_memory import LayerTable, LearnedPrecision, Precision, Profile, SavedActivations
from metaopt.activation_memory.importance import learning_layers
from metaopt.errors import ConfigError
from metaopt.meta import MetaTrainConfig, MetaTrainer
from metaopt.meta.loss import build_meta_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.precision_gradient import BudgetTask, PrecisionProbe, Spoiled
from metaopt.meta.selection import selection_loss
from metaopt.meta.unroll import MetaBatch, UnrollConfig
from metaopt.models import SourceModel, load_source_model
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import adapted_layout, detached
from metaopt.policy import AdaptationPolicy, MethodConfig, build_method
from metaopt.policy.parts.pruning import LEARNED, Pruning, PruningConfig
from metaopt.policy.step import loss_of as loss_from
from metaopt.policy.untrained import DEFAULT_PARTS
from metaopt.policy.without_step import evaluate_on

from ..tiny import random_images, tiny_config, tiny_model, tiny_policy

MODEL = tiny_model().requires_grad_(False)
IMAGES = random_images(32, 1)
OWN = {name: tensor.detach() for name, tensor in adapted_layout(MODEL).take(MODEL).items()}


def setting():
    policy, leaves = tiny_policy(MODEL), detached(OWN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.parts["pruning"] = Pruning(PruningConfig(LEARNED))

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        loss = evaluate_on(policy, MODEL, leaves, images).loss
        assert loss is not None
        return loss

    return policy, leaves, loss_of, Profile(MODEL, loss_of, leaves, IMAGES).table(len(IMAGES))


def head_of(policy: AdaptationPolicy) -> LearnedPrecision:
    head = policy.part("pruning").allocation
    assert isinstance(head, LearnedPrecision)
    return head


def kept_at(table: LayerTable, precision: Precision) -> torch.Tensor:
    choices = torch.zeros(len(table.layers), len(table.menu))
    choices[:, table.menu.index(precision)] = 1.0
    return choices


def spoiled_by(choices: torch.Tensor, table: LayerTable, leaves, loss_of) -> tuple[dict[str, torch.Tensor], Spoiled]:
    """The exact gradients, and what the choices do to them."""
    probe = PrecisionProbe(MODEL, learning_layers(leaves))
    with probe.watching():
        loss = loss_of(IMAGES)
    errors = probe.errors(loss, table, leaves)
    exact = gradients_of(loss, leaves)
    return exact, Spoiled.by(choices, table, errors, learning_layers(leaves), exact)


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_the_last_layers_gradient_is_the_engines(bits: int) -> None:
    """No coarser layer lies behind it, so nothing is left out."""
    _, leaves, loss_of, table = setting()
    exact, spoiled = spoiled_by(kept_at(table, Precision(bits)), table, leaves, loss_of)
    found = spoiled.correction
    with SavedActivations(MODEL, memory="pruned", default=Precision(bits)):
        coded = gradients_of(loss_of(IMAGES), leaves)
    name = "module.bn2.weight"
    torch.testing.assert_close(exact[name] + found[name], coded[name], rtol=1e-3, atol=2e-5)
    assert bool((found[name] != 0).any()) == (bits < 32)
    assert not bool((found["module.bn2.bias"] != 0).any())
    error = (coded[name] - exact[name]).square().sum() / exact[name].square().sum()
    torch.testing.assert_close(spoiled.noise[name], error, rtol=1e-2, atol=1e-6)


class OneNorm(nn.Module):
    """A single norm layer, behind which nothing is kept in a code."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 12, 3, padding=1), norm(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("norm", [BatchNormAct2d, LayerNormAct2d, LayerNorm2d, GroupNormAct, nn.BatchNorm2d])
@pytest.mark.parametrize("side", [12, 8])  # 12: maps as wide as they have channels
def test_layers_over_maps_and_with_activations_are_met_as_they_compute(norm, side: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_groups": 3} if norm is GroupNormAct else {}
    model = SourceModel(OneNorm(lambda width: norm(width, **options)))
    with torch.no_grad():
        for tensor in model.module.norm.parameters():  # type: ignore[union-attr]
            tensor.add_(0.3 * torch.randn(tensor.shape))
    images = torch.rand(16, 3, side, side)
    policy = build_method(MethodConfig("tent", update="adam", objective={"entropy": 1.0}))
    leaves = detached(adapted_layout(model).take(model))

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return loss_from(evaluate_on(policy, model, leaves, batch))

    probe, name = PrecisionProbe(model, learning_layers(leaves)), "module.norm.weight"
    with probe.watching():
        loss = loss_of(images)
    (layer,) = probe.layers["module.norm"]
    (delta,) = torch.autograd.grad(loss, [layer.output], retain_graph=True)
    exact = gradients_of(loss, leaves, retain_graph=True)[name]
    torch.testing.assert_close(layer.weight_gradient(delta, layer.normalised, exact.shape), exact, rtol=1e-4, atol=1e-7)
    assert torch.equal(loss, loss_of(images))  # as without the probe
    table = Profile(model, loss_of, leaves, images).table(len(images))
    errors = probe.errors(loss, table, leaves)["module.norm"]
    assert not bool(errors[table.menu.index(Precision())].any())
    assert bool(torch.isfinite(errors).all()) and bool(errors[table.menu.index(Precision(2))].any())


@pytest.mark.slow
def test_precisions_are_learned_on_the_transformer_of_the_digits() -> None:
    model = load_source_model("digits_vit")
    config = tiny_config(parts={**DEFAULT_PARTS, "pruning": LEARNED}, steps=1, first_steps=1, epochs=1, unrolls=1)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    policy = MetaTrainer(model, images, ["gaussian_blur"], config).run()
    assert isinstance(policy.part("pruning").allocation, LearnedPrecision)


def test_noise_counts_by_what_the_layer_is_moved() -> None:
    _, leaves, loss_of, table = setting()
    _, spoiled = spoiled_by(kept_at(table, Precision(2)), table, leaves, loss_of)
    one, two = "module.bn1.weight", "module.bn2.weight"
    assert set(spoiled.noise) == {one, two} and spoiled.noise[one] > 0
    for size in (0.0, 1.0, 3.0):
        updates = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        updates[one][0], updates[two][1] = 1.0, size
        expected = (spoiled.noise[one] + size**2 * spoiled.noise[two]) / (1 + size**2)
        torch.testing.assert_close(spoiled.in_update(updates), expected)
    assert float(spoiled.in_update({name: torch.zeros_like(leaf) for name, leaf in leaves.items()})) == 0.0


def test_mixed_choices_are_as_noisy_as_their_mean() -> None:
    _, leaves, loss_of, table = setting()
    coarse, fine = (kept_at(table, Precision(bits)) for bits in (2, 6))
    parts = [spoiled_by(choices, table, leaves, loss_of)[1] for choices in (coarse, fine, 0.25 * coarse + 0.75 * fine)]
    for name in parts[0].noise:
        low, high, mixed = (part.noise[name] for part in parts)
        torch.testing.assert_close(mixed, 0.25 * low + 0.75 * high)
        assert high < low


def batches_of(seeds: range) -> list[MetaBatch]:
    found = []
    for seed in seeds:
        images = random_images(32, seed)
        found.append(MetaBatch(images, MODEL(images).logits.softmax(dim=1)))
    return found


def test_the_price_of_noise_is_the_heads_alone_and_lowers_the_noise() -> None:
    """A small step of the head against the gradient that the price adds brings less noise, at the same bytes."""
    policy, leaves, loss_of, table = setting()
    head = head_of(policy)
    with torch.no_grad():
        head.output.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    task = BudgetTask(table, int(1.3 * table.peak(table.costs.min(axis=1))))

    batches = batches_of(range(2))  # one step, which is the one that the precisions are asked at

    def run(price: float) -> dict[str, torch.Tensor]:
        config, generator = UnrollConfig(noise_price=price), torch.Generator().manual_seed(0)
        loss = build_meta_loss("clean_teacher")
        result = meta_gradient(policy, MODEL, OWN, None, batches, loss, budget=task, generator=generator, config=config)
        return result.gradients

    def noise() -> float:
        learning = learning_layers(leaves)
        choices = head.soft_choices(table, list(learning), head.init(leaves), task.budget).detach()
        exact, spoiled = spoiled_by(choices, table, leaves, lambda _: loss_of(batches[0].images))
        updates = policy.rule.update(exact, policy.rule.init(leaves))[0]  # type: ignore[union-attr]
        return float(spoiled.in_update(updates))

    free, priced = run(0.0), run(100.0)
    for name in free:
        assert torch.equal(free[name], priced[name]) != name.startswith("parts.pruning."), name
    before = noise()
    with torch.no_grad():
        added = priced["parts.pruning.allocation.output.weight"] - free["parts.pruning.allocation.output.weight"]
        head.output.weight.sub_(0.02 * added / added.norm())
    assert noise() < before


def test_the_meta_gradient_reaches_the_head_and_depends_on_the_budget() -> None:
    policy, _, _, table = setting()
    with torch.no_grad():
        head_of(policy).output.weight.add_(0.3)
    loss, batches = build_meta_loss("clean_teacher"), batches_of(range(4))
    least = table.peak(table.costs.min(axis=1))
    found = []
    for share in (1.1, 1.5):
        task = BudgetTask(table, int(share * least))
        result = meta_gradient(
            policy, MODEL, OWN, None, batches, loss, budget=task, generator=torch.Generator().manual_seed(0)
        )
        found.append({name: g for name, g in result.gradients.items() if name.startswith("parts.pruning.")})
        assert len(found[-1]) == 3 and all(bool((g != 0).any()) for g in found[-1].values())
        assert int(result.state["pruning"].steps) == 3
    assert not any(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_one_step_that_is_asked_stands_for_all_steps() -> None:
    """The price is of the mean noise of the steps: an unroll that asks its first is one of that step alone."""
    policy, _, _, table = setting()
    task, batches = BudgetTask(table, int(1.3 * table.peak(table.costs.min(axis=1)))), batches_of(range(4))
    loss, config = build_meta_loss("clean_teacher"), UnrollConfig(noise_price=1e7)  # all else vanishes beside it

    def priced(steps: int, seed: int) -> torch.Tensor:
        unroll, generator = batches[: steps + 1], torch.Generator().manual_seed(seed)
        result = meta_gradient(policy, MODEL, OWN, None, unroll, loss, budget=task, generator=generator, config=config)
        return result.gradients["parts.pruning.allocation.output.weight"] / config.noise_price

    alone, asked = priced(1, 0), [priced(3, seed) for seed in range(4)]
    assert bool((alone != 0).any())
    first = [each for each in asked if torch.allclose(each, alone, rtol=1e-3, atol=1e-9)]
    assert 0 < len(first) < len(asked)


def trainer_of_precisions() -> MetaTrainer:
    parts = {**DEFAULT_PARTS, "pruning": LEARNED}
    return MetaTrainer(tiny_model(), random_images(32, 3), None, tiny_config(parts=parts, epochs=1, select_best=False))


def score(trainer: MetaTrainer) -> float:
    return selection_loss(
        trainer.policy, trainer.model, trainer.parameters, trainer.config, trainer.selection, trainer.budgets
    )


def test_meta_training_moves_the_head_and_its_file_brings_it_back() -> None:
    trainer = trainer_of_precisions()
    policy = trainer.run()
    head = head_of(policy)
    assert bool((head.output.weight != 0).any())
    loaded = head_of(AdaptationPolicy.from_dict(policy.to_dict()))
    assert loaded.config == head.config
    assert torch.equal(loaded.output.weight, head.output.weight)


def test_a_run_logs_the_bytes_over_budget_and_selection_sees_the_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of_precisions()
    logged: list[float] = []
    scalar = trainer.monitor.scalar
    monkeypatch.setattr(
        trainer.monitor,
        "scalar",
        lambda tag, value, step: logged.append(value) if tag == "meta/bytes_over_budget" else scalar(tag, value, step),
    )
    trainer.run()
    assert len(logged) == trainer.progress.updates and min(logged) >= 0
    head, own = head_of(trainer.policy), score(trainer)
    with torch.no_grad():
        head.output.weight.normal_(std=30.0, generator=torch.Generator().manual_seed(1))
    assert score(trainer) != own


def test_precisions_are_learned_in_first_order_alone() -> None:
    with pytest.raises(ConfigError, match=r"parts.pruning does not go with meta.gradient=full"):
        MetaTrainConfig(parts={"pruning": LEARNED}, gradient="full")


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_of_noise_is_finite_and_not_negative(price: float) -> None:
    with pytest.raises(ConfigError, match=r"meta.noise_price is .*; allowed are finite values of at least 0"):
        UnrollConfig(noise_price=price)
