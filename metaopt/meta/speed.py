"""What meta-training costs: time of an unrolled step and bytes held, beside one forward-backward pass of the model."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from metaopt.evaluation import MemoryMeter
from metaopt.evaluation.timing import synchronize
from metaopt.meta.loss import build_meta_loss
from metaopt.meta.meta_gradient import meta_gradient
from metaopt.meta.tasks import TaskSampler
from metaopt.meta.trainer import MetaTrainer
from metaopt.meta.unroll import UnrollConfig
from metaopt.optimizers.backends import BACKENDS, build_backend
from metaopt.optimizers.update import gradients_of
from metaopt.parameters import detached
from metaopt.policy.without_step import evaluate_on

# Meta-loss, and whether the teacher's view is cached or predicted anew for each augmented batch.
LOSSES = {
    "unsupervised": ("unsupervised", "cached"),
    "clean_teacher, cached": ("clean_teacher", "cached"),
    "clean_teacher, augmented": ("clean_teacher", "augmented"),
}


@dataclass(frozen=True)
class SpeedRow:
    """Cost of one way of taking the meta-gradient."""

    backend: str
    gradient: str
    loss: str
    seconds_per_step: float  # median
    ratio: float  # to one forward-backward pass of the model on the same batch size: median of pairs in turn


def measure_speed(
    trainer: MetaTrainer, *, steps: int, repeats: int = 5, on_row: Callable[[SpeedRow], None] | None = None
) -> list[SpeedRow]:
    """Time ``steps`` unrolled steps, the making of their batches included, for each backend, gradient and meta-loss.

    Args:
        trainer: gives model, images, policy and task settings.
        steps: K.
        repeats: pairs of an unroll and a plain forward-backward pass, in turn.
        on_row: called after each row.
    """
    rows = []
    for gradient in ("first_order", "full"):
        for loss in LOSSES if gradient == "first_order" else ["clean_teacher, cached"]:
            for backend in BACKENDS:
                unroll = _unroll(trainer, backend, gradient, loss, steps)
                pairs = _in_turn(trainer, unroll, repeats)
                seconds = [unrolled / steps for unrolled, _ in pairs]
                ratio = median(unrolled / steps / plain for unrolled, plain in pairs)
                rows.append(SpeedRow(backend, gradient, loss, median(seconds), ratio))
                if on_row is not None:
                    on_row(rows[-1])
    return rows


def measure_memory(trainer: MetaTrainer, steps: int, gradient: str = "first_order") -> float:
    """Most MiB that autograd holds at once during the meta-gradient of one unroll of ``steps``."""
    own = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.parameters.values(), trainer.images]
    unroll = _unroll(trainer, "func", gradient, "clean_teacher, cached", steps)
    with MemoryMeter(own) as meter:
        unroll()
    return meter.peak_mib


def update_share(trainer: MetaTrainer, repeats: int = 5) -> float:
    """Share of the generator's update in an adaptation step (forward, backward, update): median of pairs in turn."""
    assert trainer.policy.rule is not None
    rule, state = trainer.rule, trainer.rule.init(trainer.parameters)
    gradients = {name: torch.randn_like(tensor) for name, tensor in trainer.parameters.items()}

    def update() -> None:
        with torch.no_grad():
            rule.update(gradients, state)

    pairs = _in_turn(trainer, update, repeats)
    return median(updating / (updating + plain) for updating, plain in pairs)


def forward_backward(trainer: MetaTrainer) -> Callable[[], object]:
    """One forward pass and the backward pass of the policy's objective to the adapted tensors."""
    leaves = detached(trainer.parameters)
    images = trainer.images[: trainer.config.batch_size]

    def run() -> object:
        output = evaluate_on(trainer.policy, trainer.model, leaves, images)
        assert output.loss is not None
        return gradients_of(output.loss, leaves)

    return run


def _unroll(trainer: MetaTrainer, backend: str, gradient: str, loss: str, steps: int) -> Callable[[], object]:
    meta_loss_name, clean_view = LOSSES[loss]
    tasks = replace(trainer.config, clean_view=clean_view, sizes=None, changing=0.0)  # of the plain pass's size
    meta_loss = build_meta_loss(meta_loss_name, trainer.config.tempered, trainer.config.balance)
    teacher = None if meta_loss.own_objective else trainer.teach
    sampler = TaskSampler(trainer.images, trainer.sampler.shifts, tasks, teacher, trainer.teach)
    randomness = torch.Generator().manual_seed(0)
    task = sampler.sample(steps, randomness)
    config = UnrollConfig(gradient, None, trainer.config.term_steps)
    apply = build_backend(backend, trainer.rule)

    def run() -> object:
        # Objective weights are learned with the clean teacher alone, as in the trainer.
        if trainer.policy.objective is not None:
            trainer.policy.objective.requires_grad_(not meta_loss.own_objective)
        return meta_gradient(
            trainer.policy,
            trainer.model,
            trainer.parameters,
            None,
            task,
            meta_loss,
            apply=apply,
            config=config,
            generator=randomness,
        )

    return run


def _in_turn(trainer: MetaTrainer, work: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    """Seconds of ``work`` and of a plain forward-backward pass, in turn, after a pair that warms up."""
    plain = forward_backward(trainer)
    return [(_timed(trainer, work), _timed(trainer, plain)) for _ in range(repeats + 1)][1:]


def _timed(trainer: MetaTrainer, work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    synchronize(trainer.images.device)
    start = time.perf_counter()
    work()
    synchronize(trainer.images.device)
    return time.perf_counter() - start
