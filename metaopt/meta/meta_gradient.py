r"""The meta-gradient of an unroll, taken in one of two ways.

``full``
    differentiates through everything, second derivatives of the network included.
``first_order``
    counts the network's gradients along the way as constants (:mod:`metaopt.meta.first_order`).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaopt.errors import ConfigError
from metaopt.meta.first_order import FirstOrderUnroll
from metaopt.meta.precision_gradient import BudgetTask
from metaopt.meta.unroll import MetaBatch, MetaGradient, MetaLoss, Unroll, UnrollConfig
from metaopt.optimizers.update import FuncApply
from metaopt.parameters import detached
from metaopt.policy.policy import AdaptationPolicy
from metaopt.policy.state import State, detached_state
from metaopt.policy.step import adaptation_step, evaluate, meet
from metaopt.types import ApplyUpdate, Parameters


def meta_gradient(
    policy: AdaptationPolicy,
    model: nn.Module,
    parameters: Parameters,
    state: State | None,
    batches: Sequence[MetaBatch],
    meta_loss: MetaLoss,
    *,
    apply: ApplyUpdate | None = None,
    config: UnrollConfig | None = None,
    generator: torch.Generator | None = None,
    budget: BudgetTask | None = None,
    lagrange_multiplier: float = 0.0,
    position: int = 0,
) -> MetaGradient:
    """Unroll the policy over K + 1 batches and differentiate the mean meta-loss in its learned tensors.

    Args:
        policy: policy with an update rule.
        model: source model.
        parameters: adapted tensors to start from; they are not changed.
        state: state to start from; None for a fresh one, whose learned start then takes part in the gradient.
        batches: K + 1 batches; the last is scored only.
        meta_loss: label-free score of a position.
        apply: differentiable update of a backend; default: ``func``.
        config: way of differentiation.
        generator: source of the steps at which each term's own gradient is taken, and that of the allocation.
        budget: what is asked of a learned allocation; None: it does not take part.
        lagrange_multiplier: what each update adds to the meta-loss whose gradient is taken, where a gate decides.
        position: number of batches that parameters and state have met before these, which views are drawn from.

    Raises:
        ConfigError: fewer than two batches, a policy that never updates, or ``full`` with an update gate.
    """
    config = config or UnrollConfig()
    _check(policy, batches, config)
    assert policy.rule is not None
    kind = FullUnroll if config.gradient == "full" else FirstOrderUnroll
    apply = apply or FuncApply(policy.rule)
    unroll = kind(policy, model, batches, meta_loss, apply, config, budget, generator, lagrange_multiplier, position)
    parameters, state = unroll.run(parameters, state)
    return MetaGradient(unroll.losses, unroll.gradients, parameters, state, unroll.opened)


def _check(policy: AdaptationPolicy, batches: Sequence[MetaBatch], config: UnrollConfig) -> None:
    """Refuse what cannot be unrolled and differentiated."""
    if len(batches) < 2:
        raise ConfigError(f"an unroll got {len(batches)} batches; it needs K + 1 >= 2: give at least two")
    if policy.rule is None:
        raise ConfigError(f"method {policy.method!r} never updates, so it has no meta-gradient: choose one with a rule")
    if hasattr(policy.rule, "ascend") and config.gradient != "full":
        raise ConfigError(
            "meta.gradient is first_order and the rule takes two passes; allowed is full: set meta.gradient=full"
        )
    if policy.part("update_gate") is not None and config.gradient == "full":
        raise ConfigError(
            "meta.gradient is full and the policy has an update gate, which has no derivative there; allowed is "
            "first_order: set meta.gradient=first_order"
        )


class FullUnroll(Unroll):
    """One unroll in progress, differentiated as a whole."""

    def run(self, parameters: Parameters, state: State | None) -> tuple[Parameters, State]:
        """Differentiate through every step, network included, segment by segment."""
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for start, stop in self.segments():
                parameters = detached(parameters)
                if state is None:
                    parameters = self.begin(parameters)
                state = self.policy.init(parameters) if state is None else detached_state(state)
                scores = []
                for position in range(start, stop + 1):
                    batch, now = self.batches[position], parameters
                    if position < stop:
                        met = self.first_position + position
                        parameters, state, output = adaptation_step(
                            self.policy, self.model, now, state, batch.images, self.apply, met
                        )
                    else:
                        context = self.context(now, state, position)
                        meet(context)
                        output = evaluate(context)
                    if position > start:
                        scores.append(self.meta_loss(output, batch))
                self.losses.extend(score.detach() for score in scores)
                self.accumulate(torch.stack(scores).sum())
        assert state is not None
        return detached(parameters), detached_state(state)
