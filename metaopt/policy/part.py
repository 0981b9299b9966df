"""What a part of a policy is: one concept, with its settings, its learned tensors, its state and its acts in the step.

========== ===================================================== ==========================================
act        what happens there                                    parts there
========== ===================================================== ==========================================
observe    signals that cost no backward pass, shared by name    shift distance
restore    the parameters before the batch                       restoration, domain memory
decide     whether the batch is worth an update                  update gate
condition  what the forward pass takes                           batch statistics, experts
teach      logits of a teacher                                   teacher
predict    logits in place of the adapted model's own            teacher
weigh      how much each sample counts in the loss
terms      further terms of the loss, from states of their own   teacher (proximal loss)
settle     after an update                                       teacher (running mean, stochastic restore)
rest       after a prediction without one                        batch statistics (what the stream is like)
answer     from logits to the prediction                         class balance
judge      after the batch: accept it, or roll back              update gate (what it remembers), verdict
========== ===================================================== ==========================================

Every act takes the batch's :class:`metaopt.policy.step.StepContext` and changes that alone; a part has those that its
class defines. Where two parts act at the same place, they do so in the order of the policy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from metaopt.errors import ConfigError
from metaopt.models import SourceModel
from metaopt.parameters import ParameterLayout
from metaopt.settings import build
from metaopt.types import Parameters

ACTS = (
    "observe",
    "restore",
    "decide",
    "condition",
    "teach",
    "predict",
    "weigh",
    "terms",
    "settle",
    "rest",
    "answer",
    "judge",
)


@dataclass(frozen=True)
class NoSettings:
    """Of a part that has none."""


class Part(nn.Module):
    """Base of all parts: what one does not say of itself is as here.

    Args:
        config: its settings, an instance of ``Config``.
    """

    Config: ClassVar[type] = NoSettings  # frozen dataclass: the only place of the settings' defaults and ranges
    name: ClassVar[str]  # its row in metaopt.registry.PARTS
    uses: ClassVar[tuple[type["Part"], ...]] = ()  # parts that must act beside it
    acts: ClassVar[frozenset[str]] = frozenset()
    events: ClassVar[tuple[str, ...]] = ()  # names of what it reports in StepContext.events
    learned_only: ClassVar[bool] = False  # whether it is of no use without what meta-training learns
    lasting: ClassVar[bool] = False  # whether what it remembers outlives a domain
    helper: ClassVar[bool] = False  # whether it acts for others alone, which bring it along
    own_judge: ClassVar[str] = "keep"  # with a meta-loss that is the policy's own objective: "keep", "freeze" or "drop"

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = self.Config() if config is None else config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note which acts the class defines."""
        super().__init_subclass__(**kwargs)
        cls.acts = frozenset(act for act in ACTS if hasattr(cls, act))

    # -- life ---------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, config: Any, model: SourceModel, seed: int = 0) -> Self:
        """The part before meta-training on a model, with what it learns at its start, drawn from ``seed``."""
        return cls(config)

    def with_settings(self, config: Any) -> Self:
        """The part with other settings in deployment; what it has learned goes with its own, and is left behind."""
        return type(self)(config)

    def attach(self, model: SourceModel) -> SourceModel:
        """The model that the method adapts, in place of the one given."""
        return model

    def prepare(self, model: nn.Module, images: Callable[[], Tensor], batch_size: int) -> None:
        """Take what it needs of clean source images, (n, 3, H, W), which ``images`` gives; most need nothing."""

    def start(self, parameters: Parameters) -> Parameters:
        """The adapted tensors before the first batch, in place of those given."""
        return parameters

    def init(self, parameters: Parameters) -> Any:
        """State before the first batch: a tree of tensors, or None."""
        return None

    def init_beside(self, parameters: Parameters, states: Mapping[str, Any]) -> Any:
        """State before the first batch of a part that keeps what others remember of a domain, ``states``; or None."""
        return None

    def exported(self, parameters: Parameters, state: Any) -> Parameters:
        """The adapted tensors that the exported model has, in place of those given."""
        return parameters

    def exported_buffers(self, model: SourceModel, state: Any) -> Parameters:
        """The buffers that the exported model has in place of the source's, by their names in the model."""
        return {}

    def not_exported(self, state: Any) -> str | None:
        """What of it no exported model can have, in a few words; None: nothing."""
        return None

    # -- learning -----------------------------------------------------------------------------------------------------

    def learned_groups(self) -> dict[str, dict[str, Tensor]]:
        """Its tensors by the group that ``meta.frozen`` names, each by its name in the part."""
        return {self.name: dict(self.named_parameters())}

    def direct(self) -> Iterable[Tensor]:
        """Learned tensors that act in the forward pass itself, not through the update rule."""
        return ()

    def meta_rate(self) -> float | None:
        """Peak of the meta-optimizer's rate on its tensors, with a gradient clip of their own; None: the common one."""
        return None

    def penalty(self) -> Tensor | None:
        """What the meta-loss gets on top for its tensors, a scalar; None: nothing."""
        return None

    # -- file, transfer -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What it is built from, as primitives; learned values travel in the policy's ``state_dict``."""
        return {"config": asdict(self.config)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown setting, or a value of another type or out of range.
        """
        return cls(cls.settings_of(values))

    @classmethod
    def settings_of(cls, values: Mapping[str, Any]) -> Any:
        """The settings in what :meth:`to_dict` gave."""
        return build(cls.Config, values["config"], cls.name)

    def check_layout(self, layout: ParameterLayout) -> None:
        """Refuse to have been learned on other tensors than these, the adapted ones of the policy's own model.

        Raises:
            ValueError: a tensor of that name has another size, or there is none.
        """

    def check_state(self, state: Any, classes: int) -> None:
        """Refuse a state, read from a file, that no stream of batches leads to; its tensors are finite.

        Args:
            state: in the structure of :meth:`init`; what is empty there may have any shape.
            classes: C of the model.

        Raises:
            ValueError: it is none.
        """

    def transferred(self, model: SourceModel) -> tuple[Self | None, str]:
        """The part for another model, and a few words on it; None where it stays behind."""
        return self, "as learned"


class LayeredPart(Part):
    """A part that has something of its own for each of some layers, which its file names.

    Args:
        config: its settings.
        layers: names of the layers, in the model's order.
    """

    def __init__(self, config: Any = None, layers: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.layers = tuple(layers)

    def to_dict(self) -> dict[str, Any]:
        """Settings and layers."""
        return {**super().to_dict(), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        if not isinstance(values["layers"], list) or not all(isinstance(name, str) for name in values["layers"]):
            raise ValueError(f"the layers of {cls.name} are no list of names")
        return cls(cls.settings_of(values), values["layers"])


def settings(kind: type, values: Any, key: str) -> Any:
    """A part's settings from what a configuration file says of it.

    Args:
        kind: the dataclass of the settings.
        values: True for the defaults, a mapping of some of them, or a plain value for the first.
        key: what messages call it.

    Raises:
        ConfigError: an unknown setting, or a value of another type or out of range.
    """
    names = [each.name for each in fields(kind)]
    if values is True:
        values = {}
    elif not isinstance(values, Mapping) and not isinstance(values, kind):
        if not names:
            raise ConfigError(f"{key} is {values!r}; it has no settings: set {key}=true or {key}=false")
        values = {names[0]: values}
    return build(kind, values, key)
