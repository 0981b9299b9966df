"""Experts attached to a source model, and taken off again.

The mixtures are modules of their own, in one container that the `SourceModel` holds under the name ``experts``, beside
the network. So the network's ``state_dict`` and ``weights_sha256`` do not know of them, while
``torch.func.functional_call`` on the source model swaps their tensors by names such as
``experts.blocks/0/mlp.up_weight``. Forward hooks on the network's modules bring the flow to them. A hook is an object
that refers to the container, no closure: deep copies and pickles of the source model carry their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metaopt.errors import ModelError
from metaopt.experts.config import ExpertsConfig
from metaopt.experts.mixture import EXPERT_TENSORS, ExpertMixture
from metaopt.experts.sites import Site, SitePredicate, find_sites, from_tokens, to_tokens
from metaopt.models import SourceModel
from metaopt.parameters import AdaptedTensor, ParameterLayout

NAME = "experts"
"""What the source model calls its experts."""

_DEFAULT_SIDE = 64  # pixels of the image that finds the sites, where the model does not tell its own


class Experts(nn.Module):
    """The mixtures of one source model, one for each site, all of one config; see `attach_experts`."""

    def __init__(self, config: ExpertsConfig, sites: list[Site]) -> None:
        super().__init__()
        self.config = config
        self.sites = tuple(sites)
        self.active = True
        self.handles: list[RemovableHandle] = []
        for site in sites:
            self.add_module(site_key(site), ExpertMixture(site.width, config))

    def mixture(self, site: Site) -> ExpertMixture:
        """The mixture at a site."""
        return self.get_submodule(site_key(site))  # type: ignore[return-value]

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Within this context the source model is as if it had no experts."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before


class _AddExperts:
    """Forward hook that adds a mixture's output to a module's."""

    def __init__(self, experts: Experts, site: Site, reader: "_ReadResidual | None") -> None:
        self.experts = experts
        self.site = site
        self.reader = reader

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self.experts.active:
            return None
        flow = output if self.site.placement == "after" else inputs[0]
        if self.reader is not None:
            flow, self.reader.flow = self.reader.flow, None
            assert flow is not None
        tokens = self.experts.mixture(self.site)(to_tokens(flow, self.site.axis))
        return output + from_tokens(tokens, output, self.site.axis)


class _ReadResidual:
    """Forward hook on a norm layer that keeps its input until the MLP behind it has run."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.flow: Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        if self.experts.active:
            self.flow = inputs[0]


def site_key(site: Site) -> str:
    """Name of a site's mixture in its container: the module's, with slashes, for names of modules hold no dots."""
    return site.name.replace(".", "/")


def attach_experts(
    model: SourceModel,
    config: ExpertsConfig,
    predicate: SitePredicate | None = None,
    *,
    seed: int = 0,
    images: Tensor | None = None,
) -> Experts:
    """Put a mixture of experts at each site of a source model; its outputs stay as they were, to the last bit.

    Beside an MLP, experts add to the MLP's own output: where the block scales that (LayerScale, ConvNeXt's gamma), it
    scales the experts' with it.

    Args:
        model: changed in place; also its deep copies and pickles then have experts.
        config: of every mixture.
        predicate: which modules, and where: by default beside every MLP, or after every stage where there are none.
        seed: of the experts' and gates' first values.
        images: (1, 3, H, W), an input that the network takes; by default of its own size, or 64 x 64.

    Raises:
        ModelError: the model has experts already, or no module for them (see `find_sites`).
    """
    if hasattr(model, NAME):
        raise ModelError("the model has experts already; allowed is one set: call detach_experts(model) first")
    reference = next(model.parameters())
    if images is None:
        size = (model.spec.input_size or (3, _DEFAULT_SIDE, _DEFAULT_SIDE))[1:]
        images = torch.zeros(1, model.spec.channels, *size, dtype=reference.dtype, device=reference.device)
    sites = find_sites(model.module, predicate, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experts = Experts(config, sites)
    experts.to(reference.device, reference.dtype)
    for site in sites:
        reader = None
        if config.reads == "residual" and site.norm is not None:
            reader = _ReadResidual(experts)
            experts.handles.append(model.module.get_submodule(site.norm).register_forward_hook(reader))
        hook = _AddExperts(experts, site, reader)
        experts.handles.append(model.module.get_submodule(site.name).register_forward_hook(hook))
    model.add_module(NAME, experts.eval())
    return experts


def with_experts(model: SourceModel, config: ExpertsConfig, *, seed: int = 0) -> SourceModel:
    """Another model with experts, which shares every tensor of the network with ``model``; that one stays as it is.

    ``seed`` is that of the experts' and gates' first values.

    Raises:
        ModelError: as of `attach_experts`.
    """
    beside = model.skeleton()
    attach_experts(beside, config, seed=seed)
    return beside


def detach_experts(model: SourceModel) -> Experts:
    """Take the experts off and give them back, with what they have learned; the model is as before they came.

    Raises:
        ModelError: the model has none.
    """
    experts = get_experts(model)
    for handle in experts.handles:
        handle.remove()
    experts.handles.clear()
    delattr(model, NAME)
    return experts


def get_experts(model: nn.Module) -> Experts:
    """The experts of a source model.

    Raises:
        ModelError: the model has none.
    """
    experts = getattr(model, NAME, None)
    if not isinstance(experts, Experts):
        raise ModelError(f"{type(model).__name__} has no experts; allowed are models with: call attach_experts first")
    return experts


def expert_layout(model: nn.Module, *, experts: bool = True, gates: bool = True) -> ParameterLayout:
    """The tensors of a source model's experts and of their gates, as `metaopt.parameters.adapted_layout` gives norms'.

    Kinds are "expert.up_weight" and the like, "dag.weight", "asg.bias"; depth is the site's, 0 (first) to 1 (last).
    ``experts`` and ``gates`` say which of the two count. ASG learns nothing under hard dropout: leave its tensors to
    meta-training.

    Raises:
        ModelError: the model has no experts.
    """
    attached = get_experts(model)
    tensors: list[AdaptedTensor] = []
    for position, site in enumerate(attached.sites):
        depth = position / max(1, len(attached.sites) - 1)
        for name, tensor in attached.mixture(site).named_parameters():
            own = name in EXPERT_TENSORS
            if not (experts if own else gates):
                continue
            kind = f"expert.{name}" if own else name.replace(".router.", ".")
            tensors.append(AdaptedTensor(f"{NAME}.{site_key(site)}.{name}", kind, depth, tuple(tensor.shape)))
    return ParameterLayout(tuple(tensors))


def split_experts(parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The experts' own tensors among the adapted ones, by site and role; gates and norm layers are left out."""
    sites: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        prefix, _, role = name.rpartition(".")
        if prefix.startswith(f"{NAME}.") and role in EXPERT_TENSORS:
            sites.setdefault(prefix.removeprefix(f"{NAME}."), {})[role] = tensor
    return sites
