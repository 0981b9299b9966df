"""Which of an adapter's forward passes run by ``torch.compile``."""

import logging

from metaopt.models import SourceModel
from metaopt.objectives import WeightedObjective

_LOG = logging.getLogger(__name__)


def compile_network(model: SourceModel, objective: WeightedObjective | None, memory: str) -> None:
    """Compile the network, and say which passes stay as they are.

    Args:
        model: that the adapter runs.
        objective: None where nothing is learned.
        memory: how activations are kept (`metaopt.activation_memory.MemoryConfig`).

    Raises:
        ModelError: there is no compiler.
    """
    model.compile_network(learns=memory == "dense")
    if objective is not None and memory != "dense":
        _LOG.warning("compile: memory=%s sees each operator, so that passes with a gradient run uncompiled", memory)
    elif objective is not None and "features" in objective.needs:
        _LOG.warning("compile: the objective reads features of the blocks, so that its passes run uncompiled")
