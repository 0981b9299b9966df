"""What of an adapted model can leave as plain weights, and what cannot."""

from torch import Tensor

from metaopt.models import SourceModel
from metaopt.policy import AdaptationPolicy
from metaopt.policy.state import State
from metaopt.types import Parameters


def exported_tensors(policy: AdaptationPolicy, model: SourceModel, parameters: Parameters, state: State) -> Parameters:
    """The tensors that an exported model has in place of the source's, under each of their names in the model.

    Args:
        policy: the method.
        model: the model that it adapts (`AdaptationPolicy.attach`).
        parameters: the adapted tensors.
        state: of the rule and the parts.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    buffers: Parameters = {}
    for part in policy.listed:
        parameters = part.exported(parameters, state.get(part.name))
        buffers |= part.exported_buffers(model, state.get(part.name))
    # By identity, because a layer that is used twice has two names there and one here.
    adapted = {id(own[name]): tensor for name, tensor in parameters.items()}
    return buffers | {name: adapted[id(tensor)] for name, tensor in own.items() if id(tensor) in adapted}


def copied_weights(model: SourceModel, exported: Parameters, prefix: str) -> dict[str, Tensor]:
    """The ``state_dict`` of a model under a prefix, copied in its types, with the exported tensors."""
    own = model.state_dict()
    weights: Parameters = {**own, **{name: tensor for name, tensor in exported.items() if name in own}}
    return {
        name.removeprefix(prefix): tensor.detach().to(own[name], copy=True)
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def not_exported(policy: AdaptationPolicy, state: State) -> tuple[str, ...]:
    """What a method does at each batch and an exported network cannot, a few words each."""
    said = (part.not_exported(state.get(part.name)) for part in policy.listed)
    return tuple(words for words in said if words is not None)
