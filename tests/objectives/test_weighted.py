"""The weighted objective: its sum, its learned weights, its configuration, and what it refuses."""

import copy
import math
import pickle

import pytest
import torch

from metaopt.errors import ConfigError
from metaopt.objectives import POSITIVE, WeightedObjective, softmax_entropy
from metaopt.types import ForwardOutput, Objective, SourceStatistics


def output(samples: int = 6) -> ForwardOutput:
    generator = torch.Generator().manual_seed(4)
    return ForwardOutput(torch.randn(samples, 5, generator=generator, dtype=torch.float64))


def test_loss_of_slr_and_diversity_by_hand() -> None:
    # ROID's pair on two samples: p = (0.8, 0.2) and (0.5, 0.5), whose mean is (0.65, 0.35).
    logits = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
    loss, terms = WeightedObjective({"slr": 1.0, "diversity": 1.0}).loss(ForwardOutput(logits))
    slr = (-0.6 * math.log(4.0) + 0.0) / 2
    diversity = 0.65 * math.log(0.65) + 0.35 * math.log(0.35)
    assert terms["slr"].item() == pytest.approx(slr, rel=1e-12)
    assert terms["diversity"].item() == pytest.approx(diversity, rel=1e-12)
    assert loss.item() == pytest.approx(slr + diversity, rel=1e-12)


def test_entropy_alone_is_the_mean_entropy() -> None:
    loss, _ = WeightedObjective({"entropy": 1.0}).loss(output())
    torch.testing.assert_close(loss, softmax_entropy(output().logits).mean(), rtol=0.0, atol=0.0)


def test_weights_scale_the_terms_in_the_order_given() -> None:
    objective = WeightedObjective({"diversity": 0.25, "slr": 3.0}).double()
    loss, terms = objective.loss(output())
    assert list(terms) == list(objective.weights()) == ["diversity", "slr"]
    torch.testing.assert_close(loss, 0.25 * terms["diversity"] + 3.0 * terms["slr"], rtol=1e-6, atol=0.0)


def test_it_is_an_objective_as_the_step_expects() -> None:
    objective: Objective = WeightedObjective({"slr": 1.0})
    assert objective.needs_features is False and objective.needs_view is False
    assert WeightedObjective({"slr": 1.0, "consistency": 1.0}).needs_view is True
    assert WeightedObjective({"slr": 1.0, "discrepancy": 0.4 / 64}).needs_features is True


def test_gradient_of_a_learned_weight_is_weight_times_term() -> None:
    objective = WeightedObjective({"slr": 2.0, "diversity": 0.5}, learned=True).double()
    loss, terms = objective.loss(output())
    (gradient,) = torch.autograd.grad(loss, objective.log_weights)
    expected = torch.stack([weight * terms[name] for name, weight in objective.weights().items()])
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=0.0)


def test_fixed_weights_require_no_gradient_and_learned_ones_do() -> None:
    for learned in (False, True):
        objective = WeightedObjective({"slr": 1.0}, learned=learned)
        assert objective.weights()["slr"].requires_grad is learned
        assert [p.requires_grad for p in objective.parameters()] == [learned]


def test_the_pair_inverts_itself_and_keeps_weights_positive() -> None:
    values = torch.tensor([1e-6, 0.4 / 64, 1.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(POSITIVE.constrain(POSITIVE.unconstrain(values)), values, rtol=1e-14, atol=0.0)
    assert (POSITIVE.constrain(torch.tensor([-20.0, 0.0, 3.0])) > 0).all()


def test_configuration_makes_the_round_trip() -> None:
    objective = WeightedObjective({"slr": 1, "discrepancy": 0.4 / 64}, learned=True)
    config = objective.to_config()
    assert config == {"weights": {"slr": 1.0, "discrepancy": 0.4 / 64}, "learned": True}
    assert type(config["weights"]["slr"]) is float
    with torch.no_grad():
        objective.log_weights.add_(0.5)
    rebuilt = WeightedObjective.from_config(config)
    rebuilt.load_state_dict(objective.state_dict())
    assert rebuilt.to_config() == config
    assert torch.equal(rebuilt.log_weights, objective.log_weights)
    assert rebuilt.weights()["slr"].item() == pytest.approx(math.exp(0.5))


def test_it_can_be_copied_and_pickled() -> None:
    objective = WeightedObjective({"slr": 1.0, "diversity": 2.0})
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(twin.loss(output()), objective.loss(output()), rtol=0.0, atol=0.0)


def test_its_description_says_the_weights_now() -> None:
    assert repr(WeightedObjective({"slr": 2.0})) == "WeightedObjective(slr=2, learned=False)"


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
    ("config", "message"),
    [
        ({"weights": {"slr": 1.0}, "learnt": True}, "unknown objective setting 'learnt'; allowed: weights, learned"),
        ({"learned": True}, "objective weights are None"),
        ({"weights": ["slr"]}, r"objective weights are \['slr'\]"),
    ],
)
def test_bad_configuration_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedObjective.from_config(config)


def test_missing_statistics_are_answered_with_how_to_give_them() -> None:
    objective = WeightedObjective({"entropy": 1.0, "discrepancy": 0.4 / 64})
    with_features = output()._replace(features=(torch.zeros(6, 3),))
    with pytest.raises(ConfigError, match=r"no source statistics.*source\.images="):
        objective.loss(with_features)
    statistics = SourceStatistics((torch.zeros(3),), (torch.ones(3),))
    loss, terms = objective.loss(with_features, statistics)
    # Zero mean as the source, std 0 against 1 in three features, one block scaled to twelve.
    assert terms["discrepancy"].item() == pytest.approx(36.0)
    assert loss.item() == pytest.approx(terms["entropy"].item() + 0.4 / 64 * 36.0, rel=1e-6)
