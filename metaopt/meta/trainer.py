"""Meta-training: learn the policy's generator, step sizes and objective weights on a few unlabeled images."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.data.shifts import META, WIDE, Shift, shift_names
from metaopt.errors import CheckpointError, DataError
from metaopt.evaluation import Monitor, curve_figure
from metaopt.generator import GradientGenerator
from metaopt.inner_loop import build_backend, meta_gradient, squares_by_part, unrolled_loss
from metaopt.meta.carry import Carried
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.counters import Counters, next_price
from metaopt.meta.fresh import fresh_policy
from metaopt.meta.gate_share import asked_share
from metaopt.meta.loss import build_meta_loss
from metaopt.meta.optimizer import MetaOptimizer
from metaopt.meta.rate_tasks import RateTasks
from metaopt.meta.selection import held_out_tasks, selection_loss
from metaopt.meta.tasks import Task, TaskSampler, Window
from metaopt.meta.warm_start import begin_with, freeze, unstride
from metaopt.models import SourceModel
from metaopt.policy import AdaptationPolicy, PolicyState
from metaopt.types import Parameters


class MetaTrainer:
    """Learns one policy. :meth:`run` may be called again, in this process or after :meth:`load_state_dict` in another.

    Args:
        model: source model; its tensors are frozen.
        images: clean unlabeled images, (n, 3, H, W) in [0, 1]; they also give the source statistics.
        shifts: what to adapt to in training: registered names or shifts; None: those of the ``meta`` and
            ``wide`` families.
        config: settings.
        monitor: where curves go; None: nowhere.
        start: policy of this model whose learned parts this one begins with; None: as published.

    Raises:
        ModelError: the model has nothing to adapt.
        DataError: fewer than two images.
    """

    def __init__(
        self,
        model: SourceModel,
        images: Tensor,
        shifts: Sequence[str | Shift] | None = None,
        config: MetaTrainConfig | None = None,
        monitor: Monitor | None = None,
        start: AdaptationPolicy | None = None,
    ) -> None:
        self.config = config = config or MetaTrainConfig()
        if len(images) < 2:
            raise DataError(f"meta-training got {len(images)} images; at least 2 are needed: give for example 128")
        self.source, self.images = model.requires_grad_(False), images
        self.monitor = monitor or Monitor(None)
        self.meta_loss = build_meta_loss(config.loss, config.tempered, config.balance)
        shifts = (*shift_names(META), *shift_names(WIDE)) if shifts is None else shifts
        teacher = None if self.meta_loss.own_objective else self.teach  # where nobody asks, it need not predict
        self.sampler = TaskSampler(images, shifts, config.tasks, teacher)
        self.selection = held_out_tasks(self, config.selection_shifts, config.selection_tasks, config.steps)
        self.policy, self.model, self.parameters = fresh_policy(model, images, config)
        assert isinstance(self.policy.rule, GradientGenerator)
        begin_with(self.policy, start, model)
        freeze(self.policy, config.frozen, config.only, on_top=start is not None)
        unstride(self.policy, start)
        self.rule = self.policy.rule
        self.apply = build_backend(config.backend, self.rule)
        self.optimizer = MetaOptimizer(self.policy, config)
        self.randomness = generator_for("meta-training", config.seed)
        self.counters = Counters()
        self.best = self._weights()
        self.carried: Carried | None = None  # where the last task ended
        self.rate_tasks = RateTasks(self.model, self.policy, self.parameters) if config.rates else None

    def run(
        self,
        stop_after: int | None = None,
        on_unroll: Callable[[float], None] | None = None,
        on_epoch: Callable[[], None] | None = None,
    ) -> AdaptationPolicy:
        """Train to the end, or for ``stop_after`` more epochs, and return the policy that is best so far.

        Args:
            stop_after: epochs in this call.
            on_unroll: called with the meta-loss after each unroll; whenever it is, :meth:`state_dict` is consistent.
            on_epoch: called after each epoch.
        """
        counters, config = self.counters, self.config
        last = config.epochs if stop_after is None else min(config.epochs, counters.epoch + stop_after)
        if not counters.selection:
            self._select()
        while counters.epoch < last:
            while counters.unroll < config.unrolls:
                loss = self._unroll(config.steps_at(counters.epoch))
                counters.unroll += 1
                if on_unroll is not None:
                    on_unroll(loss)
            counters.epoch, counters.unroll = counters.epoch + 1, 0
            if config.scores(counters.epoch):
                self._select()
            if on_epoch is not None:
                on_epoch()
        return self.best_policy()

    def best_policy(self) -> AdaptationPolicy:
        """A copy of the policy, with the weights that model selection kept; the latest, before any epoch was scored."""
        policy, chosen = copy.deepcopy(self.policy), len(self.counters.selection) > 1
        if chosen:
            policy.load_state_dict(self.best)
        assert isinstance(policy.rule, GradientGenerator)
        policy.rule.stride(self.config.stride)
        policy.training = {
            "config": self.config.to_dict(),
            "shifts": [shift.name for shift in self.sampler.shifts],
            "epochs": self.counters.epoch,
            "best_epoch": self.counters.best_epoch if chosen else self.counters.epoch,
            "selection": list(self.counters.selection),
            "skipped": self.counters.skipped,
        }
        return policy

    def state_dict(self) -> dict[str, Any]:
        """All that another trainer needs to go on bit-identically: tensors and primitives, copied."""
        return {
            "config": self.config.to_dict(),
            "source": self.policy.source.sha256 if self.policy.source else "",
            "shifts": [shift.name for shift in self.sampler.shifts],
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "randomness": self.randomness.get_state(),
            "counters": {**vars(self.counters), "selection": list(self.counters.selection)},
            "best": dict(self.best),
            "carried": None if self.carried is None else self.carried.to_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: it was taken under other settings, from another model, or is damaged; nothing has changed.
        """
        before = self.state_dict()
        try:
            config = values["config"]
            differing = sorted(key for key, value in self.config.to_dict().items() if config.get(key) != value)
            if values["shifts"] != before["shifts"]:
                differing.append("shifts")
            if differing:
                raise CheckpointError(
                    f"the run to resume had other settings of {', '.join(differing)}; allowed are the same ones: "
                    "repeat its overrides, or start a new run"
                )
            if values["source"] != before["source"]:
                raise CheckpointError(
                    "the run to resume had another source model; allowed is the same: load its weights"
                )
            self._restore(values)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self._restore(before)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"the run to resume is damaged ({reason}); start a new run") from error

    def _restore(self, values: dict[str, Any]) -> None:
        """Take over copies of a state's parts; an error may leave some of them taken."""
        self.policy.load_state_dict(values["best"])  # only to see whether they fit
        self.policy.load_state_dict(values["weights"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.randomness.set_state(values["randomness"])
        self.counters = Counters(**{**values["counters"], "selection": list(values["counters"]["selection"])})
        self.best = {name: tensor.clone() for name, tensor in values["best"].items()}
        carried = values["carried"]
        self.carried = None if carried is None else Carried.from_dict(carried, self.policy)

    def evaluate(self, tasks: Sequence[Task], policy: AdaptationPolicy | None = None) -> Tensor:
        """Mean of the meta-loss over the positions of each task, (tasks,)."""
        policy = policy or self.policy
        scores = [unrolled_loss(policy, self.model, self.parameters, task, self.meta_loss) for task in tasks]
        return torch.tensor([float(torch.stack(score).mean()) for score in scores])

    def _unroll(self, steps: int) -> float:
        """One task: meta-updates along it, or one at its end. Returns the mean meta-loss."""
        task = self.sampler.sample(steps, self.randomness)
        rates = None if self.rate_tasks is None else self.rate_tasks.sample(task[0].images, self.randomness)
        length = min(self.config.update_every or steps, steps)
        parameters, state = self._begin()
        losses: list[Tensor] = []
        for start in range(0, steps, length):
            result = meta_gradient(
                self.policy,
                self.model,
                parameters,
                state,
                Window(task, start, min(start + length, steps) + 1),
                self.meta_loss,
                apply=self.apply,
                config=self.config.unroll,
                generator=self.randomness,
                rates=rates,
                update_price=self.counters.update_price,
            )
            self._price_updates(result.opened)
            parameters, state = result.parameters, result.state
            losses.extend(result.losses)
            self._update(result.loss, result.gradients, steps)
            if self.rate_tasks is not None and rates is not None:
                over = self.rate_tasks.over_budget(rates, result.state.pruning)
                self.monitor.scalar("meta/bytes_over_budget", over, self.counters.updates)
        self.carried = Carried.of(parameters, state)
        self._log_unroll(losses)
        return float(torch.stack(losses).mean())

    def _begin(self) -> tuple[Parameters, PolicyState | None]:
        """Parameters and state that a task begins with: the source's, or those that the task before it ended with."""
        if self.config.carry == 0:
            return self.parameters, None
        goes_on = float(torch.rand((), generator=self.randomness)) < self.config.carry
        if self.carried is None or not goes_on:
            return self.parameters, None
        return self.carried.parameters, self.carried.state

    def _price_updates(self, opened: list[bool]) -> None:
        if self.config.update_rate is not None:
            rate, counters, total = sum(opened) / len(opened), self.counters, self.config.total_unrolls
            counters.update_price = next_price(counters.update_price, rate, self.config.update_rate, total)
            self.monitor.scalar("meta/update_rate", rate, counters.updates)
            self.monitor.scalar("meta/update_price", counters.update_price, counters.updates)

    def _update(self, loss: Tensor, gradients: dict[str, Tensor], steps: int) -> None:
        """One step of the meta-optimizer, unless the loss or a gradient is not finite."""
        counters = self.counters
        counters.updates += 1
        for part, square in squares_by_part(gradients).items():
            self.monitor.scalar(f"meta/grad_norm/{part}", square.sqrt(), counters.updates)
        norm, taken = self.optimizer.step(loss, gradients, self.config.rate_share(counters.epoch, counters.unroll))
        counters.skipped += not taken
        self.monitor.scalar("meta/loss", loss, counters.updates)
        self.monitor.scalar(f"meta/loss_{self.config.loss}", loss, counters.updates)
        self.monitor.scalar("meta/grad_norm", norm, counters.updates)
        self.monitor.scalar("meta/steps", steps, counters.updates)
        self.monitor.scalar("meta/skipped", counters.skipped, counters.updates)

    def _log_unroll(self, losses: list[Tensor]) -> None:
        if self.counters.unroll == self.config.unrolls - 1:
            figure = curve_figure(
                [float(loss) for loss in losses], "Meta-loss along the unroll", "adaptation steps taken", "meta-loss"
            )
            self.monitor.figure("meta/loss_over_unroll", figure, self.counters.updates)

    def _select(self) -> None:
        """Score the weights on held-out tasks, without labels, and keep the best."""
        counters = self.counters
        with asked_share(self):
            loss, weights = selection_loss(self, self.selection), self._weights()
        counters.selection.append(loss)
        self.monitor.scalar("meta/selection_loss", loss, counters.updates)
        if not self.config.select_best or loss < counters.best_loss:
            counters.best_loss, counters.best_epoch, self.best = loss, counters.epoch, weights

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}

    def teach(self, images: Tensor) -> Tensor:
        """Class probabilities of the source model on clean images, (B, C)."""
        with torch.no_grad():
            return self.source(images).logits.softmax(dim=1)
