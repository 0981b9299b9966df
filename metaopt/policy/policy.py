"""The adaptation policy: the composition of parts that decides how a model changes itself, batch by batch.

Every method is one instance of :class:`AdaptationPolicy`; what differs is which parts it holds:

========= ============== ================= ======================= ======================= ==============
method    adapts         statistics        objective               update rule             teacher
========= ============== ================= ======================= ======================= ==============
source    --             of the source     --                      --                      --
bn        --             of the batch      --                      --                      --
tent      norm           of the batch      entropy                 Adam                    --
adam      norm           of the batch      any                     Adam                    --
cotta     all            of the batch      teacher                 Adam                    mean + restore
moase     experts + norm of the batch      teacher + proximal      Adam                    mean + restore
mgtta     norm           of the batch      entropy + discrepancy   ``published`` generator --
policy    norm, experts  of the batch      learned weights         learned generator       --
========= ============== ================= ======================= ======================= ==============
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from metaopt.activation_memory import ActivationMemory, Allocation
from metaopt.experts import (
    ExpertsConfig,
    LearnedExperts,
    TeacherConfig,
    TeacherState,
    init_teacher,
    with_experts,
)
from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective
from metaopt.parameters import ParameterLayout, own_values
from metaopt.policy.adapts import layout_of
from metaopt.policy.balance import ClassBalance
from metaopt.policy.forward import evaluated, predicted
from metaopt.policy.gate import Gate, LearnedGate, init_gate
from metaopt.policy.initialization import LearnedInitialization
from metaopt.policy.prior import Prior
from metaopt.policy.restoration import SourceRestoration
from metaopt.policy.shift import init_reference
from metaopt.policy.state import PolicyState
from metaopt.policy.step import adaptation_step
from metaopt.types import ApplyUpdate, Parameters, SourceStatistics, StepOutput, UpdateRule

if TYPE_CHECKING:
    from metaopt.policy.checkpoint import SourceRecord


class AdaptationPolicy(nn.Module):
    """Objective, update rule, normalisation statistics, experts and teacher of one method.

    Args:
        method: name of the composition, for reports.
        batch_statistics: whether BatchNorm layers normalise by the batch (else by the source's running statistics).
        prior: for how many images the source's statistics count beside the batch's; None: for none.
        objective: label-free loss; None for a method that never updates.
        rule: update rule; None for a method that never updates. A learned rule is an ``nn.Module`` and its tensors are
            learned together with the objective's weights.
        statistics: source statistics of the features, where the objective needs them.
        seed: of the augmented views, where the objective compares two; with a step's number it tells its view.
        pruning: chooses what is kept of each layer's activations, where a step is told to keep less than all.
        adapts: which tensors change (`metaopt.policy.adapts.ADAPTS`).
        experts: mixtures that stand beside the network (:meth:`attach`), untrained; None: none, or the learned ones.
        learned_experts: mixtures whose gates and first values are learned.
        teacher: running mean of the adapted tensors, the pull of the experts towards it, and random restores; None: no
            teacher.
        predict_with: whose logits a step hands back, "student" or "teacher".
        restoration: how much of the source comes back before each batch; None: nothing ever does.
        gate: whether a batch is worth an update; None: every one is.
        initialization: where the norm layers start; None: at the source's values.
        balance: correction of the predictions by what a batch as a whole holds; None: they stay as they are.
    """

    def __init__(
        self,
        method: str,
        *,
        batch_statistics: bool = True,
        prior: Prior | None = None,
        objective: WeightedObjective | None = None,
        rule: UpdateRule | None = None,
        statistics: SourceStatistics | None = None,
        seed: int = 0,
        pruning: Allocation | None = None,
        adapts: str = "norm",
        experts: ExpertsConfig | None = None,
        learned_experts: LearnedExperts | None = None,
        teacher: TeacherConfig | None = None,
        predict_with: str = "student",
        restoration: SourceRestoration | None = None,
        gate: Gate | None = None,
        initialization: LearnedInitialization | None = None,
        balance: ClassBalance | None = None,
    ) -> None:
        super().__init__()
        if (objective is None) != (rule is None):
            raise ValueError("an objective needs an update rule, and an update rule an objective")
        if teacher is None and (predict_with == "teacher" or (objective is not None and objective.needs_teacher)):
            raise ValueError("who predicts with a teacher, or learns from one, needs its settings")
        self.method = method
        self.batch_statistics = batch_statistics
        self.prior = prior
        self.objective = objective
        self.rule = rule
        self.statistics = statistics
        self.seed = seed
        self.pruning = pruning
        self.adapts = adapts
        self.learned_experts = learned_experts
        self.experts = experts if learned_experts is None else learned_experts.config.mixtures
        self.teacher = teacher
        self.predict_with = predict_with
        self.restoration = restoration
        self.gate = gate
        self.initialization = initialization
        self.balance = balance
        self.source: SourceRecord | None = None  # the model that it was meta-trained on, if it was
        self.training: dict[str, Any] = {}  # how it was meta-trained: primitives, for reports

    @property
    def updates(self) -> bool:
        """Whether the method changes parameters at all."""
        return self.rule is not None

    @property
    def pulls(self) -> bool:
        """Whether the loss pulls the experts towards an anchor."""
        return self.experts is not None and self.teacher is not None and self.teacher.proximal > 0

    @property
    def watches(self) -> bool:
        """Whether the distance of each batch from those before it is measured."""
        return self.restoration is not None or isinstance(self.gate, LearnedGate)

    @property
    def known_shifts(self) -> frozenset[str]:
        """Names of the shifts that the policy was meta-trained or selected on: a score on those is no fair test."""
        config = self.training.get("config", {})
        return frozenset([*self.training.get("shifts", ()), *config.get("selection_shifts", ())])

    def attach(self, model: SourceModel) -> SourceModel:
        """The model that the method adapts: where it has experts, one that shares the network's tensors and has them.

        Raises:
            ModelError: the model has no place for experts.
        """
        if self.learned_experts is not None:
            return self.learned_experts.attach(model)
        return model if self.experts is None else with_experts(model, self.experts, seed=self.seed)

    def layout(self, model: SourceModel) -> ParameterLayout:
        """The tensors that adapt, of a model that :meth:`attach` gave.

        Raises:
            ModelError: there are none.
        """
        return layout_of(self.adapts, model)

    def start(self, parameters: Parameters) -> Parameters:
        """The adapted tensors before the first batch: the given ones, or where learned, other first values."""
        initial = {} if self.learned_experts is None else self.learned_experts.initial()
        started = {name: initial.get(name, tensor) for name, tensor in parameters.items()}
        return started if self.initialization is None else self.initialization(started)

    def initial(self, model: nn.Module, parameters: Parameters) -> Parameters:
        """Values of the adapted tensors before the first batch, which adaptation never changes."""
        return self.start(own_values(model, parameters))

    def init(self, parameters: Parameters) -> PolicyState:
        """State before the first batch."""
        first = next(iter(parameters.values()))
        return PolicyState(
            gate=None if self.gate is None else init_gate(first.detach()),
            shift=init_reference(first.shape[-1], first.detach()) if self.watches else None,
            rule=None if self.rule is None else self.rule.init(parameters),
            pruning=None if self.pruning is None else self.pruning.init(parameters),
            teacher=None if self.teacher is None else init_teacher(parameters),
        )

    def evaluate(
        self,
        model: nn.Module,
        parameters: Parameters,
        images: Tensor,
        step: int = 0,
        teacher: TeacherState | None = None,
    ) -> StepOutput:
        """Predict and weigh the loss, without an update.

        Args:
            model: source model, called through ``torch.func.functional_call``.
            parameters: adapted tensors that stand in for the model's own.
            images: (B, 3, H, W) in [0, 1].
            step: number of updates before this one, which augmented views of the images are drawn from.
            teacher: state of the teacher, where the method has one; None: as before the first batch.
        """
        return evaluated(self, model, parameters, images, step, teacher)

    def gates(self) -> Parameters:
        """Learned gates, which stay as they are online."""
        return {} if self.learned_experts is None else self.learned_experts.gates()

    def predict(
        self,
        model: nn.Module,
        parameters: Parameters,
        images: Tensor,
        step: int = 0,
        teacher: TeacherState | None = None,
    ) -> StepOutput:
        """Predict alone, by one forward pass without a graph or a loss; arguments as of :meth:`evaluate`."""
        return predicted(self, model, parameters, images, step, teacher)

    def step(
        self,
        model: nn.Module,
        parameters: Parameters,
        state: PolicyState,
        images: Tensor,
        apply: ApplyUpdate | None,
        step: int = 0,
        memory: ActivationMemory | None = None,
    ) -> tuple[Parameters, PolicyState, StepOutput]:
        """The one adaptation step (:mod:`metaopt.policy.step`): predict on a batch, then update on it.

        Meta-training unrolls it with a differentiable ``apply``; deployment runs it with an in-place one.

        Args:
            model: source model.
            parameters: adapted tensors before this batch.
            state: state before this batch.
            images: (B, 3, H, W) in [0, 1].
            apply: how a loss becomes new parameters; None only for a method that never updates.
            step: as in :meth:`evaluate`.
            memory: how activations are kept for backward; None: as torch keeps them.

        Returns:
            Parameters and state after this batch, and the predictions made *before* the update.
        """
        return adaptation_step(self, model, parameters, state, images, apply, step, memory)

    def to(self, *args: Any, **kwargs: Any) -> "AdaptationPolicy":
        """Move the learned tensors and the source statistics."""
        super().to(*args, **kwargs)
        if self.statistics is not None:
            self.statistics = self.statistics.to(*args, **kwargs)
        return self

    def save(self, path: str | Path) -> None:
        """Write the policy to ``path`` (see :mod:`metaopt.policy.checkpoint`)."""
        from metaopt.policy.checkpoint import save_policy

        save_policy(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "AdaptationPolicy":
        """Read a policy from ``path`` (see :mod:`metaopt.policy.checkpoint`)."""
        from metaopt.policy.checkpoint import load_policy

        return load_policy(path)
