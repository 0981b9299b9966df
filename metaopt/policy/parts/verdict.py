r"""The verdict: how often the adapted model errs on the stream, and how often the source, estimated without labels.

At one batch in ``every`` the source itself predicts too, by one forward pass without a graph. Over the latest
``window`` images the part keeps means of five signals, with the source's probabilities p and the adapted ones q over C
classes:

.. math:: x = \Big(\mathrm{logit}\, d(p),\; u(p),\; \mathrm{logit}\,(1 - \mathrm{E}\, p \cdot q),\;
    \mathrm{logit}\, d(q),\; u(q)\Big), \qquad
    d(p) = 1 - \mathrm{E} \max_c p_T, \quad u(p) = \log\Big(1 - \frac{H(\mathrm{E}\,p)}{\log C} - b + 0.01\Big),

how much each model doubts at its own temperature T, at which its confidence is least wrong (temperature scaling: Guo et
al., ICML 2017), how uneven its classes are (b is what chance alone makes of few images), and how much the two disagree.
Disagreement as a measure of error: Jiang et al., ICLR 2022; Lee et al., CVPR 2024; sets of shifted images that a
regression of error on signals learns from: Deng and Zheng, CVPR 2021. Here

.. math:: \mathrm{logit}\,\hat e = w \cdot x + w_0, \qquad
    s(x)^2 = s^2 \big(1 + \tilde x^\top (\tilde X^\top \tilde X + \lambda I)^{-1} \tilde x\big) + (v \cdot x + v_0)^2

for each of the two models, and for the difference of the two logits, learned on clean unlabeled images under shifts of
our own (`metaopt.meta.verdict`). The interval has 95 %: s is the spread on shifts that the regression was not fitted
on, which the leverage widens where the signals are unlike all that it was fitted on, v is half of the difference of the
two regressions that an estimate is the mean of, and the lower end also counts with a source that is right about all its
clean images. No prediction changes by it, but where a compute dial has to pay for its passes too.
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

SIGNALS = 5
EDGE = 1 / 800  # shares closer to 0 or 1 than this count as this: so few images do not tell more
EVEN = 0.01  # added to what is missing from even classes, a little more than chance leaves of a few hundred images
NORMAL_95 = 1.96
CELL = 256  # images that a share of errors was counted on when the spread was taken


class Seen(NamedTuple):
    """Means of a model's predictions over the window's images."""

    images: Tensor  # that they are of, ()
    doubt: Tensor  # 1 - max p at the model's temperature, ()
    shares: Tensor  # p, (C,); empty before any
    squares: Tensor  # p squared, (C,); empty before any


class VerdictState(NamedTuple):
    """Means over the stream so far, of the window's images."""

    batches: Tensor  # (),
    adapted: Seen
    source: Seen  # on the batches on which it was asked
    disagreement: Tensor  # 1 - p q on those, ()


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
    harmful: bool  # whether adaptation does harm: the adapted model errs more than the source, at 97.5 %


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
        check_range("verdict.cells", self.cells, 8, example="60")


class VerdictPart(Part):
    """Estimates the error of the adapted model and of the source on the stream, without labels."""

    Config = VerdictConfig
    name = "verdict"
    temperatures: Tensor
    weights: Tensor
    between: Tensor
    spread: Tensor
    leverage: Tensor

    def __init__(self, config: VerdictConfig | None = None) -> None:
        super().__init__(config)
        # Of the adapted model, the source, and the first's logit less the second's; w_0 first.
        self.register_buffer("temperatures", torch.ones(2))
        self.register_buffer("weights", torch.zeros(3, 2, 1 + SIGNALS))  # as extrapolated, and as if p were the truth
        self.register_buffer("between", torch.zeros(3, 1 + SIGNALS))  # v
        self.register_buffer("spread", torch.full((3,), -1.0))  # in logits; below 0 before it is fitted
        self.register_buffer("leverage", torch.zeros(3, 1 + SIGNALS, 1 + SIGNALS))  # a quadratic form of (1, x)

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
                source = source_logits(context)
            windows = config.window, config.window / config.every
            found = after(state, output.logits.detach(), source, self.temperatures, windows)
        context.remember(self.name, found)

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
        if not bool(state.source.images > 0):
            return None
        x = torch.cat([state.disagreement.new_ones(1), signals(state)]).double()
        z = self.weights.double() @ x  # (3, 2)
        spread = self.spread.double().square() * (1 + ((self.leverage.double() @ x) @ x).clamp_min(0))
        spread = spread + (self.between.double() @ x).square()
        error, counts = z[:2, 0].sigmoid(), torch.stack([state.adapted.images, state.source.images]).double()
        chance = (1 / counts - 1 / CELL).clamp_min(0) / (error * (1 - error)).clamp_min(EDGE)
        reach = NORMAL_95 * (spread[:2] + chance).sqrt()
        ends = (z[:2].amin(dim=1) - reach).sigmoid(), (z[:2, 0] + reach).sigmoid()
        adapted, source = (100 * torch.stack([error, *ends], dim=1)).tolist()
        harmful = z[2, 0] > NORMAL_95 * (spread[2] + chance.sum()).sqrt()
        return Verdict(*adapted, *source, images=round(float(counts[0])), harmful=bool(harmful))

    def not_exported(self, state: VerdictState) -> str:
        """An exported network has no judge."""
        return "verdict, which estimates the error of the stream"

    def check_state(self, state: VerdictState, classes: int) -> None:
        """Refuse means that no predictions over these classes have."""
        for shares in (each for seen in (state.adapted, state.source) for each in (seen.shares, seen.squares)):
            if shares.numel() not in (0, classes) or bool(((shares < 0) | (shares > 1.01)).any()):
                raise ValueError(f"verdict has means that are no probabilities of {classes} classes")
        means = torch.stack([state.adapted.doubt, state.source.doubt, state.disagreement])
        if bool(((means < -0.01) | (means > 1.01)).any()):
            raise ValueError("verdict has a mean outside of 0 to 1")

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """The same settings; errors of another model look otherwise."""
        return type(self)(self.config), "to be fitted on this model"


