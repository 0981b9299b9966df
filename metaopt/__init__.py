"""metaopt: meta-train how a vision model adapts itself at test time, and deploy the result."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaopt.catalogue import list_methods as list_methods
    from metaopt.catalogue import list_parts as list_parts
    from metaopt.catalogue import load_method as load_method
    from metaopt.data import register_shift as register_shift
    from metaopt.data import shift_names as shift_names
    from metaopt.errors import MetaoptError as MetaoptError
    from metaopt.meta import MetaTrainConfig as MetaTrainConfig
    from metaopt.meta import fit_verdict as fit_verdict
    from metaopt.meta import meta_train as meta_train
    from metaopt.models import SourceModel as SourceModel
    from metaopt.models import load_source_model as load_source_model
    from metaopt.online import OnlineAdapter as OnlineAdapter
    from metaopt.online import run_stream as run_stream
    from metaopt.optimizers.interop.torch_optim import MGGOptimizer as MGGOptimizer
    from metaopt.policy import AdaptationPolicy as AdaptationPolicy
    from metaopt.policy import MethodConfig as MethodConfig
    from metaopt.policy import build_method as build_method
    from metaopt.policy import new_policy as new_policy

_HOMES = {
    "AdaptationPolicy": "metaopt.policy",
    "MGGOptimizer": "metaopt.optimizers.interop.torch_optim",
    "MetaTrainConfig": "metaopt.meta",
    "MetaoptError": "metaopt.errors",
    "MethodConfig": "metaopt.policy",
    "OnlineAdapter": "metaopt.online",
    "SourceModel": "metaopt.models",
    "build_method": "metaopt.policy",
    "fit_verdict": "metaopt.meta",
    "list_methods": "metaopt.catalogue",
    "list_parts": "metaopt.catalogue",
    "load_method": "metaopt.catalogue",
    "load_source_model": "metaopt.models",
    "meta_train": "metaopt.meta",
    "new_policy": "metaopt.policy",
    "register_shift": "metaopt.data",
    "run_stream": "metaopt.online",
    "shift_names": "metaopt.data",
}


def __getattr__(name: str) -> Any:
    """What is named above, from where it lives: importing metaopt alone loads none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'metaopt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
