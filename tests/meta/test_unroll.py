"""What an unroll keeps, cuts, shares and refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.errors import ConfigError
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.unroll import MetaBatch, UnrollConfig
from metaopt.policy import AdaptationPolicy

from .cases import (
    ALL_TERMS,
    GRADIENTS,
    LOSSES,
    TeacherLoss,
    assert_same,
    policy_for,
    relative_difference,
    start,
    take,
    task,
    tiny_resnet,
    tiny_vit,
)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_truncation(gradient: str) -> None:
    network = tiny_resnet()
    policy, batches = policy_for(network), task(4)
    whole = take(policy, network, batches, gradient=gradient, **ALL_TERMS)
    for length in (4, 9):
        same = take(policy, network, batches, gradient=gradient, truncation=length, **ALL_TERMS)
        assert_same(same.gradients, whole.gradients, 1e-12)
    cut = take(policy, network, batches, gradient=gradient, truncation=1, **ALL_TERMS)
    assert relative_difference(cut.gradients["rule.memory.query"], whole.gradients["rule.memory.query"]) > 0.01
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-12, atol=0.0)
    # One-step meta-gradients, each from where the last left off.
    total = {name: torch.zeros_like(tensor) for name, tensor in whole.gradients.items()}
    parameters, state = start(network), None
    config = UnrollConfig(gradient, **ALL_TERMS)
    for position in range(4):
        pair = batches[position : position + 2]
        one = meta_gradient(policy, network, parameters, state, pair, TeacherLoss(), config=config)
        parameters, state = one.parameters, one.state
        total = {name: value + one.gradients[name] / 4 for name, value in total.items()}
    assert_same(cut.gradients, total, 1e-9)


def test_uneven_stretches_are_the_stretches_one_by_one() -> None:
    network = tiny_resnet()
    policy, batches = policy_for(network, "step_sizes"), task(5)
    for gradient in GRADIENTS:
        cut = take(policy, network, batches, gradient=gradient, truncation=3, **ALL_TERMS)
        config = UnrollConfig(gradient, **ALL_TERMS)
        first = meta_gradient(policy, network, start(network), None, batches[:4], TeacherLoss(), config=config)
        second = meta_gradient(
            policy, network, first.parameters, first.state, batches[3:], TeacherLoss(), config=config
        )
        expected = {name: 0.6 * first.gradients[name] + 0.4 * second.gradients[name] for name in cut.gradients}
        assert_same(cut.gradients, expected, 1e-9)
        assert [float(loss) for loss in cut.losses] == pytest.approx([float(x) for x in first.losses + second.losses])


def test_sampled_term_steps_are_unbiased() -> None:
    network = tiny_resnet()
    policy, batches = policy_for(network), task(3)
    exact = take(policy, network, batches, **ALL_TERMS).gradients
    for count in (1, 2):
        chosen: dict[frozenset[int], dict[str, Tensor]] = {}
        for seed in range(100):
            permutation = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
            choice = frozenset(permutation[:count].tolist())
            if choice not in chosen:
                chosen[choice] = meta_gradient(
                    policy,
                    network,
                    start(network),
                    None,
                    batches,
                    TeacherLoss(),
                    config=UnrollConfig(term_steps=count),
                    generator=torch.Generator().manual_seed(seed),
                ).gradients
            if len(chosen) == 3:
                break
        assert len(chosen) == 3
        mean = {name: torch.stack([each[name] for each in chosen.values()]).mean(dim=0) for name in exact}
        assert_same(mean, exact, 1e-9)
        single = next(iter(chosen.values()))
        assert relative_difference(single["objective.log_weights"], exact["objective.log_weights"]) > 0.01
        assert_same({"q": single["rule.memory.query"]}, {"q": exact["rule.memory.query"]}, 1e-9)


def test_fixed_objective_weights_have_no_gradient() -> None:
    network = tiny_resnet()
    policy = policy_for(network, learned_objective=False)
    found = take(policy, network, task(2)).gradients
    assert set(found) == {name for name, _ in policy.rule.named_parameters(prefix="rule")}  # type: ignore[union-attr]


class _CountedGrad:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        original = torch.autograd.grad

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted)


def test_the_unsupervised_loss_shares_the_inner_losss_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_resnet()
    policy, steps = policy_for(network, learned_objective=False), 5
    forwards = [0]
    network.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    calls = {}
    for loss in LOSSES:
        forwards[0], counter = 0, _CountedGrad(monkeypatch)
        take(policy, network, task(steps), loss=loss)
        calls[loss] = counter.calls
        assert forwards[0] == steps + 1
        monkeypatch.undo()
    # Replayed steps and the meta-gradient itself: K cheap calls through the rule alone, and one.
    assert calls["own"] == (steps + 1) + steps + 1
    assert calls["teacher"] == 2 * steps + steps + 1


def test_own_and_shared_backward_give_what_separate_ones_give() -> None:
    class Separate:
        own_objective = False

        def __call__(self, output: Any, batch: MetaBatch) -> Tensor:
            return output.loss

    network = tiny_resnet()
    policy, batches = policy_for(network, learned_objective=False), task(4)
    shared = take(policy, network, batches, loss="own")
    apart = meta_gradient(policy, network, start(network), None, batches, Separate())
    assert_same(shared.gradients, apart.gradients, 1e-12)


def test_a_running_state_is_continued_and_inputs_stay_as_they_are() -> None:
    network = tiny_vit()
    policy, batches = policy_for(network), task(4)
    parameters = start(network)
    kept = {name: tensor.clone() for name, tensor in parameters.items()}
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for gradient in GRADIENTS:
        whole = take(policy, network, batches, gradient=gradient, **ALL_TERMS)
        config = UnrollConfig(gradient, **ALL_TERMS)
        first = meta_gradient(policy, network, parameters, None, batches[:3], TeacherLoss(), config=config)
        second = meta_gradient(
            policy, network, first.parameters, first.state, batches[2:], TeacherLoss(), config=config
        )
        assert [float(x) for x in first.losses + second.losses] == [float(x) for x in whole.losses]
        for name, tensor in whole.parameters.items():
            assert torch.equal(second.parameters[name], tensor)
            assert not second.parameters[name].grad_fn
    assert all(torch.equal(tensor, kept[name]) for name, tensor in parameters.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    assert all(tensor.grad is None for tensor in policy.parameters())


def test_what_cannot_be_unrolled_is_refused() -> None:
    network = tiny_resnet()
    policy = policy_for(network)
    with pytest.raises(ConfigError, match=r"an unroll got 1 batches; it needs K \+ 1 >= 2"):
        take(policy, network, task(0))
    never = AdaptationPolicy("bn")
    with pytest.raises(ConfigError, match="method 'bn' never updates, so it has no meta-gradient"):
        meta_gradient(never, network, start(network), None, task(1), TeacherLoss())
    with pytest.raises(ConfigError, match=r"meta\.gradient is 'half'; allowed are first_order, full"):
        UnrollConfig("half")
    with pytest.raises(ConfigError, match=r"meta\.truncation is 0; it must be null or at least 1"):
        UnrollConfig(truncation=0)
    with pytest.raises(ConfigError, match=r"meta\.term_steps is 0"):
        UnrollConfig(term_steps=0)
