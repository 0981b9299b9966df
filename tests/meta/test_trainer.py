"""The trainer: what is skipped, clipped, carried over, and written to TensorBoard."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.errors import ConfigError, DataError
from metaopt.evaluation import Monitor, read_scalars
from metaopt.meta import MetaTrainer
from metaopt.meta import trainer as module
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.unroll import MetaGradient
from metaopt.optimizers.mgg import GeneratorConfig, GradientGenerator

from ..tiny import random_images, tiny_config, tiny_model

IMAGES = random_images(32)


def trainer_with(monitor: Monitor | None = None, **changes: Any) -> MetaTrainer:
    return MetaTrainer(tiny_model(), IMAGES, None, tiny_config(**changes), monitor)


def flat(trainer: MetaTrainer) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in trainer.policy.parameters()])


def adam_state(trainer: MetaTrainer) -> list[Tensor]:
    return [value.clone() for row in trainer.optimizer.adam.state.values() for value in row.values()]


def altered(monkeypatch: pytest.MonkeyPatch, change: Any) -> list[MetaGradient]:
    """Every meta-gradient passes through ``change(number, result)`` on its way to the trainer."""
    results: list[MetaGradient] = []

    def wrapped(*args: Any, **kwargs: Any) -> MetaGradient:
        result = original(*args, **kwargs)
        results.append(result)
        change(len(results) - 1, result)
        return result

    original = module.meta_gradient
    monkeypatch.setattr(module, "meta_gradient", wrapped)
    return results


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_what_is_not_finite_is_skipped_and_counted(place: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(number: int, result: MetaGradient) -> None:
        if number == 2 and place == "loss":
            result.losses[0].fill_(value)
        elif number == 2:
            next(iter(result.gradients.values())).view(-1)[0] = value

    altered(monkeypatch, spoil)
    trainer = trainer_with(unrolls=4, epochs=1)
    seen: list[tuple[Tensor, list[Tensor]]] = []
    trainer.run(on_unroll=lambda loss: seen.append((flat(trainer), adam_state(trainer))))
    weights, moments = zip(*seen, strict=True)
    assert torch.equal(weights[1], weights[2])
    assert all(torch.equal(a, b) for a, b in zip(moments[1], moments[2], strict=True))
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3])
    assert (trainer.progress.skipped, trainer.progress.updates) == (1, 4)
    assert bool(torch.isfinite(weights[3]).all())
    assert trainer.best_policy().training["skipped"] == 1


def test_gradients_are_clipped_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarge(number: int, result: MetaGradient) -> None:
        for gradient in result.gradients.values():
            gradient.mul_(1e4)

    results = altered(monkeypatch, enlarge)
    trainer = trainer_with(unrolls=2, epochs=1, clip_norm=0.25, shrinkage=0.0)
    applied: list[dict[str, Tensor]] = []
    step = trainer.optimizer.adam.step

    def spy() -> None:
        applied.append({n: t.grad.clone() for n, t in trainer.policy.named_parameters() if t.grad is not None})
        step()

    monkeypatch.setattr(trainer.optimizer.adam, "step", spy)
    trainer.run()
    for gradients, result in zip(applied, results, strict=True):
        for own in (True, False):  # the initialization and all else, each by itself
            names = [name for name in result.gradients if name.startswith("parts.initialization.") == own]
            gradient = torch.cat([gradients[name].flatten() for name in names])
            assert float(gradient.norm()) == pytest.approx(0.25, rel=1e-3)
            raw = torch.cat([result.gradients[name].flatten() for name in names])
            assert float(torch.cosine_similarity(gradient, raw, dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_small_gradients_are_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, lambda number, result: [gradient.mul_(0) for gradient in result.gradients.values()])
    trainer = trainer_with(unrolls=2, epochs=1, shrinkage=0.0)
    before = flat(trainer)
    trainer.run()
    assert torch.equal(before, flat(trainer))


def test_shrinkage_pulls_log_step_sizes_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, lambda number, result: [gradient.mul_(0) for gradient in result.gradients.values()])
    trainer = trainer_with(unrolls=8, epochs=1, shrinkage=0.5, lr=0.05)
    rule = trainer.policy.rule
    assert isinstance(rule, GradientGenerator) and rule.log_step_sizes is not None
    rule.log_step_sizes.data.fill_(1.0)
    trainer.run()
    assert float(rule.log_step_sizes.detach().max()) < 0.8


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_running_unroll_is_one_unroll_in_windows(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a meta-rate of nearly zero the windows' losses are those of deployment along the whole task."""
    windows: list[tuple[Any, int]] = []

    def wrapped(policy: Any, model: Any, parameters: Any, state: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        windows.append((state, len(batches)))
        return original(policy, model, parameters, state, batches, *args, **kwargs)

    original = module.meta_gradient
    monkeypatch.setattr(module, "meta_gradient", wrapped)
    trainer = trainer_with(steps=5, first_steps=5, update_every=length, epochs=1, unrolls=1, lr=1e-12, shrinkage=0.0)
    task = trainer.sampler.sample(5, generator_for("meta-training", 0))
    expected = torch.stack(unrolled_loss(trainer.policy, trainer.model, trainer.parameters, task, trainer.meta_loss))
    losses: list[float] = []
    trainer.run(on_unroll=losses.append)
    assert losses[0] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert trainer.progress.updates == len(windows) == math.ceil(5 / length)
    assert [size for _, size in windows] == [min(length, 5 - start) + 1 for start in range(0, 5, length)]
    assert windows[0][0] is None
    assert [int(state["rule"].moments.step) for state, _ in windows[1:]] == list(range(length, 5, length))


def test_the_published_composition_runs() -> None:
    """One-step truncated and first order, the meta-loss the next batch's own objective, batch 2, 64 steps."""
    trainer = trainer_with(
        generator=GeneratorConfig(variant="published", lr=1e-4),
        objective={"entropy": 1.0, "discrepancy": 0.4},
        batch_size=2,
        truncation=1,
        loss="unsupervised",
        steps=64,
        first_steps=64,
        update_every=1,
        schedule="constant",
        epochs=1,
        unrolls=1,
    )
    before = flat(trainer)
    policy = trainer.run()
    assert (trainer.progress.updates, trainer.progress.skipped) == (64, 0)
    moved = (flat(trainer) - before).abs()
    assert bool(torch.isfinite(moved).all()) and float(moved.max()) > 0.05
    assert policy.objective is not None
    weights = {name: float(weight) for name, weight in policy.objective.weights().items()}
    assert weights == pytest.approx({"entropy": 1.0, "discrepancy": 0.4})  # its own loss must not weigh itself
    assert policy.objective.named_terms["discrepancy"].statistics is not None


@pytest.mark.parametrize("gradient", ["first_order", "full"])
def test_backends_train_alike(gradient: str) -> None:
    weights = {}
    for backend in ("func", "torchopt", "higher"):
        config = tiny_config(backend=backend, gradient=gradient, epochs=1)
        trainer = MetaTrainer(tiny_model(dtype=torch.float64), IMAGES.double(), None, config)
        trainer.run()
        weights[backend] = flat(trainer)
    assert weights["func"].dtype == torch.float64
    torch.testing.assert_close(weights["torchopt"], weights["func"], rtol=0, atol=1e-7)
    torch.testing.assert_close(weights["higher"], weights["func"], rtol=0, atol=1e-7)


def test_a_seed_names_a_training() -> None:
    first, same, other = (trainer_with(seed=seed) for seed in (0, 0, 1))
    for trainer in (first, same, other):
        torch.rand(3)  # the global generator has no say
        trainer.run()
    assert torch.equal(flat(first), flat(same)) and not torch.equal(flat(first), flat(other))
    assert first.progress == same.progress


def test_curves_are_written_and_read_back(tmp_path: Path) -> None:
    losses: list[float] = []
    with Monitor(tmp_path) as monitor:
        trainer = trainer_with(monitor, epochs=3, unrolls=2, steps=4, first_steps=2)
        trainer.run(on_unroll=losses.append)
    curve = read_scalars(tmp_path, "meta/loss")
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in curve] == pytest.approx(losses, rel=1e-5)
    assert read_scalars(tmp_path, "meta/loss_clean_teacher") == curve
    norms = [value for _, value in read_scalars(tmp_path, "meta/grad_norm")]
    assert len(norms) == 6 and all(value > 0 for value in norms)
    selection = read_scalars(tmp_path, "meta/selection_loss")
    assert [step for step, _ in selection] == [0, 6]  # epochs of shorter unrolls are not scored
    assert [value for _, value in selection] == pytest.approx(trainer.progress.selection, rel=1e-5)
    assert [value for _, value in read_scalars(tmp_path, "meta/steps")] == [2, 2, 3, 3, 4, 4]
    assert [value for _, value in read_scalars(tmp_path, "meta/skipped")] == [0] * 6
    from tensorboard.backend.event_processing.event_accumulator import IMAGES as IMAGE_TAGS
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path), size_guidance={IMAGE_TAGS: 0}).Reload()
    assert "meta/loss_over_unroll" in events.Tags()["images"]


