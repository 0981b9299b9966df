r"""The regressions of a verdict: errors on signals, over cells (`metaopt.meta.verdict`) whose truth is not quite known.

Each model's estimate is the mean of two ridge regressions, one on the signals of its own predictions and one on all:
the first is nearer on streams like those of the cells, the second also knows a model that adaptation has harmed. A
third regression is of the difference of the two logits, for errors of both models go together. It leaves out how uneven
the classes are: where a stream's own are, that tells nothing of which model is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt.policy.parts.verdict import SIGNALS, after, nothing_seen, signals

ALL = tuple(range(SIGNALS))
OWN = ((3,), (0, 1))  # signals that a model's first regression is on: the adapted one's doubt; the source's two
COMPARED = (0, 2, 3)  # signals that tell which model is better: both doubts, and disagreement
LEAST_ERROR = 0.25  # of cells that are learned from
LEAST_COMPARED = 0.1  # of the worse of both models in cells that their difference is learned from
LEAST_CELLS = 16  # where fewer err that much, those of the larger errors are taken
RIDGE = 2.0  # on signals of mean 0 and variance 1
ROUNDS = 12  # until e_0 and the regression agree
INTERVAL = (0.005, 0.97)  # of shares of errors, before logits are taken
CLEAN_ERROR = (0.002, 0.5)  # of e_0


@dataclass(frozen=True)
class Cell:
    """What one short stream told; float64."""

    logits: Tensor  # of the adapted model and the source, (2, n, C)
    truth: Tensor  # what the source predicts of the clean images, (n, C)
    shifts: frozenset[str]  # by name; none: clean

    def error(self, temperature: float = 0.0) -> Tensor:
        """Share of the images that each model gets wrong, (2,), at T; at 0 the clean predictions are all right."""
        truth = sharpened(self.truth, temperature)
        return 1 - truth.gather(1, self.logits.argmax(dim=2).t()).mean(dim=0)

    def signals(self, temperatures: Tensor) -> Tensor:
        """x of `metaopt.policy.parts.verdict`, (5,), at the temperatures of both models, (2,)."""
        nobody = nothing_seen(self.logits.new_zeros(()))
        return signals(after(nobody, self.logits[0], self.logits[1], temperatures, (math.inf, math.inf)))


class Fitted(NamedTuple):
    """The buffers of `metaopt.policy.parts.verdict.VerdictPart`."""

    temperatures: Tensor  # (2,)
    weights: Tensor  # (3, 2, 6)
    between: Tensor  # (3, 6)
    spread: Tensor  # (3,)
    leverage: Tensor  # (3, 6, 6)


class Rows(NamedTuple):
    """What one estimate learns from: signals and cells of its two regressions."""

    signals: tuple[tuple[int, ...], tuple[int, ...]]
    cells: tuple[Tensor, Tensor]

    def apart(self, cells: Tensor) -> "Rows":
        """The same without all but these cells, a mask."""
        return Rows(self.signals, (self.cells[0][cells[self.cells[0]]], self.cells[1][cells[self.cells[1]]]))

    @property
    def enough(self) -> bool:
        """Whether a regression can be fitted."""
        return min(map(len, self.cells)) > SIGNALS

    def both(self, x: Tensor, y: Tensor) -> Tensor:
        """Weights of both regressions of y, (cells,), on x, (cells, 5); the constant first, (2, 6)."""
        found = x.new_zeros(2, 1 + SIGNALS)
        for own, columns, rows in zip(found, self.signals, self.cells, strict=True):
            own[[0, *(1 + column for column in columns)]] = ridge(x[rows][:, list(columns)], y[rows])
        return found

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Their mean, (6,)."""
        return self.both(x, y).mean(dim=0)

    def leverage(self, x: Tensor) -> Tensor:
        """`leverage` in the second regression, (6, 6)."""
        place = torch.tensor([0, *(1 + column for column in self.signals[1])])
        form = x.new_zeros(1 + SIGNALS, 1 + SIGNALS)
        form[place.unsqueeze(1), place] = leverage(x[self.cells[1]][:, list(self.signals[1])])
        return form


def regression(shifted: Sequence[Cell], harmed: Sequence[Cell], clean: Sequence[Cell]) -> Fitted:
    """What a verdict is to know.

    Args:
        shifted: cells to learn from.
        harmed: cells to learn from whose adapted model may err more than the source.
        clean: cells without a shift, whose error is to be found.
    """
    cells = [*shifted, *harmed, *clean]
    count, learned = len(shifted), len(shifted) + len(harmed)
    temperatures = torch.stack([calibrated(shifted, model) for model in range(2)])
    x = torch.stack([cell.signals(temperatures) for cell in cells])
    plain = torch.stack([cell.error() for cell in cells])  # (cells, 2)
    rows = _rows(plain[:learned], count)
    truth = torch.cat([cell.truth for cell in clean])
    errors, clean_error = _logit(plain[:learned]), 0.1
    for _ in range(ROUNDS):
        temperature = temperature_of(truth, clean_error)
        errors = _logit(torch.stack([cell.error(temperature) for cell in cells[:learned]]))
        told = rows[1].weights(x[:learned], errors[:, 1])
        clean_error = float((x[learned:] @ told[1:] + told[0]).sigmoid().mean().clamp(*CLEAN_ERROR))
    targets = torch.cat([errors, errors[:, :1] - errors[:, 1:]], dim=1)  # (cells, 3)
    right = _logit(plain)
    right = torch.cat([right, right[:, :1] - right[:, 1:]], dim=1)
    pairs, halves, spreads, forms = [], [], [], []
    for target, own in enumerate(rows):
        every = Rows(own.signals, (torch.cat([torch.arange(count), torch.arange(learned, len(cells))]), own.cells[1]))
        first, second = own.both(x, targets[:, target])
        pairs.append(torch.stack([(first + second) / 2, every.weights(x, right[:, target])]))
        halves.append((first - second) / 2)
        spreads.append(_spread(cells[:learned], x, targets[:, target], own))
        forms.append(own.leverage(x))
    return Fitted(temperatures, *map(torch.stack, (pairs, halves, spreads, forms)))


