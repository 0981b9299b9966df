"""One mixture against the equations written out expert by expert, its ablations, and where gradients go."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from metaopt.experts import ExpertMixture, ExpertsConfig
from metaopt.experts.gates import ActivationSparsityGate, DomainAwareGate, top_k_softmax

WIDTH = 12


def tokens(batch: int = 3, count: int = 5, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(config: ExpertsConfig, width: int = WIDTH) -> ExpertMixture:
    """No tensor at its start."""
    made = ExpertMixture(width, config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return made


def affine_softmax(router: torch.nn.Linear | None, x: Tensor) -> Tensor:
    assert router is not None
    return (x @ router.weight.T + router.bias).softmax(-1)


def keep(row: Tensor, size: float, largest: bool) -> Tensor:
    """A 1-D row with its ``int(size)`` largest or smallest entries, by torch.topk."""
    values, indices = torch.topk(row, int(size + 1e-9), largest=largest)
    return torch.zeros_like(row).scatter(0, indices, values)


def by_hand(made: ExpertMixture, x: Tensor) -> Tensor:
    """The released adapter's computation, token by token (with the identity for ReLU, so that there are no ties)."""
    config = made.config
    half = torch.stack([keep(row, x.shape[-1] / 2, config.dag_reads == "high") for row in x.flatten(0, 1)])
    weights = affine_softmax(made.dag.router, half.view_as(x))
    raised = affine_softmax(made.asg.router, x).mean(dim=(0, 1))
    out = torch.zeros_like(x)
    for expert, base in enumerate([1 / 4, 1 / 2, 1 / 4, 1 / 2]):
        hidden = x @ made.down_weight[expert].T + made.down_bias[expert]
        size = hidden.shape[-1] * (base + 0.1 * float(raised[expert].detach()))
        hidden = torch.stack([keep(row, size, expert > 1) for row in hidden.flatten(0, 1)]).view_as(hidden)
        up = 0.8 * (hidden @ made.up_weight[expert].T + made.up_bias[expert])
        out += weights[..., expert, None] * up
    return out


@pytest.mark.parametrize("reads", ["low", "high"])
def test_equals_the_published_computation(reads: str) -> None:
    made = mixture(ExpertsConfig(bottleneck=40, activation="identity", dag_reads=reads))
    x = tokens()
    torch.testing.assert_close(made(x), by_hand(made, x), rtol=1e-12, atol=1e-12)


def test_experts_of_a_sample_scope_count_over_all_its_tokens() -> None:
    config = ExpertsConfig(experts=2, bottleneck=8, scope="sample", dag=False, asg=False, activation="identity")
    made, x = mixture(config), tokens()
    out = torch.zeros_like(x)
    for expert, largest in enumerate([False, True]):
        hidden = x @ made.down_weight[expert].T + made.down_bias[expert]  # (B, T, 8)
        kept = torch.stack([keep(sample.flatten(), 5 * 8 / 2, largest).view_as(sample) for sample in hidden])
        out += 0.5 * 0.8 * (kept @ made.up_weight[expert].T + made.up_bias[expert])
    torch.testing.assert_close(made(x), out, rtol=1e-12, atol=1e-12)


def test_adds_nothing_at_first() -> None:
    assert torch.equal(ExpertMixture(WIDTH, ExpertsConfig())(tokens().float()), torch.zeros(3, 5, WIDTH))


def test_without_dropout_and_gates_it_is_a_mean_of_bottlenecks() -> None:
    made, x = mixture(ExpertsConfig(sdd=False, dag=False, asg=False)), tokens()
    assert [name for name, _ in made.named_parameters() if "router" in name] == []
    hidden = torch.einsum("btd,ehd->bteh", x, made.down_weight) + made.down_bias
    expected = torch.einsum("bteh,edh->bted", hidden.relu(), made.up_weight) + made.up_bias
    torch.testing.assert_close(made(x), 0.8 * expected.mean(dim=2))


