"""The weighted objective: its sum, its learned weights, its configuration, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.objectives import WeightedObjective
from metaopt.objectives.discrepancy import Discrepancy
from metaopt.objectives.entropy import softmax_entropy
from metaopt.objectives.weighted import weighted_sum
from metaopt.types import ForwardOutput, SourceStatistics


def output(samples: int = 6) -> ForwardOutput:
    generator = torch.Generator().manual_seed(4)
    return ForwardOutput(torch.randn(samples, 5, generator=generator, dtype=torch.float64))


def loss_of(objective: WeightedObjective, given: ForwardOutput) -> tuple[Tensor, dict[str, Tensor]]:
    values = objective.values(given)
    return weighted_sum(values, objective.weights()), values


def test_loss_of_slr_and_diversity_by_hand() -> None:
    # ROID's pair on two samples: p = (0.8, 0.2) and (0.5, 0.5), whose mean is (0.65, 0.35).
    logits = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
    loss, terms = loss_of(WeightedObjective({"slr": 1.0, "diversity": 1.0}), ForwardOutput(logits))
    slr = (-0.6 * math.log(4.0) + 0.0) / 2
    diversity = 0.65 * math.log(0.65) + 0.35 * math.log(0.35)
    assert terms["slr"].item() == pytest.approx(slr, rel=1e-12)
    assert terms["diversity"].item() == pytest.approx(diversity, rel=1e-12)
    assert loss.item() == pytest.approx(slr + diversity, rel=1e-12)


def test_entropy_alone_is_the_mean_entropy() -> None:
    loss, _ = loss_of(WeightedObjective({"entropy": 1.0}), output())
    torch.testing.assert_close(loss, softmax_entropy(output().logits).mean(), rtol=0.0, atol=0.0)


def test_weights_scale_the_terms_in_the_order_given() -> None:
    objective = WeightedObjective({"diversity": 0.25, "slr": 3.0}).double()
    loss, terms = loss_of(objective, output())
    assert list(terms) == list(objective.weights()) == ["diversity", "slr"]
    torch.testing.assert_close(loss, 0.25 * terms["diversity"] + 3.0 * terms["slr"], rtol=1e-6, atol=0.0)


def test_it_tells_the_step_what_its_terms_read() -> None:
    assert WeightedObjective({"slr": 1.0}).needs == frozenset()
    assert WeightedObjective({"slr": 1.0, "consistency": 1.0}).needs == {"view"}
    assert WeightedObjective({"slr": 1.0, "discrepancy": 0.4 / 64}).needs == {"features"}
    assert WeightedObjective({"teacher": 1.0, "consistency": 1.0}).needs == {"teacher", "view"}


def test_gradient_of_a_learned_weight_is_weight_times_term() -> None:
    objective = WeightedObjective({"slr": 2.0, "diversity": 0.5}, learned=True).double()
    loss, terms = loss_of(objective, output())
    (gradient,) = torch.autograd.grad(loss, objective.log_weights)
    expected = torch.stack([weight * terms[name] for name, weight in objective.weights().items()])
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=0.0)


def test_fixed_weights_require_no_gradient_and_learned_ones_do() -> None:
    for learned in (False, True):
        objective = WeightedObjective({"slr": 1.0}, learned=learned)
        assert objective.weights()["slr"].requires_grad is learned
        assert [p.requires_grad for p in objective.parameters()] == [learned]


def test_weights_stay_positive_however_far_they_are_moved() -> None:
    objective = WeightedObjective({"slr": 1e-6, "diversity": 50.0}, learned=True)
    torch.testing.assert_close([*objective.weights().values()], [torch.tensor(1e-6), torch.tensor(50.0)])
    with torch.no_grad():
        objective.log_weights.copy_(torch.tensor([-20.0, 3.0]))
    assert all(weight > 0 for weight in objective.weights().values())


def test_it_makes_the_round_trip_through_primitives() -> None:
    objective = WeightedObjective({"slr": 1, "discrepancy": 0.4 / 64}, learned=True)
    values = objective.to_dict()
    assert values == {
        "weights": {"slr": 1.0, "discrepancy": 0.4 / 64},
        "learned": True,
        "terms": {"slr": {}, "discrepancy": {}},
    }
    assert type(values["weights"]["slr"]) is float
    with torch.no_grad():
        objective.log_weights.add_(0.5)
    rebuilt = WeightedObjective.from_dict(values)
    rebuilt.load_state_dict(objective.state_dict())
    assert rebuilt.to_dict() == values
    assert torch.equal(rebuilt.log_weights, objective.log_weights)
    assert rebuilt.weights()["slr"].item() == pytest.approx(math.exp(0.5))


def test_source_statistics_make_the_round_trip_and_move_with_it() -> None:
    objective = WeightedObjective({"discrepancy": 1.0})
    given_term = objective.named_terms["discrepancy"]
    assert isinstance(given_term, Discrepancy)
    given_term.statistics = SourceStatistics((torch.rand(3),), (torch.rand(3),))
    rebuilt = WeightedObjective.from_dict(objective.to_dict())
    given = output()._replace(features=(torch.rand(6, 3),))
    torch.testing.assert_close(loss_of(rebuilt, given), loss_of(objective, given), rtol=0.0, atol=0.0)
    term = rebuilt.double().named_terms["discrepancy"]
    assert isinstance(term, Discrepancy) and term.statistics is not None
    assert {tensor.dtype for tensor in (*term.statistics.mean, *term.statistics.std)} == {torch.float64}
    values = objective.to_dict()
    values["terms"]["discrepancy"]["std"][0][1] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        WeightedObjective.from_dict(values)


def test_it_can_be_copied_and_pickled() -> None:
    objective = WeightedObjective({"slr": 1.0, "diversity": 2.0})
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(loss_of(twin, output()), loss_of(objective, output()), rtol=0.0, atol=0.0)


def test_its_description_says_the_weights_now() -> None:
    objective = WeightedObjective({"slr": 2.0})
    assert "slr=2, learned=False" in repr(objective)
    objective.log_weights.data.zero_()
    assert "slr=1, learned=False" in repr(objective)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "0 terms"),
        ({"entropie": 1.0}, r"unknown objective term 'entropie'.*did you mean 'entropy'"),
        ({"slr": 0}, r"'slr' is 0, must be above 0; drop the term"),
        ({"slr": 0.0}, "drop the term"),
        ({"slr": -1.0}, r"'slr' is -1\.0, must be finite and above 0"),
        ({"slr": math.inf}, "is inf, must be finite"),
        ({"slr": math.nan}, "is nan, must be finite"),
        ({"slr": "1"}, "is '1', must be a number"),
        ({"slr": True}, "is True, must be a number"),
        ({"slr": None}, "is None, must be a number"),
    ],
)
def test_bad_weights_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedObjective(weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weights": {"slr": 1.0}, "learnt": True, "terms": {}},
            r"has \['learnt', 'terms', 'weights'\]; allowed are weights, learned and terms",
        ),
        ({"learned": True, "terms": {}}, r"has \['learned', 'terms'\]; allowed are weights"),
        ({"weights": ["slr"], "learned": True, "terms": {}}, "allowed are weights"),
    ],
)
def test_bad_primitives_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedObjective.from_dict(values)


def test_missing_statistics_are_answered_with_how_to_give_them() -> None:
    objective = WeightedObjective({"entropy": 1.0, "discrepancy": 0.4 / 64})
    with_features = output()._replace(features=(torch.zeros(6, 3),))
    with pytest.raises(ConfigError, match=r"no source statistics.*source\.images="):
        objective.values(with_features)
    term = objective.named_terms["discrepancy"]
    assert isinstance(term, Discrepancy)
    term.statistics = SourceStatistics((torch.zeros(3),), (torch.ones(3),))
    loss, terms = loss_of(objective, with_features)
    # Zero mean as the source, std 0 against 1 in three features, one block scaled to twelve.
    assert terms["discrepancy"].item() == pytest.approx(36.0)
    assert loss.item() == pytest.approx(terms["entropy"].item() + 0.4 / 64 * 36.0, rel=1e-6)
