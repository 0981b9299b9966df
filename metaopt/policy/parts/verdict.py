r"""The verdict: how often the adapted model errs on the stream, and how often the source, estimated without labels.

At one batch in ``every`` the source itself predicts too, by one forward pass without a graph. Over the latest
``window`` images the part keeps means of four signals, with the source's probabilities p and the adapted ones q over C
classes:

.. math:: x = \Big(\mathrm{logit}\, \frac{\mathrm{E}\,H(p)}{\log C},\;
    \log\Big(1 - \frac{H(\mathrm{E}\,p)}{\log C} - b + 0.01\Big),\;
    \mathrm{logit}\,(1 - \mathrm{E}\, p \cdot q),\; \mathrm{logit}\, \frac{\mathrm{E}\,H(q)}{\log C}\Big),

how unsure both are, how uneven the source's classes (b is what chance alone makes of few images), and how much the two
disagree. Disagreement as a measure of error: Jiang et al., ICLR 2022; Lee et al., CVPR 2024; sets of shifted images
that a regression of error on signals learns from: Deng and Zheng, CVPR 2021. Here

.. math:: \mathrm{logit}\,\hat e = w \cdot x + w_0

for each of the two models, learned on clean unlabeled images under shifts of our own (`metaopt.meta.verdict`). The
interval has 95 %: the spread is that of shifts that the regression was not fitted on, and the lower end also counts
with a source that is right about all its clean images. No prediction changes by it, but where a compute dial has to pay
for its passes too.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from metaopt.errors import ConfigError, check_range
from metaopt.models import SourceModel
from metaopt.parameters import own_values
from metaopt.policy.part import Part
from metaopt.policy.precision import run_network
from metaopt.policy.step import StepContext
from metaopt.types import Parameters, StepOutput

SIGNALS = 4
EDGE = 1 / 800  # shares closer to 0 or 1 than this count as this: so few images do not tell more
EVEN = 0.01  # added to what is missing from even classes, a little more than chance leaves of a few hundred images
NORMAL_95 = 1.96
CELL = 256  # images that a share of errors was counted on when the spread was taken


class VerdictState(NamedTuple):
    """Means over the stream so far, of the window's images."""

    batches: Tensor  # (),
    images: Tensor  # that the adapted model's mean is of, ()
    entropy: Tensor  # of its predictions, as a share of log C, ()
    source_images: Tensor  # that the others are of, ()
    source_entropy: Tensor  # ()
    disagreement: Tensor  # 1 - p q, ()
    shares: Tensor  # p, (C,); empty before any
    squares: Tensor  # p squared, (C,); empty before any


@dataclass(frozen=True)
class Verdict:
    """Estimated errors on the latest images of a stream, in percent, each with the ends of its 95 % interval."""

    estimated_error: float
    low: float
    high: float
    source_estimated_error: float
    source_low: float
    source_high: float
    images: int  # of the window that this is about


@dataclass(frozen=True)
class VerdictConfig:
    """How often the source is asked, what a verdict is about, and what it learns from."""

    every: int = 5  # batches from one pass of the source to the next, which is what the verdict costs
    window: int = 1000  # latest images that a verdict is about
    cells: int = 60  # short streams of shifted images that it is fitted on

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_range("verdict.every", self.every, 1, example="5")
        check_range("verdict.window", self.window, 1, example="1000")
        check_range("verdict.cells", self.cells, 2 * SIGNALS, example="60")