@pytest.mark.parametrize("experts", [2, 4, 8, 16])
@pytest.mark.parametrize("changes", [{}, {"top_k": 2}, {"sdd": False}, {"dag": False}, {"asg": False}])
def test_every_ablation_runs_and_reaches_its_tensors(experts: int, changes: dict[str, Any]) -> None:
    config = ExpertsConfig(experts=experts, dropout="straight_through", **changes)
    made = mixture(config)
    made(tokens()).square().sum().backward()
    missing = {name for name, tensor in made.named_parameters() if tensor.grad is None or not tensor.grad.any()}
    assert missing == set()


def test_hard_dropout_teaches_the_sparsity_gate_nothing() -> None:
    made = mixture(ExpertsConfig())
    made(tokens()).sum().backward()
    assert made.asg.router is not None and made.asg.router.weight.grad is None
    assert made.dag.router is not None and made.dag.router.weight.grad is not None


@pytest.mark.parametrize("level", ["token", "sample", "batch"])
def test_soft_mixture_gradients(level: str) -> None:
    config = ExpertsConfig(experts=2, bottleneck=2, dropout="soft", activation="gelu", asg_level=level, temperature=0.5)
    made, x = mixture(config, width=3), tokens(2, 2, 3).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, tensors, strict=True)), (x,))

    inputs = (x, *(tensor.detach().requires_grad_() for tensor in made.parameters()))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_top_k_softmax_chooses_exactly_k() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 3.0, 2.0, 5.0]])
    weights = top_k_softmax(logits, 2)
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(weights[1, [1, 3]], torch.tensor([3.0, 5.0]).softmax(0))
    assert torch.equal(top_k_softmax(logits, 4), logits.softmax(-1))


def test_domain_gate_levels() -> None:
    x = tokens()
    gate = DomainAwareGate(WIDTH, ExpertsConfig(dag_level="sample", dag_reads="all")).double()
    assert gate(x).shape == (3, 1, 4)
    torch.testing.assert_close(gate(x), affine_softmax(gate.router, x.mean(dim=1, keepdim=True)))
    uniform = DomainAwareGate(WIDTH, ExpertsConfig(dag=False))(x)
    assert torch.equal(uniform, torch.full((3, 1, 4), 0.25, dtype=torch.float64))


def test_sparsity_gate_levels() -> None:
    x = tokens()
    gates = {
        level: ActivationSparsityGate(WIDTH, ExpertsConfig(asg_level=level)).double()
        for level in ("token", "sample", "batch")
    }
    for gate in gates.values():
        gate.load_state_dict(gates["token"].state_dict())
    shares = {level: gate(x) for level, gate in gates.items()}
    assert {level: tuple(share.shape) for level, share in shares.items()} == {
        "token": (3, 5, 4),
        "sample": (3, 1, 4),
        "batch": (1, 1, 4),
    }
    torch.testing.assert_close(shares["sample"], shares["token"].mean(dim=1, keepdim=True))
    torch.testing.assert_close(shares["batch"], shares["token"].mean(dim=(0, 1), keepdim=True))
    raised = shares["token"] - torch.tensor([0.25, 0.5, 0.25, 0.5])
    torch.testing.assert_close(raised.sum(-1), torch.full((3, 5), 0.1, dtype=torch.float64))
    alone = ActivationSparsityGate(WIDTH, dataclasses.replace(ExpertsConfig(), asg=False))
    assert alone(x).flatten().tolist() == [0.25, 0.5, 0.25, 0.5]


@pytest.mark.parametrize("level", ["token", "sample"])
def test_without_batch_level_an_image_does_not_depend_on_its_neighbours(level: str) -> None:
    made, x = mixture(ExpertsConfig(asg_level=level, dag_level=level)), tokens()
    torch.testing.assert_close(made(x)[:1], made(x[:1]))