def _rows(error: Tensor, shifted: int) -> list[Rows]:
    """What the adapted model's estimate, the source's and that of their difference learn from.

    Args:
        error: of both models on the shifted cells and the harmed ones, (cells, 2).
        shifted: how many of them are shifted ones, which come first.
    """
    adapted, source = (_erring(error[:shifted, model]) for model in range(2))
    harmed = torch.arange(shifted, len(error))
    either = _erring(error.amax(dim=1), LEAST_COMPARED)
    return [
        Rows((OWN[0], ALL), (adapted, torch.cat([adapted, harmed[error[shifted:, 0] >= LEAST_ERROR]]))),
        Rows((OWN[1], ALL), (source, source)),
        Rows((COMPARED, COMPARED), (either, either)),
    ]


def _erring(error: Tensor, least: float = LEAST_ERROR) -> Tensor:
    """Indices of the cells that are learned from."""
    found = (error >= least).nonzero().flatten()
    return found if len(found) >= LEAST_CELLS else error.topk(min(LEAST_CELLS, len(error))).indices.sort().values


def _spread(cells: Sequence[Cell], x: Tensor, y: Tensor, rows: Rows) -> Tensor:
    """Root mean square of residuals over what leverage makes of them, each without the cells that share a shift, ()."""
    residuals = []
    for index in rows.cells[0].tolist():
        others = torch.arange(len(cells)) != index
        apart = rows.apart(torch.tensor([not cells[index].shifts & each.shifts for each in cells]) & others)
        if not apart.enough:  # of a few shifts, each is in all cells
            apart = rows.apart(others)
        told, form = apart.weights(x, y), apart.leverage(x)
        own = torch.cat([x.new_ones(1), x[index]])
        residuals.append((told @ own - y[index]) / (1 + own @ form @ own).sqrt())
    return torch.stack(residuals).square().mean().sqrt()


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Weights of a linear regression of y, (n,), on the columns of x, (n, d), the constant first, (1 + d,).

    The squares of the weights of the standardised columns count ``RIDGE`` times beside those of the residuals.
    """
    mean, scale = x.mean(dim=0), _scale(x)
    z, centre = (x - mean) / scale, y.mean()
    slope = torch.linalg.solve(z.t() @ z + RIDGE * torch.eye(z.shape[1]).to(z), z.t() @ (y - centre)) / scale
    return torch.cat([(centre - slope @ mean).unsqueeze(0), slope])


def leverage(x: Tensor) -> Tensor:
    """The form A, (1 + d, 1 + d), in which (1, x) A (1, x) is the leverage of a row x in `ridge` on these, (n, d).

    It is 1 / n + z (Z'Z + ridge)^-1 z with standardised columns: what the errors of the fit add to those of one cell.
    """
    mean, scale = x.mean(dim=0), _scale(x)
    z = (x - mean) / scale
    centred = torch.cat([-mean.unsqueeze(1), torch.eye(len(mean)).to(x)], dim=1) / scale.unsqueeze(1)  # z of (1, x)
    form = centred.t() @ torch.linalg.solve(z.t() @ z + RIDGE * torch.eye(z.shape[1]).to(z), centred)
    form[0, 0] += 1 / len(x)
    return form


def _scale(x: Tensor) -> Tensor:
    return x.std(dim=0, correction=0).clamp_min(1e-9)


def calibrated(cells: Sequence[Cell], model: int) -> Tensor:
    """T in [0.1, 30] of the least cross-entropy of a model's logits over T to the cells' truth, at its largest, ().

    The cross-entropy is convex in 1 / T; its slope there is the mean of E_p z - z_y.
    """
    logits = torch.cat([cell.logits[model] for cell in cells])
    told = logits.gather(1, torch.cat([cell.truth for cell in cells]).argmax(dim=1, keepdim=True)).mean()
    low, high = math.log(0.1), math.log(30.0)
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((logits / math.exp(middle)).softmax(dim=1) * logits).sum(dim=1).mean() - told
        low, high = (middle, high) if slope > 0 else (low, middle)
    return logits.new_tensor(math.exp((low + high) / 2))


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
