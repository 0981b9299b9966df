r"""What the verdict learns from: clean images under shifts of our own, whose clean prediction is the truth.

A *cell* is a short stream of shifted images that the method adapts on: the signals of
`metaopt.policy.parts.verdict`, and how often the adapted model and the source differ there from what the source
predicts of the clean images. The latter is not the error: on images that a network was trained on it is surer, and more
often right, than it will be on others, and where shifts are weak its own mistakes count as truths. So the regression

- learns from cells whose images the source gets wrong often, where all that matters little, and extrapolates,
- counts with the source's error :math:`e_0` on the clean images: of their predictions at the temperature T at which the
  mean confidence is :math:`1 - e_0`, each other prediction is wrong with probability :math:`1 - p_T`. What the fitted
  regression says of clean images is :math:`e_0`; the two are found together, by iterating.

Its spread is that of the cells' errors in logits, each estimated without the cells that share a shift with it.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from metaopt.models import SourceModel
from metaopt.optimizers.update import InPlaceApply, is_finite
from metaopt.parameters import own_values
from metaopt.policy import AdaptationPolicy
from metaopt.policy.parts.verdict import SIGNALS, VerdictPart, after, nothing_seen, signals
from metaopt.policy.step import adaptation_step

CLEAN_CELLS = 4
STEPS = 4  # batches of a cell that count, behind one to begin with
LEAST_ERROR = 0.25  # of cells that are learned from
LEAST_CELLS = 16  # where fewer err that much, those of the larger errors are taken
RIDGE = 2.0  # on signals of mean 0 and variance 1
ROUNDS = 12  # until e_0 and the regression agree
INTERVAL = (0.005, 0.97)  # of shares of errors, before logits are taken
CLEAN_ERROR = (0.002, 0.5)  # of e_0


@dataclass(frozen=True)
class Cell:
    """What one short stream told; the probabilities are float64."""

    signals: Tensor  # x, (4,)
    predicted: Tensor  # classes that the adapted model and the source predict, (2, n)
    truth: Tensor  # what the source predicts of the clean images, (n, C)
    shifts: frozenset[str]  # by name; none: clean

    def error(self, temperature: float = 0.0) -> Tensor:
        """Share of the images that each model gets wrong, (2,), at T; at 0 the clean predictions are all right."""
        truth = sharpened(self.truth, temperature)
        return 1 - truth.gather(1, self.predicted.t()).mean(dim=0)


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
    shifted, clean = (
        TaskSampler(images, named, each, _probabilities(source)) for each in (config, replace(config, clean=1.0))
    )
    randomness, cells = generator_for("verdict", seed), part.config.cells
    tasks = [sampler.sample(STEPS, randomness) for sampler in [shifted] * cells + [clean] * CLEAN_CELLS]
    run = _runner(source, policy)
    with progress(len(tasks), "Fitting the verdict", quiet=quiet) as bar:
        found = []
        for task in tasks:
            found.append(run(task))
            bar.update()
    weights, spread = regression(found[:cells], found[cells:])
    part.weights, part.spread = weights.to(part.weights), spread.to(part.spread)
    known = {shift.name for task in tasks for shift, _ in task.shifts} | set(policy.training.get("verdict_shifts", ()))
    policy.training = {**policy.training, "verdict_shifts": sorted(known)}


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
    for name in (VerdictPart.name, "pruning"):  # of which the one is to be fitted, and the other has nothing to choose
        if name in method.parts:
            del method.parts[name]
    assert method.rule is not None
    apply, predict = InPlaceApply(method.rule, is_finite), _probabilities(source)

    def run(task: Task) -> Cell:
        start = {name: tensor.detach() for name, tensor in method.start(values).items()}
        parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        state, seen, told = method.init(parameters), nothing_seen(like.detach().double()), []
        for position, batch in enumerate(task):
            with torch.enable_grad():
                parameters, state, output = adaptation_step(
                    method, model, parameters, state, batch.images, apply, position, start=start
                )
            if batch.targets is None:
                continue
            adapted, own = output.logits.detach(), predict(batch.images)
            seen = after(seen, adapted, own.log(), torch.inf, torch.inf)
            told.append((torch.stack([adapted.argmax(dim=1), own.argmax(dim=1)]), batch.targets.double()))
        predicted, truth = (torch.cat(each, dim=dim) for each, dim in zip(zip(*told, strict=True), (1, 0), strict=True))
        names = frozenset(shift.name for shift, _ in task.shifts)
        return Cell(signals(seen).cpu(), predicted.cpu(), truth.cpu(), names)

    return run


def regression(shifted: Sequence[Cell], clean: Sequence[Cell]) -> tuple[Tensor, Tensor]:
    """Weights (2, 2, 5) and spread (2,) of `metaopt.policy.parts.verdict.VerdictPart`.

    Args:
        shifted: cells to learn from.
        clean: cells without a shift, whose error is to be found.
    """
    cells = [*shifted, *clean]
    x = torch.stack([cell.signals for cell in cells])
    plain = torch.stack([cell.error() for cell in cells])  # (cells, 2)
    used = [_erring(plain[: len(shifted), model]) for model in range(2)]
    truth = torch.cat([cell.truth for cell in clean])
    at_rest, clean_error = x[len(shifted) :], 0.1
    for _ in range(ROUNDS):
        temperature = temperature_of(truth, clean_error)
        own = _logit(torch.stack([cell.error(temperature)[1] for cell in shifted]))
        told = ridge(x[: len(shifted)][used[1]], own[used[1]])
        clean_error = float((at_rest @ told[1:] + told[0]).sigmoid().mean().clamp(*CLEAN_ERROR))
    errors = _logit(torch.stack([cell.error(temperature_of(truth, clean_error)) for cell in shifted]))
    pairs, spreads = [], []
    for model in range(2):
        chosen = used[model]
        extrapolated = ridge(x[: len(shifted)][chosen], errors[chosen, model])
        pairs.append(torch.stack([extrapolated, ridge(x, _logit(plain[:, model]))]))
        spreads.append(_spread([shifted[index] for index in chosen.tolist()], errors[chosen, model]))
    return torch.stack(pairs), torch.stack(spreads)


def _erring(error: Tensor) -> Tensor:
    """Indices of the cells that are learned from."""
    found = (error >= LEAST_ERROR).nonzero().flatten()
    return found if len(found) >= LEAST_CELLS else error.topk(min(LEAST_CELLS, len(error))).indices.sort().values


def _spread(cells: Sequence[Cell], errors: Tensor) -> Tensor:
    """Root mean square of the residuals of the logits ``errors``, each without the cells that share a shift, ()."""
    x, residuals = torch.stack([cell.signals for cell in cells]), []
    for index, cell in enumerate(cells):
        apart = torch.tensor([not cell.shifts & other.shifts for other in cells])
        if int(apart.sum()) <= SIGNALS:  # of a few shifts, each is in all cells
            apart = torch.arange(len(cells)) != index
        told = ridge(x[apart], errors[apart])
        residuals.append(told[0] + told[1:] @ x[index] - errors[index])
    return torch.stack(residuals).square().mean().sqrt()


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights of a linear regression of y, (n,), on the columns of x, (n, d), the constant first, (1 + d,).

    The squares of the weights of the standardised columns count ``RIDGE`` times beside those of the residuals.
    """
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(1e-9)
    z, centre = (x - mean) / scale, y.mean()
    slope = torch.linalg.solve(z.t() @ z + RIDGE * torch.eye(z.shape[1]).to(z), z.t() @ (y - centre)) / scale
    return torch.cat([(centre - slope @ mean).unsqueeze(0), slope])


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalised, (n, C); at T = 0 all on the largest."""
    if temperature == 0:
        return torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).to(probabilities)
    return (probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log() / temperature).softmax(dim=1)


def temperature_of(probabilities: Tensor, error: float) -> float:
    """T at which the mean of 1 - max p_T is ``error``, as near as T in [0.1, 30] comes."""
    low, high = -2.3, 3.4  # of log T, in which the mean rises
    for _ in range(40):
        middle = (low + high) / 2
        unsure = float(1 - sharpened(probabilities, math.exp(middle)).amax(dim=1).mean())
        low, high = (middle, high) if unsure < error else (low, middle)
    return math.exp((low + high) / 2)


def _logit(share: Tensor) -> Tensor:
    return share.clamp(*INTERVAL).logit()
