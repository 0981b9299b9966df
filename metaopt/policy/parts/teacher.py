r"""The teacher of a student that adapts: a running mean of its tensors, a pull towards an anchor, and random restores.

One batch, as MoASE's released code runs it (RoyZry98/MoASE-Pytorch, after CoTTA, CVPR 2022):

1. predict with the teacher, on the batch or as the mean over augmented views (CoTTA); the loss is the cross-entropy of
   the student's prediction with the teacher's, plus :func:`proximal_loss`;
2. update the student;
3. :math:`\theta^T \leftarrow \alpha\theta^T + (1-\alpha)\theta^S` (:func:`update_teacher`);
4. set each scalar of the student back to its initial value with probability 1 % (:func:`restore`).

Only the adapted tensors have a teacher. All others are the same in teacher and student, so both use the model's own,
through ``torch.func.functional_call``: there is no second copy of a frozen network. Initial values are the source
model's own tensors, which adaptation never changes, so they need no copy either.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.data.seeding import generator_for
from metaopt.errors import check_one_of, check_range
from metaopt.experts.adapter import split_experts
from metaopt.policy.part import Part
from metaopt.policy.step import StepContext, augmented_by
from metaopt.types import ForwardOutput, Parameters, widened

ANCHORS = ("teacher", "initial")
GROUPS = ("tensor", "expert")


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher; the defaults are those of MoASE's released code.

    Attributes:
        momentum: α of the running mean; 1 keeps the teacher at the source.
        restore: probability with which a scalar goes back to its initial value after each update; 0: never.
        proximal: weight of the proximal loss, μ/2 in the paper; 0 switches it off.
        squared: whether distances in it are squared; published: not.
        group: what one distance is taken over: each "tensor" of each expert (released), or all of an "expert" (paper).
        anchor: where the distances start: the running "teacher" (released) or the "initial" values. At the first batch
            both are the same.
        views: augmented views of a batch that the teacher's logits are the mean of (CoTTA: 32); 0: the images as they
            are. Then teacher and student agree at the start, where the cross-entropy has no gradient.
        sure_above: mean confidence of the source model on a batch above which the teacher sees the images as they are
            after all (CoTTA: 0.92 on CIFAR-10-C); 1: never.
        seed: of the restores and the views, added to the policy's.
        predicts: whether predictions are the teacher's, or the student's.

    Raises:
        ConfigError: a value is out of range.
    """

    momentum: float = 0.999
    restore: float = 0.01
    proximal: float = 0.5
    squared: bool = False
    group: str = "tensor"
    anchor: str = "teacher"
    views: int = 0
    sure_above: float = 1.0
    seed: int = 0
    predicts: bool = False

    def __post_init__(self) -> None:
        """Check every value against its range."""
        for name in ("momentum", "restore", "sure_above"):
            check_range(f"teacher.{name}", getattr(self, name), 0, 1, example="0.01")
        check_range("teacher.views", self.views, 0, example="0")
        check_range("teacher.proximal", self.proximal, 0, example="0.5")
        check_one_of("teacher.anchor", self.anchor, ANCHORS)
        check_one_of("teacher.group", self.group, GROUPS)


class TeacherState(NamedTuple):
    """What the teacher remembers: one float for each adapted scalar, and one counter."""

    average: Parameters  # θ^T, the running mean of the adapted tensors, by name
    step: Tensor  # scalar int64: updates so far


def init_teacher(parameters: Parameters) -> TeacherState:
    """The teacher before the first batch: the same values, in tensors of its own."""
    device = next(iter(parameters.values())).device
    average = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    return TeacherState(average, torch.zeros((), dtype=torch.int64, device=device))


def update_teacher(config: TeacherConfig, state: TeacherState, parameters: Parameters) -> TeacherState:
    """The teacher after an update of the student; constant in it, for no gradient goes through a teacher."""
    with torch.no_grad():
        average = {
            name: torch.lerp(tensor.detach(), state.average[name], config.momentum)
            for name, tensor in parameters.items()
        }
    return TeacherState(average, state.step + 1)