def source_logits(context: StepContext) -> Tensor:
    """What the source says of the batch, (B, C), by a pass that is counted."""
    own = own_values(context.model, context.parameters)
    context.count(context.images, {})
    return run_network(context.model, own, context.images, {}, context.autocast).logits


def nothing_seen(like: Tensor) -> VerdictState:
    """The state before the first batch, in the type and on the device of ``like``."""
    return VerdictState(like.new_zeros(()), _nobody(like), _nobody(like), like.new_zeros(()))


def _nobody(like: Tensor) -> Seen:
    return Seen(like.new_zeros(()), like.new_zeros(()), like.new_zeros(0), like.new_zeros(0))


def after(
    state: VerdictState, adapted: Tensor, source: Tensor | None, temperatures: Tensor, windows: tuple[float, float]
) -> VerdictState:
    """The state after a batch.

    Args:
        state: before it.
        adapted: logits of the adapted model, (B, C).
        source: of the source on the same images, (B, C); None where it was not asked.
        temperatures: T of the adapted model and of the source, (2,).
        windows: images that count at most in what is known of the adapted model, and in the rest.
    """
    found = state._replace(
        batches=state.batches + 1, adapted=_with(state.adapted, adapted, temperatures[0], windows[0])
    )
    if source is None:
        return found
    p, q = (logits.softmax(dim=1).to(state.disagreement) for logits in (source, adapted))
    share = _weights(state.source.images, len(source), windows[1])[1]
    return found._replace(
        source=_with(state.source, source, temperatures[1], windows[1]),
        disagreement=torch.lerp(state.disagreement, 1 - (p * q).sum(dim=1).mean(), share),
    )


def _with(seen: Seen, logits: Tensor, temperature: Tensor, window: float) -> Seen:
    """What is known of a model after its logits on a batch, (B, C)."""
    kept, share = _weights(seen.images, len(logits), window)
    p = logits.softmax(dim=1).to(seen.doubt)
    doubt = 1 - (logits / temperature).softmax(dim=1).amax(dim=1).mean().to(seen.doubt)
    shares, squares = (seen.shares, seen.squares) if seen.shares.numel() else (p.mean(0), p.square().mean(0))
    return Seen(
        kept + len(logits),
        torch.lerp(seen.doubt, doubt, share),
        torch.lerp(shares, p.mean(0), share),
        torch.lerp(squares, p.square().mean(0), share),
    )


def signals(state: VerdictState) -> Tensor:
    """x of what was seen, (5,)."""
    own = [torch.stack([seen.doubt.logit(eps=EDGE), _unevenness(seen)]) for seen in (state.source, state.adapted)]
    return torch.cat([own[0], state.disagreement.logit(eps=EDGE).unsqueeze(0), own[1]])


def _unevenness(seen: Seen) -> Tensor:
    """u of a model's classes, ()."""
    p, classes = seen.shares, seen.shares.numel()
    uneven = 1 - torch.special.entr(p).sum() / math.log(classes)
    spread = ((seen.squares - p.square()).clamp_min(0) / p.clamp_min(torch.finfo(p.dtype).tiny)).sum()
    by_chance = spread / (2 * seen.images * math.log(classes))  # of the entropy of a mean, to first order
    return ((uneven - by_chance).clamp_min(0) + EVEN).log()


def _weights(before: Tensor, images: int, window: float) -> tuple[Tensor, Tensor]:
    """For how many images those before count beside a batch, and the share of the batch in the new mean."""
    kept = before.clamp(max=max(window - images, 0.0))
    return kept, images / (kept + images)
