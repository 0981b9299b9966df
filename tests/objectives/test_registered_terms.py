"""One battery that every registered term must pass: registering a term enrols it here."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.objectives import OBJECTIVE_TERMS, WeightedObjective, get_term, register_term
from metaopt.types import ForwardOutput, SourceStatistics

SAMPLES, CLASSES, WIDTHS = 8, 10, (6, 4, 5)


def statistics(dtype: torch.dtype = torch.float32) -> SourceStatistics:
    return SourceStatistics(
        tuple(torch.zeros(width, dtype=dtype) for width in WIDTHS),
        tuple(torch.ones(width, dtype=dtype) for width in WIDTHS),
    )


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


@pytest.fixture(params=sorted(OBJECTIVE_TERMS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("gap", [0.0, 17.0, 100.0, 1e4])
def test_values_and_gradients_are_finite_to_second_order(name: str, gap: float, samples: int) -> None:
    output = extreme_output(gap, samples)
    inputs = leaves(output)
    loss, _ = WeightedObjective({name: 1.0}).loss(output, statistics())
    first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    second = torch.autograd.grad(
        sum((gradient.square().sum() for gradient in first), torch.zeros(())), inputs, allow_unused=True
    )
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in first)
    assert all(torch.isfinite(gradient).all() for gradient in second if gradient is not None)


def test_shape_is_what_the_registration_says(name: str) -> None:
    value = get_term(name).function(random_output(), statistics())
    assert value.shape == ((SAMPLES,) if get_term(name).per_sample else ())


def test_scalar_is_the_mean_over_the_samples(name: str) -> None:
    objective = WeightedObjective({name: 1.0})
    scalar = objective.terms(random_output(), statistics())[name]
    samples = objective.per_sample(random_output(), statistics())
    assert scalar.shape == ()
    assert list(samples) == ([name] if get_term(name).per_sample else [])
    for values in samples.values():
        torch.testing.assert_close(values.mean(), scalar, rtol=0.0, atol=0.0)


def test_order_of_the_batch_does_not_matter(name: str) -> None:
    output = random_output(torch.float64)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    assert output.view_logits is not None and output.teacher_logits is not None
    features = tuple(block[order] for block in output.features)
    shuffled = ForwardOutput(output.logits[order], features, output.view_logits[order], output.teacher_logits[order])
    objective = WeightedObjective({name: 1.0})
    given = statistics(torch.float64)
    torch.testing.assert_close(
        objective.terms(shuffled, given)[name], objective.terms(output, given)[name], rtol=1e-12, atol=1e-14
    )
    if get_term(name).per_sample:
        torch.testing.assert_close(
            objective.per_sample(shuffled, given)[name], objective.per_sample(output, given)[name][order]
        )


def test_shifting_all_logits_changes_nothing(name: str) -> None:
    output = random_output(torch.float64)
    objective = WeightedObjective({name: 1.0})
    given = statistics(torch.float64)
    assert output.view_logits is not None
    shifted = output._replace(logits=output.logits + 5.0, view_logits=output.view_logits - 3.0)
    torch.testing.assert_close(objective.terms(shifted, given), objective.terms(output, given), rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_and_device_of_the_output_are_kept(name: str, dtype: torch.dtype) -> None:
    # Whatever the statistics and the weights are in: what they are compared with decides.
    for other in (torch.float32, torch.float64):
        objective = WeightedObjective({name: 0.3}).to(other)
        loss, terms = objective.loss(random_output(dtype), statistics(other))
        assert loss.dtype == terms[name].dtype == dtype
        assert loss.device == random_output(dtype).logits.device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    half = random_output(dtype)
    half = half._replace(features=tuple(300 * block for block in half.features))  # squares overflow float16
    assert half.view_logits is not None and half.teacher_logits is not None
    features = tuple(block.float() for block in half.features)
    single = ForwardOutput(half.logits.float(), features, half.view_logits.float(), half.teacher_logits.float())
    objective = WeightedObjective({name: 1.0})
    values = objective.terms(half, statistics())
    assert values[name].dtype == torch.float32
    torch.testing.assert_close(values, objective.terms(single, statistics()))


def test_only_terms_that_need_features_or_a_view_touch_them(name: str) -> None:
    output = random_output()
    inputs = leaves(output)
    loss, _ = WeightedObjective({name: 1.0}).loss(output, statistics())
    _, view, *features = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert any(gradient is not None for gradient in features) == get_term(name).needs_features
    assert (view is not None) == get_term(name).needs_view


@pytest.fixture
def registry() -> Iterator[dict]:
    before = dict(OBJECTIVE_TERMS)
    yield OBJECTIVE_TERMS
    OBJECTIVE_TERMS.clear()
    OBJECTIVE_TERMS.update(before)


def test_a_users_term_is_valid_in_an_objective(registry: dict) -> None:
    register_term("margin", lambda output, _: output.logits.amax(dim=1), per_sample=True)
    objective = WeightedObjective({"margin": 2.0})
    loss, terms = objective.loss(random_output())
    expected = random_output().logits.amax(dim=1).mean()
    torch.testing.assert_close(terms, {"margin": expected})
    torch.testing.assert_close(loss, 2.0 * expected)
    assert "margin" in registry


@pytest.mark.parametrize(("name", "message"), [("slr", "already registered"), ("my.term", "no identifier")])
def test_a_bad_registration_is_refused(registry: dict, name: str, message: str) -> None:
    before = dict(registry)
    with pytest.raises(ConfigError, match=message):
        register_term(name, lambda output, _: output.logits.sum(), per_sample=False)
    assert registry == before


def test_an_unknown_term_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown objective term 'entropi'.*did you mean 'entropy'\?"):
        get_term("entropi")
    known = "entropy, filtered, slr, diversity, discrepancy, consistency, teacher"
    with pytest.raises(ConfigError, match=f"'zzz'; known terms: {known}; choose"):
        get_term("zzz")