class VerdictPart(Part):
    """Estimates the error of the adapted model and of the source on the stream, without labels."""

    Config = VerdictConfig
    name = "verdict"
    weights: Tensor
    spread: Tensor

    def __init__(self, config: VerdictConfig | None = None) -> None:
        super().__init__(config)
        # Of the adapted model and the source, as extrapolated and with the source right about clean images; w_0 first.
        self.register_buffer("weights", torch.zeros(2, 2, 1 + SIGNALS))
        self.register_buffer("spread", torch.full((2,), -1.0))  # of both, in logits; below 0 before it is fitted

    @property
    def fitted(self) -> bool:
        """Whether it knows how signals and errors go together."""
        return bool((self.spread >= 0).all())

    def init(self, parameters: Parameters) -> VerdictState:
        """Nothing yet."""
        return nothing_seen(next(iter(parameters.values())).detach())

    def judge(self, context: StepContext, output: StepOutput) -> None:
        """Take the batch in, and ask the source where it is time to."""
        if not self.fitted:
            return
        state, config = context.state[self.name], self.config
        source = None
        with torch.no_grad():
            if int(state.batches) % config.every == 0:
                own = own_values(context.model, context.parameters)
                context.count(context.images, {})
                source = run_network(context.model, own, context.images, {}, context.autocast).logits
            seen = after(state, output.logits.detach(), source, config.window, config.window / config.every)
        context.remember(self.name, seen)

    def verdict(self, state: VerdictState) -> Verdict | None:
        """What the state tells; None before the first batch.

        Raises:
            ConfigError: the part is not fitted yet.
        """
        if not self.fitted:
            raise ConfigError(
                "the part verdict has not learned what errors look like; it needs clean unlabeled images: set "
                "source.images=PATH, or call metaopt.fit_verdict(model, policy, images) in code"
            )
        if not bool(state.source_images > 0):
            return None
        x = torch.cat([state.images.new_ones(1), signals(state)]).double()
        z = self.weights.double() @ x  # (2, 2)
        error, count = z[:, 0].sigmoid(), state.images.double()
        chance = (1 / count - 1 / CELL).clamp_min(0) / (error * (1 - error)).clamp_min(EDGE)
        reach = NORMAL_95 * (self.spread.double().square() + chance).sqrt()
        ends = (z.amin(dim=1) - reach).sigmoid(), (z[:, 0] + reach).sigmoid()
        adapted, source = (100 * torch.stack([error, *ends], dim=1)).tolist()
        return Verdict(*adapted, *source, images=round(float(count)))

    def not_exported(self, state: VerdictState) -> str:
        """An exported network has no judge."""
        return "verdict, which estimates the error of the stream"

    def check_state(self, state: VerdictState, classes: int) -> None:
        """Refuse means that no predictions over these classes have."""
        for shares in (state.shares, state.squares):
            if shares.numel() not in (0, classes) or bool(((shares < 0) | (shares > 1.01)).any()):
                raise ValueError(f"verdict has means that are no probabilities of {classes} classes")
        means = torch.stack([state.entropy, state.source_entropy, state.disagreement])
        if bool(((means < -0.01) | (means > 1.01)).any()):
            raise ValueError("verdict has a mean outside of 0 to 1")

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """The same settings; errors of another model look otherwise."""
        return type(self)(self.config), "to be fitted on this model"


def nothing_seen(like: Tensor) -> VerdictState:
    """The state before the first batch, in the type and on the device of ``like``."""
    means = {name: like.new_zeros(()) for name in VerdictState._fields}
    return VerdictState(**means | {"shares": like.new_zeros(0), "squares": like.new_zeros(0)})


def after(
    state: VerdictState, adapted: Tensor, source: Tensor | None, window: float, source_window: float
) -> VerdictState:
    """The state after a batch.

    Args:
        state: before it.
        adapted: logits of the adapted model, (B, C).
        source: of the source on the same images, (B, C); None where it was not asked.
        window: images that count at most in what is known of the adapted model.
        source_window: images that count at most in the rest.
    """
    kept, share = _weights(state.images, len(adapted), window)
    q = adapted.softmax(dim=1).to(state.entropy)
    found = state._replace(
        batches=state.batches + 1,
        images=kept + len(adapted),
        entropy=torch.lerp(state.entropy, _entropy(q).mean(), share),
    )
    if source is None:
        return found
    p = source.softmax(dim=1).to(state.entropy)
    shares, squares = (state.shares, state.squares) if state.shares.numel() else (p.mean(0), p.square().mean(0))
    kept, share = _weights(state.source_images, len(source), source_window)
    return found._replace(
        source_images=kept + len(source),
        source_entropy=torch.lerp(state.source_entropy, _entropy(p).mean(), share),
        disagreement=torch.lerp(state.disagreement, 1 - (p * q).sum(dim=1).mean(), share),
        shares=torch.lerp(shares, p.mean(0), share),
        squares=torch.lerp(squares, p.square().mean(0), share),
    )


def signals(state: VerdictState) -> Tensor:
    """x of what was seen, (4,)."""
    p, classes = state.shares, state.shares.numel()
    uneven = 1 - torch.special.entr(p).sum() / math.log(classes)
    spread = ((state.squares - p.square()).clamp_min(0) / p.clamp_min(torch.finfo(p.dtype).tiny)).sum()
    by_chance = spread / (2 * state.source_images * math.log(classes))  # of the entropy of a mean, to first order
    shares = torch.stack([state.source_entropy, state.disagreement, state.entropy]).logit(eps=EDGE)
    return torch.stack([shares[0], ((uneven - by_chance).clamp_min(0) + EVEN).log(), shares[1], shares[2]])


def _weights(before: Tensor, images: int, window: float) -> tuple[Tensor, Tensor]:
    """For how many images those before count beside a batch, and the share of the batch in the new mean."""
    kept = before.clamp(max=max(window - images, 0.0))
    return kept, images / (kept + images)


def _entropy(probabilities: Tensor) -> Tensor:
    """Of each prediction, as a share of log C, (B,)."""
    return torch.special.entr(probabilities).sum(dim=1) / math.log(probabilities.shape[1])
