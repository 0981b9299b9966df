r"""Class skew: batches that hold a few classes alone, as of streams that are sorted by class.

Of those a network that normalises by the batch spreads its predictions over all classes, and is wrong; what it would
learn from them ruins it; and nothing that it predicts tells. So at a domain's first batch, and at one in ``every``
after it, the part looks with other eyes: the *cautious pass* has the source's own parameters, and BatchNorm statistics
that are shrunk to the source's as far as a batch of one class differs from it without a shift
(`metaopt.models.source_prior.Shrinkage`, :math:`V = s_1 F + s_2 A / n + s_3 C g`). Where the classes that it predicts,
with mean shares :math:`\bar p`, are clearly fewer than as many images of even classes would show, or a pass of the
policy's own, at its start, is less sure,

.. math:: \frac{\bar H_{own} - \bar H_{cautious}}{\log C} > \mathrm{slope}\,(e - \mathrm{evenness}), \qquad
    e = \exp\big(H(\bar p) - \mathrm{E}[H_n]\big) < 0.9,

with mean entropies :math:`\bar H` of both passes' predictions, the batch is *skewed*: the cautious pass answers, no
update is made, and each of the next ``every`` batches is looked at too. The part remembers the statistics and the class
shares :math:`\pi` of what it looked at in a domain; the more classes were there, the less need of caution:
:math:`g = (\sum_k \pi_k^2 - 1/C) / (1 - 1/C)`, with the present batch taken for one of the most frequent class. F, A
and C: `metaopt.models.class_variation`. The scales s are learned. Networks without BatchNorm are never
looked at. Where passes are to be saved (`metaopt.online.compute_dial`), a look goes by every so-many-th image of a
large batch.

Such an answer is the mean of the logits of both passes, for the one knows the classes and the other the domain, and
takes the batch for what it is: predictions at a temperature T are corrected for the class prior :math:`\pi` that is
likeliest for them, beside an even one that counts as one image (Saerens et al., Neural Computation 2002, equation 2.4;
the temperature, for networks are too sure under a shift, as in Alexandari et al., ICML 2020),

.. math:: z' = z / T + \log \pi, \qquad \pi_k = \frac{\sum_i \mathrm{softmax}(z'_i)_k + 1/C}{n + 1}.

The policy's own answer is corrected too where its classes are *uneven*, be it never so few of them: where twice the
log likelihood that this prior gains over an even one is larger than even classes reach in a share ``certainty`` of all
batches, by its :math:`\chi^2` distribution with C - 1 degrees of freedom. Such batches are learned from. What a network
without BatchNorm predicts leans to some classes for as long as a shift lasts, so it is divided first by that which
makes its mean over the domain so far even, and of the likelihood half counts.

Neighbouring batches of a stream that is sorted by class lie far from each other without any shift of domain. While
batches are skewed, distances count for less by the design effect :math:`1 + (n - 1) \rho` of n images of one class,
with :math:`\rho` the share of classes in the variance of what the shift distance looks at, on clean images.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from metaopt.errors import ConfigError, check_positive, check_range
from metaopt.models import ChannelMoments, Shrinkage, SourceModel, merged_moments, prior_layers
from metaopt.models.class_shares import concentration, evenness, leaning, mean_entropy, uneven, with_own_prior
from metaopt.models.class_variation import class_variation, variation
from metaopt.parameters import adapted_layout, own_values
from metaopt.policy.part import LayeredPart
from metaopt.policy.parts.shift_distance import image_statistics
from metaopt.policy.step import StepContext, condition
from metaopt.types import ForwardOutput, Parameters, StepOutput

EVEN = 0.9  # of e, from where no second look is needed
WINDOW = 2000.0  # images of a domain that count; the cautious pass has constant parameters, so they stay true
EVEN_IMAGES = 10.0  # beside a domain's, of a network without BatchNorm that leans to no class
DISPERSION = 2.0  # of the likelihood ratio where such a network leans: its predictions are even in the mean alone
FRUGAL = 50  # images that a look goes by at least where passes are to be saved
SCALES = (2.0, 2.0, 4.0)  # s_1 to s_3 before meta-training


class SkewState(NamedTuple):
    """What the part remembers of a domain."""

    batches: Tensor  # since it began, ()
    skewed: Tensor  # whether the last look found it so, 0 or 1, ()
    wary: Tensor  # batches from now on that are each looked at, ()
    shares: Tensor  # pi of the images looked at, (C,); empty before any
    moments: ChannelMoments  # of the same; their count is theirs


class Look(NamedTuple):
    """What a cautious pass found of one batch, or of every so-many-th image of it."""

    logits: Tensor  # of the images looked at, (n, C)
    own: Tensor | None  # of a pass of the policy's own, at its start, (n, C); None where there was no need of it
    moments: dict[int, tuple[Tensor, Tensor]]  # at each BatchNorm layer
    skewed: bool


@dataclass(frozen=True)
class ClassSkewConfig:
    """When batches are looked at, and which are skewed."""

    every: int = 8  # batches between two looks; behind a skewed one, batches that are each looked at
    evenness: float = 0.6  # e at which a batch is skewed where both passes are equally sure
    slope: float = (
        0.13  # by how much more sure, in shares of log C, the cautious pass has to be for an e that is larger by 1
    )
    temperature: float | None = 2.5  # T of own answers that are corrected for their classes; None: nothing is corrected
    cautious_temperature: float = 4.0  # of the answers to skewed batches
    certainty: float = 0.999  # beyond which classes are uneven

    def __post_init__(self) -> None:
        """Check every value against its range."""
        check_range("class_skew.every", self.every, 1, example="8")
        if not 0 < self.evenness < 1:
            raise ConfigError(
                f"class_skew.evenness is {self.evenness}; allowed is 0 < evenness < 1, or class_skew=false: set 0.6"
            )
        check_positive("class_skew.slope", self.slope, "0.13")
        if self.temperature is not None:
            check_positive("class_skew.temperature", self.temperature, "2.5")
        check_positive("class_skew.cautious_temperature", self.cautious_temperature, "4")
        if not 0 < self.certainty < 1:
            raise ConfigError(f"class_skew.certainty is {self.certainty}; allowed is 0 < certainty < 1: set 0.999")


class ClassSkew(LayeredPart):
    """Batches of a few classes are told, answered with caution, and not learned from.

    Args:
        config: when batches are looked at, and what is corrected.
        layers: names of the BatchNorm layers (`metaopt.models.prior_layers`).
    """

    Config = ClassSkewConfig
    name = "class_skew"
    events = ("skewed",)
    own_judge = "freeze"

    def __init__(self, config: ClassSkewConfig | None = None, layers: Sequence[str] = ()) -> None:
        super().__init__(config)
        self._know_layers(layers)

    def _know_layers(self, layers: Sequence[str]) -> None:
        """Begin with these layers, of which nothing else is known."""
        self.layers = tuple(layers)
        self.register_buffer("variation", torch.full((3, len(self.layers)), -1.0))  # F, A and C
        self.register_buffer("correlation", torch.tensor(-1.0))  # rho
        self.log_scales = nn.Parameter(torch.tensor(SCALES).log()) if self.layers else None

    @classmethod
    def build(cls, config: ClassSkewConfig, model: SourceModel, seed: int = 0) -> Self:
        """For the BatchNorm layers of a model, if it has some."""
        return cls(config, prior_layers(model.module))

    def with_settings(self, config: ClassSkewConfig) -> Self:
        """The same of other settings: none of them changes what was learned."""
        found = copy.deepcopy(self)
        found.config = config
        return found

    def attach(self, model: SourceModel) -> SourceModel:
        """The same model, whose layers are to be known: of a hand-made method nobody has told them."""
        if not self.layers and (layers := prior_layers(model.module)):
            self._know_layers(layers)
        return model

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int) -> None:
        """Learn from clean source images what differs without a shift, unless it is known."""
        if not isinstance(model, SourceModel):
            return
        self.attach(model)
        if self._known:
            return
        found = class_variation(model, images(), batch_size)
        told = torch.stack([found.offset, found.between_images, found.between_classes])
        self.variation = told.to(self.variation)
        layers = [name.rpartition(".")[0] for name in adapted_layout(model).names]
        statistics = image_statistics(model, list(dict.fromkeys(layers)), images())
        scale = statistics.var(dim=0).clamp_min(1e-12)
        self.correlation = variation(statistics, found.predicted, scale)[1].clamp(0, 1).to(self.correlation)

    @property
    def _known(self) -> bool:
        return bool(self.correlation >= 0)

    def init(self, parameters: Parameters) -> SkewState:
        """Nothing yet."""
        like = next(iter(parameters.values())).detach()
        zero, empty = like.new_zeros(()), like.new_zeros(0)
        moments = ChannelMoments(zero.clone(), empty.clone(), empty.clone())
        return SkewState(zero, zero.clone(), zero.clone(), empty, moments)

    def observe(self, context: StepContext) -> None:
        """Tell how much further apart batches lie than in a random order, where the last look found them skewed."""
        skewed, others = context.state[self.name].skewed, len(context.images) - 1
        context.signals["design_effect"] = 1 + others * self.correlation.clamp_min(0).to(skewed) * skewed

    def decide(self, context: StepContext) -> Tensor:
        """Look at the batch where it is time to; above 0 where it is not skewed."""
        state = context.state[self.name]
        if "skewed" not in context.signals:
            due = int(state.batches) % self.config.every == 0 or bool(state.wary)
            if self.layers and due:
                context.notes[self.name] = look = self._look(context)
                context.signals["skewed"] = state.skewed.new_tensor(float(look.skewed))
            else:
                context.signals["skewed"] = state.skewed
        return 0.5 - context.signals["skewed"]

    def condition(self, context: StepContext) -> None:
        """Tell others whether the batch is skewed, where nobody decides: as it was, at first with caution."""
        state = context.state[self.name]
        unseen = bool(self.layers) and context.few and int(state.batches) == 0
        context.signals.setdefault("skewed", torch.ones_like(state.skewed) if unseen else state.skewed)

    def predict(self, context: StepContext) -> Tensor | None:
        """The answer to a skewed batch, of both passes, for the classes that it holds."""
        if not bool(context.signals["skewed"]):
            return None
        look = context.notes.get(self.name)
        unseen = look is None and int(context.state[self.name].batches) == 0  # nobody has looked yet
        if look is None or len(look.logits) < len(context.images) or torch.is_grad_enabled():
            look = Look(self._cautious(context).logits, None, {}, True)
        if self.config.temperature is None:
            return look.logits
        own = context.forward(parameters=context.start).logits if look.own is None else look.own
        logits = (look.logits + own) / 2
        return logits if unseen else with_own_prior(logits / self.config.cautious_temperature)

    def answer(self, context: StepContext, logits: Tensor) -> Tensor:
        """The policy's own answer, for the classes that the batch holds where those are uneven."""
        temperature, told, dispersion = self.config.temperature, logits.detach(), 1.0
        if temperature is None or bool(context.signals["skewed"]):
            return logits
        if not self.layers:
            state, images = context.state[self.name], len(logits)
            step = images / (EVEN_IMAGES + _counted(state, images) + images)
            context.notes[self.name] = shares = leaning(state.shares, told, step)
            told, dispersion = told - shares.log(), DISPERSION
        context.signals["uneven"] = logits.new_tensor(float(uneven(told, self.config.certainty, dispersion)))
        return with_own_prior(logits / temperature) if bool(context.signals["uneven"]) else logits

    def judge(self, context: StepContext, output: StepOutput) -> None:
        """Remember what was seen."""
        state, look = context.state[self.name], context.notes.get(self.name)
        if not isinstance(look, Look):  # wary of none: else it had looked
            if look is not None:
                count = _counted(state, len(output.logits)) + len(output.logits)
                state = state._replace(shares=look, moments=state.moments._replace(count=count))
            context.remember(self.name, state._replace(batches=state.batches + 1))
            return
        images, shares = len(look.logits), look.logits.softmax(dim=1).mean(dim=0)
        before = _counted(state, images)
        moments = merged_moments(state.moments, look.moments, images, WINDOW)
        known = shares if state.shares.numel() == 0 else torch.lerp(state.shares, shares, images / (before + images))
        skewed = state.skewed.new_tensor(float(look.skewed))
        wary = skewed.new_tensor(self.config.every) if look.skewed else (state.wary - 1).clamp_min(0)
        context.remember(self.name, SkewState(state.batches + 1, skewed, wary, known, moments))
        if look.skewed:
            context.events.append("skewed")

    def _look(self, context: StepContext) -> Look:
        """One cautious pass, and where its classes are few, one at the policy's start to compare it with."""
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        images = context.images[:: max(1, len(context.images) // FRUGAL)] if context.frugal else context.images
        with torch.no_grad():
            logits = self._cautious(replace(context, images=images), moments).logits
            even = evenness(logits)
            if even >= EVEN:
                return Look(logits, None, moments, False)
            condition(context)
            # At the start: what adaptation has made surer of everything would win any comparison.
            own = context.forward(images, context.start).logits
        surer = (mean_entropy(own) - mean_entropy(logits)) / math.log(logits.shape[1])
        return Look(logits, own, moments, surer > self.config.slope * (even - self.config.evenness))

    def _cautious(self, context: StepContext, record: dict[int, tuple[Tensor, Tensor]] | None = None) -> ForwardOutput:
        """The output on the batch by the source's parameters and shrunk statistics."""
        if not self._known:
            raise ConfigError(
                "the part class_skew knows nothing of the source; it needs clean unlabeled images: set "
                "source.images=PATH, or call policy.prepare(model, lambda: images) in code"
            )
        state, images = context.state[self.name], len(context.images)
        before = _counted(state, images)
        moments = None if state.moments.mean.numel() == 0 else state.moments._replace(count=before)
        wanted: dict[str, Any] = {"prior": self.shrinkage(state.shares, before, images), "stream": moments}
        if record is not None:
            wanted["record"] = record
        return context.forward(
            parameters=own_values(context.model, context.parameters), batch_statistics=True, **wanted
        )

    def shrinkage(self, shares: Tensor, before: Tensor, images: int) -> Shrinkage:
        """V of each layer.

        Args:
            shares: of each class in the images that are remembered, (C,); empty without any.
            before: how many those count for, ().
            images: n of the batch.
        """
        assert self.log_scales is not None
        total = before + images
        offset, between_images, between_classes = self.log_scales.exp().unsqueeze(1) * self.variation
        return Shrinkage(offset + between_images / total + between_classes * concentration(shares, before / total))

    def direct(self) -> Iterable[Tensor]:
        """The scales act in the forward pass."""
        return self.parameters()

    def check_state(self, state: SkewState, classes: int) -> None:
        """Refuse shares of another number of classes."""
        if state.shares.numel() not in (0, classes):
            raise ValueError(f"class_skew has shares of {state.shares.numel()} classes and the model has {classes}")

    def not_exported(self, state: SkewState) -> str:
        """An exported network answers all batches alike."""
        return "class_skew, which answers batches of a few classes in another way"

    def transferred(self, model: SourceModel) -> tuple[Self, str]:
        """The same scales, with the variation of another model's layers to be taken anew."""
        found = type(self)(self.config, prior_layers(model.module))
        if self.log_scales is not None and found.log_scales is not None:
            found.to(self.log_scales)
            found.log_scales.data.copy_(self.log_scales.data)
        return found, "scales as learned, on the variation of this model's layers"


def _counted(state: SkewState, images: int) -> Tensor:
    """For how many images those remembered count beside a batch, ()."""
    return state.moments.count.clamp(max=max(WINDOW - images, 0.0))
