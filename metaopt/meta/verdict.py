r"""What the verdict learns from: clean images under shifts of our own, whose clean prediction is the truth.

A *cell* is a short stream of shifted images that the method adapts on: the signals of
`metaopt.policy.parts.verdict`, and how often the adapted model and the source differ there from what the source
predicts of the clean images. The latter is not the error: on images that a network was trained on it is surer, and more
often right, than it will be on others, and where shifts are weak its own mistakes count as truths. So the regression

- learns from cells whose images the model gets wrong often, where all that matters little, and extrapolates,
- counts with the source's error :math:`e_0` on the clean images: of their predictions at the temperature T at which the
  mean confidence is :math:`1 - e_0`, each other prediction is wrong with probability :math:`1 - p_T`. What the fitted
  regression says of clean images is :math:`e_0`; the two are found together, by iterating.

Its spread is that of the cells' errors in logits, each estimated without the cells that share a shift with it. In
*harmed* cells entropy is minimised by Adam at far too large a rate, on streams that are skewed by class half of the
time: what adaptation looks like where it does harm.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from metaopt.data import shift_names
from metaopt.data.images import validate_images
from metaopt.data.seeding import generator_for
from metaopt.data.shifts import EXTRA, META, SELECTION, WIDE, Shift
from metaopt.errors import ConfigError
from metaopt.evaluation import progress
from metaopt.meta.task_config import TaskConfig
from metaopt.meta.tasks import Task, TaskSampler
from metaopt.meta.verdict_regression import Cell, regression
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.optimizers.adam import Adam
from metaopt.optimizers.update import InPlaceApply, is_finite
from metaopt.parameters import own_values
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.verdict import VerdictPart
from metaopt.policy.step import adaptation_step

CLEAN_CELLS = 4
HARMED = 0.25  # cells of a harmed model, beside one that is only shifted
HARMFUL = (0.005, 0.15)  # rates of what harms, log-uniform
KEPT = ("batch_statistics", "experts", "initialization")  # parts without which the network would be another
STEPS = 4  # batches of a cell that count, behind one to begin with


def fit_verdict(
    model: nn.Module,
    policy: AdaptationPolicy,
    images: Tensor,
    *,
    shifts: Sequence[str | Shift] | None = None,
    mirrored: bool | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Teach the part ``verdict`` of a method what errors look like; the same for the same seed. Nothing else changes.

    Args:
        model: the source model.
        policy: method with the part, ready to be deployed.
        images: clean unlabeled images of the source, (n, 3, H, W) in [0, 1]; 128 are enough.
        shifts: what to learn from; None: those that policies are meta-trained and selected on, and occlusion.
        mirrored: mirror half of the images; None: as in the policy's meta-training, and yes without one.
        seed: of all that is drawn.
        quiet: show no progress bar.

    Raises:
        ConfigError: the method has no such part, or never updates.
        DataError: the images have the wrong shape, type or range.
    """
    part = policy.part(VerdictPart.name)
    if not isinstance(part, VerdictPart):
        raise ConfigError(
            f"method {policy.method!r} has no part verdict, which is to be fitted; allowed is one that has: set "
            "parts={'verdict': True}"
        )
    if policy.rule is None:
        raise ConfigError(
            f"the part verdict judges what a method has adapted, and method {policy.method!r} never updates; allowed "
            "are methods that do: set method.parts.verdict=false"
        )
    source = model if isinstance(model, SourceModel) else SourceModel(model)
    images = validate_images(images, source.spec.channels).to(source.mean.device)
    mirrored = policy.training.get("config", {}).get("flip") if mirrored is None else mirrored
    config = TaskConfig(batch_size=min(64, len(images)), flip=mirrored, occlusion=0.0, clean_view="augmented")
    named = shifts or [name for family in (META, WIDE, SELECTION, EXTRA) for name in shift_names(family)]
    jobs = _jobs(source, policy, images, named, config, part.config.cells, generator_for("verdict", seed))
    found: list[list[Cell]] = []
    with progress(sum(map(len, jobs)), "Fitting the verdict", quiet=quiet) as bar:
        for kind in jobs:
            found.append([])
            for run, task in kind:
                cell = run(task)
                found[-1] += [cell] if bool(torch.isfinite(cell.logits).all()) else []  # a harmed model may end in NaN
                bar.update()
    for name, value in regression(*found)._asdict().items():
        setattr(part, name, value.to(getattr(part, name)))
    known = {shift.name for kind in jobs for _, task in kind for shift, _ in task.shifts}
    known |= set(policy.training.get("verdict_shifts", ()))
    policy.training = {**policy.training, "verdict_shifts": sorted(known)}


