"""One battery that every registered term must pass: registering a term enrols it here."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt import registry
from metaopt.errors import ConfigError
from metaopt.objectives import Term, WeightedObjective, register_term
from metaopt.objectives.discrepancy import Discrepancy
from metaopt.objectives.weighted import weighted_sum
from metaopt.types import ForwardOutput, SourceStatistics

SAMPLES, CLASSES, WIDTHS = 8, 10, (6, 4, 5)


def statistics(dtype: torch.dtype = torch.float32) -> SourceStatistics:
    return SourceStatistics(
        tuple(torch.zeros(width, dtype=dtype) for width in WIDTHS),
        tuple(torch.ones(width, dtype=dtype) for width in WIDTHS),
    )


def objective_of(name: str, weight: float = 1.0, dtype: torch.dtype = torch.float32) -> WeightedObjective:
    """One term alone, with the source statistics where it compares with them."""
    objective = WeightedObjective({name: weight})
    for term in objective.named_terms.values():
        if isinstance(term, Discrepancy):
            term.statistics = statistics(dtype)
    return objective


def loss_and_terms(objective: WeightedObjective, output: ForwardOutput) -> tuple[Tensor, dict[str, Tensor]]:
    values = objective.values(output)
    return weighted_sum(values, objective.weights()), values


def term_of(objective: WeightedObjective) -> Term:
    (term,) = objective.named_terms.values()
    return term


def random_output(dtype: torch.dtype = torch.float32, samples: int = SAMPLES) -> ForwardOutput:
    generator = torch.Generator().manual_seed(3)
    features = tuple(torch.randn(samples, width, generator=generator, dtype=torch.float64) for width in WIDTHS)
    logits = torch.randn(samples, CLASSES, generator=generator, dtype=torch.float64)
    view, teacher = (torch.randn(samples, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    features = tuple(block.to(dtype) for block in features)
    return ForwardOutput(logits.to(dtype), features, view.to(dtype), teacher.to(dtype))


def extreme_output(gap: float, samples: int = SAMPLES) -> ForwardOutput:
    """Predictions one-hot at ``gap``, classes that no sample predicts, a dead and a constant feature."""
    logits = torch.zeros(samples, CLASSES)
    logits[torch.arange(samples), torch.arange(samples) % 3] = gap
    features = tuple(block.clone() for block in random_output(samples=samples).features)
    features[0][:, 0] = 0.0
    features[1][:, 1] = 0.1
    other = logits.roll(1, dims=1)  # view and teacher predict what the image rules out
    return ForwardOutput(logits, features, other, other)


def leaves(output: ForwardOutput) -> tuple[Tensor, ...]:
    assert output.view_logits is not None
    return tuple(tensor.requires_grad_() for tensor in (output.logits, output.view_logits, *output.features))


@pytest.fixture(params=sorted(registry.TERMS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("gap", [0.0, 17.0, 100.0, 1e4])
def test_values_and_gradients_are_finite_to_second_order(name: str, gap: float, samples: int) -> None:
    output = extreme_output(gap, samples)
    inputs = leaves(output)
    loss, _ = loss_and_terms(objective_of(name), output)
    first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    second = torch.autograd.grad(
        sum((gradient.square().sum() for gradient in first), torch.zeros(())), inputs, allow_unused=True
    )
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in first)
    assert all(torch.isfinite(gradient).all() for gradient in second if gradient is not None)


def test_shape_is_what_the_class_says(name: str) -> None:
    term = term_of(objective_of(name))
    assert term(random_output()).shape == ((SAMPLES,) if term.per_sample else ())


def test_scalar_is_the_mean_over_the_samples(name: str) -> None:
    objective = objective_of(name)
    values = objective.values(random_output())
    assert list(values) == [name] and values[name].shape == ()
    samples = term_of(objective)(random_output())
    torch.testing.assert_close(samples.mean(), values[name], rtol=0.0, atol=0.0)


def test_samples_may_count_differently_in_that_mean(name: str) -> None:
    objective, term = objective_of(name), term_of(objective_of(name))
    weights = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = objective.values(random_output())[name]
    found = objective.values(random_output(), weights)[name]
    expected = (term(random_output()) * weights.float()).mean() if term.per_sample else plain
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    torch.testing.assert_close(objective.values(random_output(), torch.ones(SAMPLES))[name], plain)


def test_order_of_the_batch_does_not_matter(name: str) -> None:
    output = random_output(torch.float64)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    assert output.view_logits is not None and output.teacher_logits is not None
    features = tuple(block[order] for block in output.features)
    shuffled = ForwardOutput(output.logits[order], features, output.view_logits[order], output.teacher_logits[order])
    objective = objective_of(name, dtype=torch.float64)
    torch.testing.assert_close(objective.values(shuffled)[name], objective.values(output)[name], rtol=1e-12, atol=1e-14)
    term = term_of(objective)
    if term.per_sample:
        torch.testing.assert_close(term(shuffled), term(output)[order])


def test_shifting_all_logits_changes_nothing(name: str) -> None:
    output = random_output(torch.float64)
    objective = objective_of(name, dtype=torch.float64)
    assert output.view_logits is not None
    shifted = output._replace(logits=output.logits + 5.0, view_logits=output.view_logits - 3.0)
    torch.testing.assert_close(objective.values(shifted), objective.values(output), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_and_device_of_the_output_are_kept(name: str, dtype: torch.dtype) -> None:
    # Whatever the statistics and the weights are in: what they are compared with decides.
    for other in (torch.float32, torch.float64):
        objective = objective_of(name, 0.3, other).to(other)
        loss, terms = loss_and_terms(objective, random_output(dtype))
        assert loss.dtype == terms[name].dtype == dtype
        assert loss.device == random_output(dtype).logits.device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    half = random_output(dtype)
    half = half._replace(features=tuple(300 * block for block in half.features))  # squares overflow float16
    assert half.view_logits is not None and half.teacher_logits is not None
    features = tuple(block.float() for block in half.features)
    single = ForwardOutput(half.logits.float(), features, half.view_logits.float(), half.teacher_logits.float())
    objective = objective_of(name)
    values = objective.values(half)
    assert values[name].dtype == torch.float32
    torch.testing.assert_close(values, objective.values(single))


def test_only_terms_that_need_features_or_a_view_touch_them(name: str) -> None:
    output, objective = random_output(), objective_of(name)
    inputs = leaves(output)
    loss, _ = loss_and_terms(objective, output)
    _, view, *features = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert objective.needs == term_of(objective).needs <= {"features", "view", "teacher"}
    assert any(gradient is not None for gradient in features) == ("features" in objective.needs)
    assert (view is not None) == ("view" in objective.needs)
    without_teacher = output._replace(teacher_logits=None)
    if "teacher" in objective.needs:
        with pytest.raises(ConfigError, match="teacher"):
            objective.values(without_teacher)
    else:
        torch.testing.assert_close(objective.values(without_teacher), objective.values(output), rtol=0.0, atol=0.0)


@pytest.fixture
def terms() -> Iterator[dict[str, Any]]:
    before = dict(registry.TERMS)
    yield registry.TERMS
    registry.TERMS.clear()
    registry.TERMS.update(before)


def test_a_users_term_is_valid_in_an_objective(terms: dict[str, Any]) -> None:
    def margin(output: ForwardOutput) -> Tensor:
        """Largest logit of each prediction."""
        return output.logits.amax(dim=1)

    register_term("margin", margin, per_sample=True)
    objective = WeightedObjective({"margin": 2.0})
    loss, values = loss_and_terms(objective, random_output())
    expected = random_output().logits.amax(dim=1).mean()
    torch.testing.assert_close(values, {"margin": expected})
    torch.testing.assert_close(loss, 2.0 * expected)
    assert "margin" in terms and registry.describe("objective term")["margin"] == "Largest logit of each prediction."
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(loss_and_terms(twin, random_output())[0], loss, rtol=0.0, atol=0.0)


def test_a_users_term_says_what_it_reads_and_may_be_a_scalar(terms: dict[str, Any]) -> None:
    register_term("spread", lambda output: output.features[0].std(), per_sample=False, needs=frozenset({"features"}))
    objective = WeightedObjective({"spread": 1.0, "entropy": 1.0})
    assert objective.needs == {"features"}
    values = objective.values(random_output())
    torch.testing.assert_close(values["spread"], random_output().features[0].std())


@pytest.mark.parametrize(("name", "message"), [("slr", "already registered"), ("my.term", "no identifier")])
def test_a_bad_registration_is_refused(terms: dict[str, Any], name: str, message: str) -> None:
    before = dict(terms)
    with pytest.raises(ConfigError, match=message):
        register_term(name, lambda output: output.logits.sum(), per_sample=False)
    assert terms == before


def test_an_unknown_term_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown objective term 'entropi'.*did you mean 'entropy'\?"):
        registry.get("objective term", "entropi")
    known = "entropy, filtered, slr, diversity, discrepancy, consistency, teacher"
    with pytest.raises(ConfigError, match=f"'zzz'; allowed are {known}: choose"):
        registry.get("objective term", "zzz")
