"""Meta-training: learn the policy's generator, step sizes and objective weights on a few unlabeled images."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.data.shifts import META, WIDE, Shift, shift_names
from metaopt.errors import CheckpointError, DataError
from metaopt.evaluation import Monitor, curve_figure
from metaopt.meta.budget_tasks import BudgetTasks
from metaopt.meta.build_policy import build_policy
from metaopt.meta.config import MetaTrainConfig
from metaopt.meta.continued_task import ContinuedTask
from metaopt.meta.evaluate import unrolled_loss
from metaopt.meta.gate_share import asked_share
from metaopt.meta.loss import build_meta_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.optimizer import MetaOptimizer
from metaopt.meta.selection import held_out_tasks, selection_loss
from metaopt.meta.task_config import TaskConfig
from metaopt.meta.tasks import Task, TaskSampler, Window
from metaopt.meta.trainer_state import TrainerState, next_multiplier
from metaopt.meta.unroll import learned_groups
from metaopt.meta.warm_start import begin_with, freeze, unscale
from metaopt.models import SourceModel
from metaopt.optimizers.backends import build_backend
from metaopt.optimizers.mgg import GradientGenerator
from metaopt.policy import AdaptationPolicy
from metaopt.policy.state import State
from metaopt.types import Parameters


class MetaTrainer:
    """Learns one policy. :meth:`run` may be called again, in this process or after :meth:`load_state_dict` in another.

    Args:
        model: source model; it stays as it is.
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
        self.source, self.images = model, images
        self.monitor = monitor or Monitor(None)
        self.meta_loss = build_meta_loss(config.loss, config.tempered, config.balance)
        shifts = shifts or config.shifts or (*shift_names(META), *shift_names(WIDE))
        teacher = None if self.meta_loss.own_objective else self.teach  # where nobody asks, it need not predict
        self.sampler = TaskSampler(images, shifts, config, teacher, self.teach)
        self.selection = held_out_tasks(
            images, self.teach, config, config.selection_shifts, config.selection_tasks, config.steps
        )
        self.policy, self.model, self.parameters = build_policy(model, images, config)
        assert isinstance(self.policy.rule, GradientGenerator)
        begin_with(self.policy, start, model)
        self.start_shifts = frozenset() if start is None else start.known_shifts
        freeze(self.policy, config.frozen, config.only, on_top=start is not None)
        unscale(self.policy, start)
        self.rule = self.policy.rule
        self.apply = build_backend(config.backend, self.rule)
        self.optimizer = MetaOptimizer(self.policy, config)
        self.randomness = generator_for("meta-training", config.seed)
        self.progress = TrainerState()
        self.best = self._weights()
        self.continued: ContinuedTask | None = None  # where the last task ended
        self.budgets: BudgetTasks | None = None
        if config.learns_precision:
            self.budgets = BudgetTasks(self.model, self.policy, self.parameters)

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
        progress, config = self.progress, self.config
        last = config.epochs if stop_after is None else min(config.epochs, progress.epoch + stop_after)
        if not progress.selection:
            self._select()
        while progress.epoch < last:
            while progress.unroll < config.unrolls:
                loss = self._unroll(config.steps_at(progress.epoch))
                progress.unroll += 1
                if on_unroll is not None:
                    on_unroll(loss)
            progress.epoch, progress.unroll = progress.epoch + 1, 0
            if config.is_scored(progress.epoch):
                self._select()
            if on_epoch is not None:
                on_epoch()
        return self.best_policy()

    def best_policy(self) -> AdaptationPolicy:
        """A copy of the policy, with the weights that model selection kept; the latest, before any epoch was scored."""
        policy, chosen = copy.deepcopy(self.policy), len(self.progress.selection) > 1
        if chosen:
            policy.load_state_dict(self.best)
        assert isinstance(policy.rule, GradientGenerator)
        policy.rule.scale_step_sizes(self.config.deploy_step_scale)
        policy.training = {
            "config": self.config.to_dict(),
            "shifts": [shift.name for shift in self.sampler.shifts],
            "start_shifts": sorted(self.start_shifts),
            "epochs": self.progress.epoch,
            "best_epoch": self.progress.best_epoch if chosen else self.progress.epoch,
            "selection": list(self.progress.selection),
            "skipped": self.progress.skipped,
        }
        return policy

    def state_dict(self) -> dict[str, Any]:
        """All that another trainer needs to go on bit-identically: tensors and primitives, copied."""
        return {
            "config": self.config.to_dict(),
            "source": self.policy.source.sha256 if self.policy.source else "",
            "shifts": [shift.name for shift in self.sampler.shifts],
            "start_shifts": sorted(self.start_shifts),
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "randomness": self.randomness.get_state(),
            "progress": {**vars(self.progress), "selection": list(self.progress.selection)},
            "best": dict(self.best),
            "continued": None if self.continued is None else self.continued.to_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: it was taken under other settings, from another model, or is damaged; nothing has changed.
        """
        before = self.state_dict()
        try:
            # A setting that a file of an older release lacks was then as plain tasks have it, or changes nothing.
            config = {**MetaTrainConfig().to_dict(), **asdict(TaskConfig()), **values["config"]}
            differing = sorted(
                key
                for key, value in self.config.to_dict().items()
                if config[key] != value and not key.startswith("report_")  # of the closing table alone
            )
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
        except CheckpointError:
            raise
        except Exception as error:  # values of any type can raise nearly anything
            self._restore(before)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"the run to resume is damaged ({reason}); start a new run") from error

    def _restore(self, values: dict[str, Any]) -> None:
        """Take over copies of a state's parts; an error may leave some of them taken."""
        if not all(bool(torch.isfinite(t).all()) for part in ("best", "weights") for t in values[part].values()):
            raise ValueError("its weights hold NaN or infinity")
        self.policy.load_state_dict(values["best"])  # only to see whether they fit
        self.policy.load_state_dict(values["weights"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.randomness.set_state(values["randomness"])
        self.progress = TrainerState(**{**values["progress"], "selection": list(values["progress"]["selection"])})
        self.best = {name: tensor.clone() for name, tensor in values["best"].items()}
        continued = values["continued"]
        self.continued = None if continued is None else ContinuedTask.from_dict(continued, self.policy)
        self.start_shifts |= frozenset(values.get("start_shifts", ()))  # which files of older releases lack

    def evaluate(self, tasks: Sequence[Task], policy: AdaptationPolicy | None = None) -> Tensor:
        """Mean of the meta-loss over the positions of each task, (tasks,)."""
        policy = policy or self.policy
        scores = [unrolled_loss(policy, self.model, self.parameters, task, self.meta_loss) for task in tasks]
        return torch.tensor([float(torch.stack(score).mean()) for score in scores])

    def _unroll(self, steps: int) -> float:
        """One task: meta-updates along it, or one at its end. Returns the mean meta-loss."""
        task = self.sampler.sample(steps, self.randomness)
        budget = None if self.budgets is None else self.budgets.sample(task.largest.images, self.randomness)
        length = min(self.config.update_every or steps, steps)
        parameters, state, met = self._begin()
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
                config=self.config,
                generator=self.randomness,
                budget=budget,
                lagrange_multiplier=self.progress.lagrange_multiplier,
                position=met + start,
            )
            self._price_updates(result.opened)
            parameters, state = result.parameters, result.state
            losses.extend(result.losses)
            self._update(result.loss, result.gradients, steps)
            if self.budgets is not None and budget is not None:
                over = self.budgets.over_budget(budget, result.state["pruning"])
                self.monitor.scalar("meta/bytes_over_budget", over, self.progress.updates)
        self.continued = ContinuedTask.of(parameters, state, met + steps)
        self._log_unroll(losses)
        return float(torch.stack(losses).mean())

    def _begin(self) -> tuple[Parameters, State | None, int]:
        """What a task begins with, the source's or what the task before it ended with: tensors, state, batches met."""
        if self.config.continues == 0:
            return self.parameters, None, 0
        goes_on = float(torch.rand((), generator=self.randomness)) < self.config.continues
        if self.continued is None or not goes_on:
            return self.parameters, None, 0
        return self.continued.parameters, self.continued.state, self.continued.position

    def _price_updates(self, opened: list[bool]) -> None:
        """Move the price of an update so that the gate comes to open as rarely as asked."""
        share, progress = self.config.gate_share, self.progress
        if share is not None and opened:
            rate, total = sum(opened) / len(opened), self.config.total_unrolls
            progress.lagrange_multiplier = next_multiplier(progress.lagrange_multiplier, rate, share, total)
            self.monitor.scalar("meta/update_rate", rate, progress.updates)
            self.monitor.scalar("meta/lagrange_multiplier", progress.lagrange_multiplier, progress.updates)

    def _update(self, loss: Tensor, gradients: dict[str, Tensor], steps: int) -> None:
        """One step of the meta-optimizer, unless the loss or a gradient is not finite."""
        progress = self.progress
        progress.updates += 1
        for group, names in learned_groups(self.policy).items():
            norm = torch.stack([gradients[name].square().sum() for name in names]).sum().sqrt()
            self.monitor.scalar(f"meta/grad_norm/{group}", norm, progress.updates)
        norm, taken = self.optimizer.step(loss, gradients, self.config.rate_share(progress.epoch, progress.unroll))
        progress.skipped += not taken
        self.monitor.scalar("meta/loss", loss, progress.updates)
        self.monitor.scalar(f"meta/loss_{self.config.loss}", loss, progress.updates)
        self.monitor.scalar("meta/grad_norm", norm, progress.updates)
        self.monitor.scalar("meta/steps", steps, progress.updates)
        self.monitor.scalar("meta/skipped", progress.skipped, progress.updates)

    def _log_unroll(self, losses: list[Tensor]) -> None:
        if self.progress.unroll == self.config.unrolls - 1:
            figure = curve_figure(
                [float(loss) for loss in losses], "Meta-loss along the unroll", "adaptation steps taken", "meta-loss"
            )
            self.monitor.figure("meta/loss_over_unroll", figure, self.progress.updates)

    def _select(self) -> None:
        """Score the weights on held-out tasks, without labels, and keep the best."""
        progress = self.progress
        policy, model, parameters, config = self.policy, self.model, self.parameters, self.config
        with asked_share(policy, model, parameters, self.selection, config.gate_share):
            loss = selection_loss(policy, model, parameters, config, self.selection, self.budgets)
            weights = self._weights()
        progress.selection.append(loss)
        self.monitor.scalar("meta/selection_loss", loss, progress.updates)
        if not self.config.select_best or loss < progress.best_loss:
            progress.best_loss, progress.best_epoch, self.best = loss, progress.epoch, weights

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.policy.state_dict().items()}

    def teach(self, images: Tensor) -> Tensor:
        """Class probabilities of the source model on clean images, (B, C)."""
        with torch.no_grad():
            return self.source(images).logits.softmax(dim=1)
