"""From command-line arguments to a checked settings dataclass, by Hydra's compose interface.

Hydra's own entry point refuses ``--policy``, takes ``+typo=1`` for a new setting and writes folders; so the arguments
are read here, Hydra merges the YAML files, and nothing is written and no folder is changed.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from metaopt.errors import ConfigError

T = TypeVar("T")

_POLICY = "--policy"


@dataclass(frozen=True)
class _Override:
    """One ``key=value`` in a form that Hydra parses."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def compose(schema: type[T], config_name: str, argv: Sequence[str], config_dir: Path) -> T:
    """Merge ``config_dir/config_name.yaml`` and the arguments into the settings class ``schema``.

    ``--policy X`` and ``--policy=X`` mean ``policy_path=X method=policy``; a ``method=`` among the arguments is kept.
    ``model=`` takes any name: one without a YAML file is a timm name. A value that Hydra's grammar cannot read, such as
    a path with brackets or commas, is taken as text; for a setting that is a list, commas separate its items.

    Raises:
        ConfigError: an unknown setting (also with ``+``, ``++`` or ``~``), with the nearest valid one; an unknown
            choice; a value of the wrong type or out of range.
    """
    config = _merge(config_name, argv, config_dir)
    try:
        plain = OmegaConf.to_container(config, throw_on_missing=True)
        typed = OmegaConf.merge(OmegaConf.structured(schema), _split_lists(plain, schema))
        return cast(T, OmegaConf.to_object(typed))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is not set; it has no default: set {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        value = OmegaConf.select(config, error.full_key or "", default="?")
        reason = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key}={value} is not allowed: {reason}; see --help for the defaults") from error


def help_text(config_name: str, argv: Sequence[str], config_dir: Path) -> str:
    """What ``--help`` prints: the YAML file's header, the choices, and every setting with the arguments applied."""
    config = _merge(config_name, argv, config_dir)
    header = [line[2:] for line in (config_dir / f"{config_name}.yaml").read_text().splitlines() if line[:1] == "#"]
    choices = [
        f"  {group}=".ljust(14) + ", ".join(options) + (", or any timm name" if group == "model" else "")
        for group, options in _groups(config_name, config_dir).items()
    ]
    settings = ["  " + line for line in OmegaConf.to_yaml(config).splitlines()]
    return "\n".join([*header, "", "Choices:", *choices, "", "Settings (key=value, key.key=value):", *settings])


def _merge(config_name: str, argv: Sequence[str], config_dir: Path) -> DictConfig:
    """The YAML files with the arguments applied, before types are checked."""
    if not (config_dir / f"{config_name}.yaml").is_file():
        raise ConfigError(f"no file {config_dir / config_name}.yaml; commands need the checkout's configs/: restore it")
    groups = _groups(config_name, config_dir)
    chosen: list[_Override] = []
    values: list[_Override] = []
    for override in _expand_policy(_read(argv), groups):
        if override.key in groups:
            for part in _choose(override, groups[override.key]):
                (chosen if part.key in groups else values).append(part)
        else:
            values.append(override)
    with hydra.initialize_config_dir(str(config_dir.resolve()), version_base="1.3", job_name=config_name):
        try:
            base = hydra.compose(config_name, [str(override) for override in chosen])
            for override in values:
                _check_key(override, base, groups, config_dir)
            merged = hydra.compose(config_name, [str(override) for override in (*chosen, *values)])
            OmegaConf.resolve(merged)
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"{' '.join(argv)}: {reason}; see --help for the settings") from error
    return merged


def _read(argv: Sequence[str]) -> Iterator[_Override]:
    """Each argument as an override, ``--policy`` included; Hydra's prefixes and other options are refused."""
    arguments = iter(argv)
    for argument in arguments:
        if argument == _POLICY:
            argument = f"{_POLICY}={next(arguments, '')}"
        key, equals, value = argument.partition("=")
        if key == _POLICY:
            if not value:
                raise ConfigError("--policy has no path; it takes a checkpoint: write --policy ckpt.pt")
            yield _Override(_POLICY, _quote(value))
        elif argument.startswith("-"):
            raise ConfigError(f"{argument} is unknown; allowed are --policy, --help and key=value: see --help")
        elif not equals and not key.startswith("~"):
            raise ConfigError(f"{argument!r} is not a setting; settings are written key=value: see --help")
        else:
            yield _Override(key, _readable(value))