class Teacher(Part):
    """A running mean of the adapted tensors: it teaches the student, pulls experts, and may predict in its place."""

    Config = TeacherConfig
    name = "teacher"

    def init(self, parameters: Parameters) -> TeacherState:
        """The teacher before the first batch."""
        return init_teacher(parameters)

    def teach(self, context: StepContext) -> Tensor:
        """The teacher's logits (B, C), without gradients; of several views, their mean."""
        if "teacher_logits" not in context.signals:
            with torch.no_grad():
                context.signals["teacher_logits"] = self._logits(context)
        return context.signals["teacher_logits"]

    def _logits(self, context: StepContext) -> Tensor:
        config, average = self.config, context.state[self.name].average
        if config.views == 0 or (config.sure_above < 1 and self._confidence(context) > config.sure_above):
            return context.forward(parameters=average).logits
        logits = []
        for index in range(config.views):
            randomness = generator_for("teacher view", config.seed + context.policy.seed, context.position, index)
            logits.append(context.forward(augmented_by(context.images, randomness), average).logits)
        return torch.stack(logits).mean(dim=0)

    def _confidence(self, context: StepContext) -> float:
        """Mean probability that the source gives to the class that it predicts."""
        context.count(context.images, {})
        with context.autocast():
            logits = widened(context.model(context.images, **context.statistics).logits)
        return logits.softmax(dim=1).amax(dim=1).mean().item()

    def predict(self, context: StepContext) -> Tensor | None:
        """The teacher's logits, where it predicts."""
        return self.teach(context) if self.config.predicts else None

    def terms(self, context: StepContext, _output: ForwardOutput) -> dict[str, tuple[float, Tensor]]:
        """The pull of the experts towards the anchor, where some adapt."""
        if self.config.proximal == 0 or not split_experts(context.parameters):
            return {}
        anchor = context.state[self.name].average if self.config.anchor == "teacher" else context.start
        return {"proximal": (self.config.proximal, proximal_loss(self.config, context.parameters, anchor))}

    def settle(self, context: StepContext) -> None:
        """The teacher takes its share of the student, and a few scalars of the student go back.

        Where the update was in place (the tensors are leaves), so is this.
        """
        state, parameters = context.state[self.name], context.parameters
        context.remember(self.name, update_teacher(self.config, state, parameters))
        in_place = all(tensor.is_leaf for tensor in parameters.values())
        with torch.no_grad() if in_place else nullcontext():
            config = replace(self.config, seed=self.config.seed + context.policy.seed)
            restored = restore(config, parameters, context.start, state.step)
            if not in_place:
                context.parameters = restored
                return
            for name, tensor in parameters.items():
                tensor.copy_(restored[name])

    def exported(self, parameters: Parameters, state: TeacherState) -> Parameters:
        """The teacher's, where it predicts."""
        return state.average if self.config.predicts else parameters


def proximal_loss(config: TeacherConfig, parameters: Parameters, anchor: Parameters) -> Tensor:
    r"""Homeostatic-proximal loss: :math:`\sum_e \lVert\theta_e - \theta^{anchor}_e\rVert`, unweighted (equation 5).

    Over the experts' own tensors, not their gates. Where student and anchor are the same, the distance is not
    differentiable; its first and second derivatives are zero there.

    Args:
        config: says whether distances are squared, and what one is taken over.
        parameters: adapted tensors of the student.
        anchor: the teacher's or the initial ones, under the same names.
    """
    anchors = split_experts(anchor)
    distances: list[Tensor] = []
    for site, tensors in split_experts(parameters).items():
        squares = [(tensor - anchors[site][role]).square() for role, tensor in tensors.items()]
        # (E,) each: the first axis counts the experts.
        per_tensor = [square.flatten(1).sum(dim=1) for square in squares]
        distances += [torch.stack(per_tensor).sum(dim=0)] if config.group == "expert" else per_tensor
    if not distances:
        return next(iter(parameters.values())).new_zeros(())
    squared = torch.cat(distances)
    if config.squared:
        return squared.sum()
    positive = squared > 0
    # Two wheres: with the outer one alone, the derivative of sqrt(0) would still come back as 0 · inf = NaN.
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0).sum()


def restore(config: TeacherConfig, parameters: Parameters, initial: Parameters, step: Tensor | int) -> Parameters:
    """Parameters with a random few set back to their initial values.

    Which ones depends on the seed, on the step and on the tensor's name alone: the same in every process and on every
    device, also where a run was saved and goes on.

    Args:
        config: probability and seed.
        parameters: of the student, after its update.
        initial: values to go back to.
        step: how many updates there were before, `TeacherState.step`.
    """
    if config.restore == 0:
        return parameters
    restored: Parameters = {}
    for name, tensor in parameters.items():
        draws = torch.rand(tensor.shape, generator=generator_for("restore", config.seed, int(step), name))
        restored[name] = torch.where((draws < config.restore).to(tensor.device), initial[name].to(tensor), tensor)
    return restored