def test_one_point_for_each_meta_update(tmp_path: Path) -> None:
    with Monitor(tmp_path) as monitor:
        trainer = trainer_with(monitor, update_every=2, steps=5, first_steps=5, epochs=1, unrolls=2)
        trainer.run()
    assert len(read_scalars(tmp_path, "meta/loss")) == trainer.progress.updates == 6


def test_the_rate_falls_to_a_tenth_or_stays() -> None:
    for schedule, last in (("cosine", 0.1), ("constant", 1.0)):
        config = trainer_with(schedule=schedule, epochs=4, unrolls=25, lr=0.01).config
        assert config.rate_share(0, 0) == 1.0
        assert config.rate_share(3, 24) == pytest.approx(last, abs=1e-3)


def test_the_source_model_stays_as_it_is() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = MetaTrainer(model, IMAGES, None, tiny_config(objective={"slr": 1.0, "discrepancy": 0.1}))
    policy = trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert policy.source is not None and policy.source.sha256 == model.weights_sha256()
    assert all(tensor.grad is None for tensor in model.parameters())


def test_evaluation_changes_nothing() -> None:
    trainer = trainer_with()
    before, state = flat(trainer), trainer.randomness.get_state()
    first = trainer.evaluate(trainer.selection)
    assert torch.equal(first, trainer.evaluate(trainer.selection))
    assert torch.equal(before, flat(trainer)) and torch.equal(state, trainer.randomness.get_state())


def test_refusals() -> None:
    with pytest.raises(DataError, match="meta-training got 1 images; at least 2"):
        MetaTrainer(tiny_model(), IMAGES[:1], None, tiny_config())
    with pytest.raises(ConfigError, match="0 terms"):
        MetaTrainer(tiny_model(), IMAGES, None, tiny_config(objective={}))
    with pytest.raises(DataError, match="unknown corruption 'gama'"):
        MetaTrainer(tiny_model(), IMAGES, None, tiny_config(selection_shifts=("gama",)))