def _expand_policy(overrides: Iterator[_Override], groups: dict[str, list[str]]) -> list[_Override]:
    """Write ``--policy X`` as settings; a run of one method runs ``policy``, unless the user names another."""
    listed = list(overrides)
    if any(override.key == _POLICY for override in listed):
        if "method" in groups and all(override.key != "method" for override in listed):
            listed.append(_Override("method", "policy"))
        return [_Override("policy_path", o.value) if o.key == _POLICY else o for o in listed]
    return listed


def _readable(value: str) -> str:
    """The value itself where Hydra's grammar reads it as one value, else quoted as text."""
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return _quote(value)
    return _quote(value) if parsed.is_sweep_override() else value


def _quote(value: str) -> str:
    """Text in single quotes, where Hydra reads a backslash as an escape only in a run that ends at a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _groups(config_name: str, config_dir: Path) -> dict[str, list[str]]:
    """Options of each group that this command chooses one of, by the group's name; those of included files too."""
    defaults = cast(DictConfig, OmegaConf.load(config_dir / f"{config_name}.yaml")).get("defaults", [])
    names = [str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry if "@" not in str(key)]
    groups = {name: sorted(path.stem for path in (config_dir / name).glob("*.yaml")) for name in names}
    for included in (entry for entry in defaults if isinstance(entry, str) and entry != "_self_"):
        groups |= _groups(included, config_dir)
    return groups


def _choose(override: _Override, options: list[str]) -> list[_Override]:
    """A group's choice; a model without a YAML file is a timm name."""
    value = override.value.strip("'\"")
    if value in options:
        return [_Override(override.key, value)]
    if override.key == "model" and value not in ("", "null"):
        return [_Override("model", "timm"), _Override("model.name", _quote(value))]
    raise ConfigError(
        f"{override.key}={value} is unknown; allowed are {', '.join(options)}: "
        f"did you mean {override.key}={_nearest(value, options)}?"
    )


def _check_key(override: _Override, base: DictConfig, groups: dict[str, list[str]], config_dir: Path) -> None:
    """Refuse a key that the composed settings do not have."""
    key = override.key.lstrip("+~")
    keys = [*_keys(base), *groups]
    if key not in keys:
        _refuse(override.key, key, keys, groups, config_dir)
    if key != override.key:
        raise ConfigError(f"{override.key} is not allowed; settings are never added or removed: write {key}=VALUE")
    node = OmegaConf.select(base, key)
    if isinstance(node, DictConfig) and not override.value.startswith("{"):
        names = ", ".join(f"{key}.{name}" for name in node)
        raise ConfigError(f"{key}={override.value} is not allowed; {key} holds {names}: set one of these")


def _refuse(written: str, key: str, keys: list[str], groups: dict[str, list[str]], config_dir: Path) -> NoReturn:
    group, _, rest = key.partition(".")
    for option in groups.get(group, []):
        if rest and rest in _keys(cast(DictConfig, OmegaConf.load(config_dir / group / f"{option}.yaml"))):
            raise ConfigError(f"{written} is a setting of {group}={option} alone; choose it: add {group}={option}")
    key = key.partition("@")[0]
    raise ConfigError(f"{written} is an unknown setting; did you mean {_nearest(key, keys)}? --help shows all")


def _nearest(word: str, candidates: Sequence[str]) -> str:
    """The candidate most like ``word``, as a whole or in its last part (``lr`` for ``method.lr``)."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return max(candidates, key=likeness)


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key, inner ones included."""
    for name in config:
        key = f"{prefix}{name}"
        yield key
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _keys(node, f"{key}.")


def _split_lists(values: Any, schema: type) -> dict[str, Any]:
    """Turn text into a list wherever ``schema`` holds a list; ``values`` are the settings as plain containers."""
    result = dict(values)
    for name, hint in get_type_hints(schema).items():
        value = result.get(name)
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
            result[name] = _split_lists(value, hint)
        elif list in map(get_origin, (hint, *get_args(hint))) and not isinstance(value, (list, NoneType)):
            result[name] = [item.strip() for item in str(value).split(",")]
    return result
