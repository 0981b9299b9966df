"""Which tensors of a source model a method adapts."""

from metaopt.experts.adapter import expert_layout
from metaopt.models import SourceModel
from metaopt.parameters import ParameterLayout, adapted_layout, full_layout

ADAPTS = ("norm", "experts", "experts_norm", "all")


def layout_of(adapts: str, model: SourceModel) -> ParameterLayout:
    """The tensors that ``adapts`` names, in order.

    ``norm`` is the affine weights and biases of normalisation layers, ``experts`` the experts' own tensors without
    their gates, ``experts_norm`` both, and ``all`` every parameter, gates included.

    Args:
        adapts: one of `ADAPTS`.
        model: source model, with experts where they adapt.

    Raises:
        ModelError: there are no such tensors.
    """
    if adapts == "all":
        return full_layout(model)
    norms = adapted_layout(model).tensors if adapts != "experts" else ()
    experts = expert_layout(model, gates=False).tensors if adapts != "norm" else ()
    return ParameterLayout((*norms, *experts))