def _jobs(
    source: SourceModel,
    policy: AdaptationPolicy,
    images: Tensor,
    named: Sequence[str | Shift],
    config: TaskConfig,
    cells: int,
    randomness: torch.Generator,
) -> list[list[tuple[Callable[[Task], Cell], Task]]]:
    """The cells to be run, of shifted, of harmed and of clean ones: what runs each, and its task."""
    kinds = (
        (config, cells),
        (replace(config, skewed=0.5, clean=0.2), round(HARMED * cells)),
        (replace(config, clean=1.0), CLEAN_CELLS),
    )
    plain, teacher, jobs = _runner(source, policy), _probabilities(source), []
    for index, (own, count) in enumerate(kinds):
        sampler = TaskSampler(images, named, own, teacher)
        tasks = [sampler.sample(STEPS, randomness) for _ in range(count)]
        if index == 1:
            low, high = (math.log(rate) for rate in HARMFUL)
            drawn = torch.rand(count, generator=randomness, dtype=torch.float64) * (high - low) + low
            jobs.append(
                [(_runner(source, harmed(policy, math.exp(rate))), t) for rate, t in zip(drawn, tasks, strict=True)]
            )
        else:
            jobs.append([(plain, task) for task in tasks])
    return jobs


def _probabilities(source: SourceModel) -> Callable[[Tensor], Tensor]:
    def predict(images: Tensor) -> Tensor:
        with torch.no_grad():
            return source(images).logits.softmax(dim=1)

    return predict


def _runner(source: SourceModel, policy: AdaptationPolicy) -> Callable[[Task], Cell]:
    """What runs the method on a task, as deployment does, from the start."""
    model = policy.attach(source).requires_grad_(False)
    values = own_values(model, policy.layout(model).names)
    like = next(iter(values.values()))
    method = copy.deepcopy(policy).to(like.device, like.dtype).requires_grad_(False)
    judged = [part.name for part in method.listed if VerdictPart in (type(part), *part.uses)]
    for name in (*judged, "pruning"):  # what is to be fitted, who would ask it, and what has nothing to choose
        if name in method.parts:
            del method.parts[name]
    assert method.rule is not None
    apply = InPlaceApply(method.rule, is_finite)

    def run(task: Task) -> Cell:
        start = {name: tensor.detach() for name, tensor in method.start(values).items()}
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        state, told = method.init(parameters), []
        for position, batch in enumerate(task):
            with torch.enable_grad():
                parameters, state, output = adaptation_step(
                    method, model, parameters, state, batch.images, apply, position, start=start
                )
            if batch.targets is None:
                continue
            with torch.no_grad():
                logits = torch.stack([output.logits.detach(), source(batch.images).logits.to(output.logits)])
            told.append((logits.double().cpu(), batch.targets.double().cpu()))
        logits, truth = (torch.cat(each, dim=dim) for each, dim in zip(zip(*told, strict=True), (1, 0), strict=True))
        return Cell(logits, truth, frozenset(shift.name for shift, _ in task.shifts))

    return run


def harmed(policy: AdaptationPolicy, rate: float) -> AdaptationPolicy:
    """A method that adapts what ``policy`` does, and far too much: Adam on the entropy at that rate."""
    parts = [part for part in policy.listed if part.name in KEPT]
    objective = WeightedObjective({"entropy": 1.0})
    return AdaptationPolicy("harmed", objective, Adam(lr=rate), parts, policy.adapts, policy.seed, policy.layers)
