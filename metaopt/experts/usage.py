"""Which experts are used on which domain: mean weights, for curves and figures."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt.errors import DataError
from metaopt.experts.adapter import Experts, get_experts, site_key

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ExpertUsage:
    """Sums up what the domain-aware gates decide, while a model runs as it would anyway.

    ``with usage.recording(model, "fog"): model(images)``, then ``usage.weights("fog")``. Nothing is kept on the model.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}  # domain -> site -> (E,)
        self._tokens: dict[str, dict[str, int]] = {}

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in the order of their first recording."""
        return tuple(self._sums)

    @contextmanager
    def recording(self, model: nn.Module, domain: str) -> Iterator[None]:
        """Count every forward pass of ``model`` inside the context as one of ``domain``.

        Raises:
            ModelError: the model has no experts.
        """
        experts = get_experts(model)
        with ExitStack() as handles:
            for site in experts.sites:
                hook = self._hook(domain, site_key(site))
                handles.callback(experts.mixture(site).dag.register_forward_hook(hook).remove)
            yield

    def _hook(self, domain: str, site: str) -> Any:
        def record(_gate: nn.Module, _inputs: Any, weights: Tensor) -> None:
            rows = weights.detach().flatten(0, -2).double()  # (tokens or samples, E)
            sums, tokens = self._sums.setdefault(domain, {}), self._tokens.setdefault(domain, {})
            sums[site] = sums.get(site, torch.zeros(())) + rows.sum(dim=0).cpu()
            tokens[site] = tokens.get(site, 0) + rows.shape[0]

        return record

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far: tensors and primitives."""
        return {"sums": _copied(self._sums), "tokens": _copied(self._tokens)}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Go on counting where :meth:`state_dict` was taken."""
        self._sums, self._tokens = _copied(values["sums"]), _copied(values["tokens"])

    def weights(self, domain: str) -> dict[str, Tensor]:
        """Mean weight of each expert over the domain's tokens, (E,) for each site.

        Raises:
            DataError: nothing was recorded of the domain.
        """
        if domain not in self._sums:
            raise DataError(f"no expert usage of domain {domain!r}; allowed are {', '.join(self.domains) or 'none'}")
        return {site: total / self._tokens[domain][site] for site, total in self._sums[domain].items()}

    def by_expert(self, model: nn.Module, domain: str) -> dict[str, float]:
        """Mean weight of each expert over the domain's tokens and all sites, by a name for a tag, such as ``low_0``.

        Raises:
            DataError: nothing was recorded of the domain.
        """
        names = (name.replace(" ", "_") for name in expert_names(get_experts(model)))
        return dict(zip(names, self._mean(domain).tolist(), strict=True))

    def _mean(self, domain: str) -> Tensor:
        return torch.stack([*self.weights(domain).values()]).mean(dim=0)

    def figure(self, experts: Experts) -> "Figure":
        """Mean weights over all sites, domains against experts; domain-specific experts are marked "low".

        Raises:
            DataError: nothing was recorded.
        """
        if not self._sums:
            raise DataError("no expert usage was recorded; allowed are figures of at least one domain: record one")
        from matplotlib.figure import Figure

        means = [self._mean(domain) for domain in self.domains]
        count, names = experts.config.experts, expert_names(experts)
        figure = Figure(figsize=(1.5 + 0.6 * count, 1.2 + 0.3 * len(means)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(torch.stack(means).numpy(), aspect="auto", cmap="viridis")
        axes.set_xticks(range(count), names, rotation=45, ha="right")
        axes.set_yticks(range(len(means)), self.domains)
        axes.set_title("Mean weight of each expert")
        figure.colorbar(image)
        return figure


def _copied(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {domain: dict(own) for domain, own in values.items()}


def expert_names(experts: Experts) -> list[str]:
    """A name for each expert of a mixture; domain-specific ones are "low"."""
    return [f"{'low' if i < experts.config.low_experts else 'high'} {i}" for i in range(experts.config.experts)]
