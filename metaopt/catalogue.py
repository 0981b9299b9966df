"""What there is to choose from: methods, as files in ``configs/method/``, and the rules, terms and parts they name."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from metaopt import registry
from metaopt.errors import ConfigError, check_kind
from metaopt.policy.method import MethodConfig
from metaopt.settings import build

CONFIGS = Path(__file__).parent / "configs"
"""The YAML files; in a checkout a link to the folder at its top."""


def list_methods(pattern: str = "*") -> dict[str, str]:
    """The methods whose names fit a pattern such as ``"*ta"``, with one line on each.

    Raises:
        ConfigError: the pattern is not text.
    """
    _check_pattern(pattern)
    files = sorted((CONFIGS / "method").glob("*.yaml"))
    return {file.stem: first_comment(file) for file in files if fnmatch(file.stem, pattern)}


def list_parts(pattern: str = "*") -> dict[str, str]:
    """The parts of a policy whose names fit a pattern, with one line on each.

    Raises:
        ConfigError: the pattern is not text.
    """
    _check_pattern(pattern)
    return {name: line for name, line in registry.describe("part").items() if fnmatch(name, pattern)}


def _check_pattern(pattern: object) -> None:
    check_kind("pattern", pattern, str, 'text such as "*ta"', "leave it out for all")


def load_method(name: str, **changes: Any) -> MethodConfig:
    """The method of that name, as its file says, with some settings changed.

    Raises:
        ConfigError: there is none, or a setting is unknown or out of range.
    """
    methods = list_methods()
    if not isinstance(name, str) or name not in methods:
        raise ConfigError(f"method {name!r} is unknown; allowed are {', '.join(methods)}: choose one")
    values = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
    return build(MethodConfig, values | changes, "method")


def first_comment(file: Path) -> str:
    """The first line of a YAML file's header."""
    line = file.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip()
