"""From command-line arguments to a checked settings dataclass, by Hydra's compose interface.

Hydra's own entry point refuses ``--policy``, takes ``+typo=1`` for a new setting and writes folders; so the arguments
are read here, Hydra merges the YAML files, and nothing is written and no folder is changed. Defaults, types and ranges
are those of the library's own dataclasses: a YAML file says what differs.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_args, get_origin, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from metaopt import registry
from metaopt.catalogue import CONFIGS, list_methods, list_parts
from metaopt.data.readers import READERS
from metaopt.errors import ConfigError
from metaopt.policy import MethodConfig
from metaopt.settings import build, converted

T = TypeVar("T")

_POLICY = "--policy"


@dataclass(frozen=True)
class _Override:
    """One ``key=value`` in a form that Hydra parses."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def compose(schema: type[T], config_name: str, argv: Sequence[str]) -> T:
    """Merge a command's YAML file and its arguments into the settings class ``schema``.

    ``--policy X`` and ``--policy=X`` mean ``policy_path=X method=policy``; a ``method=`` among the arguments is kept.
    ``model=`` takes any name: one without a YAML file is a timm name. A value that Hydra's grammar cannot read, such as
    a path with brackets or commas, is taken as text; for a setting that is a list, commas separate its items.

    Raises:
        ConfigError: an unknown setting (also with ``+``, ``++`` or ``~``), with the nearest valid one; an unknown
            choice; a value of the wrong type or out of range.
    """
    merged = _merge(schema, config_name, argv)
    lifted: Mapping[str, str] = getattr(schema, "LIFTED", {})
    for key, home in lifted.items():  # checked here, where it is called as the user knows it
        hint = get_type_hints(get_type_hints(schema)[home])[key]
        merged.setdefault(home, {})[key] = converted(merged.pop(key), hint, key)
    return build(schema, merged)


def help_text(schema: type, config_name: str, argv: Sequence[str]) -> str:
    """What ``--help`` prints: the YAML file's header, the choices, and every setting with the arguments applied."""
    folder = CONFIGS
    header = [line[2:] for line in (folder / f"{config_name}.yaml").read_text().splitlines() if line[:1] == "#"]
    groups = _groups(config_name, folder)
    choices = [
        f"  {group}=".ljust(14) + ", ".join(options) + (", or any timm name" if group == "model" else "")
        for group, options in groups.items()
    ]
    listed = {"Methods": list_methods() if "method" in groups or "methods" in get_type_hints(schema) else {}}
    if "stream" in get_type_hints(schema):
        listed["Streams"] = registry.describe("arrangement")
    if listed["Methods"] or "parts" in getattr(schema, "LIFTED", {}):
        listed |= {"Parts": list_parts(), "Objective terms": registry.describe("objective term")}
    tables = [
        line
        for title, rows in listed.items()
        if rows
        for line in ("", f"{title}:", *(f"  {name.ljust(18)}{words}" for name, words in rows.items()))
    ]
    settings = ["  " + line for line in OmegaConf.to_yaml(_merge(schema, config_name, argv)).splitlines()]
    return "\n".join(
        [*header, "", "Choices:", *choices, *tables, "", "Settings (key=value, key.key=value):", *settings]
    )


def _merge(schema: type, config_name: str, argv: Sequence[str]) -> dict[str, Any]:
    """Defaults of the library, the YAML files, and the arguments; plain containers, types not checked."""
    folder = CONFIGS
    groups, hints = _groups(config_name, folder), get_type_hints(schema)
    # Where the command runs several methods, it knows every one that there is a file for.
    several = get_origin(hints.get("method")) is dict
    chosen = [_Override(f"+method@method.{name}", name) for name in list_methods()] if several else []
    values: list[_Override] = []
    for override in _expand_policy(_read(argv), groups):
        if override.key == "stream" and "stream" in hints and not override.value.startswith("{"):
            override = _Override("stream.name", override.value)
        if override.key in groups:
            for part in _choose(override, groups[override.key]):
                (chosen if part.key in groups else values).append(part)
        else:
            values.append(override)
    with hydra.initialize_config_dir(str(folder.resolve()), version_base="1.3", job_name=config_name):
        try:
            composed = hydra.compose(config_name, [str(override) for override in chosen])
            base = _plain(composed)
            defaults = OmegaConf.merge(_defaults(schema), _reader_defaults(base))
            known = [*_keys(_plain(OmegaConf.merge(defaults, base))), *_open_keys(schema, base), *groups]
            for override in values:
                _check_key(override, known, groups, folder)
            for parsed in OverridesParser.create().parse_overrides([str(override) for override in values]):
                OmegaConf.update(composed, parsed.key_or_group, parsed.value(), merge=True, force_add=True)
            return _plain(OmegaConf.merge(defaults, _plain(composed)), complete=True)
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} is not set; it has no default: set {error.full_key}=VALUE") from error
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ConfigError(f"{' '.join(argv)}: {reason}; see --help for the settings") from error


def _plain(config: Any, complete: bool = False) -> dict[str, Any]:
    """Plain containers; with ``complete``, none of their values may be missing."""
    found = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=complete)
    return cast(dict[str, Any], found)


def _defaults(schema: type) -> dict[str, Any]:
    """Every default of a settings class as plain values, where a user meets it."""
    hints, found = get_type_hints(schema), dict[str, Any]()
    for each in fields(schema):
        hint = hints[each.name]
        if each.default is not MISSING:
            found[each.name] = each.default
        elif each.default_factory is not MISSING:
            made = each.default_factory()
            found[each.name] = asdict(made) if is_dataclass(made) and not isinstance(made, type) else made
        elif is_dataclass(hint) and isinstance(hint, type):
            found[each.name] = _defaults(hint)
    for key, home in getattr(schema, "LIFTED", {}).items():
        found[key] = found[home].pop(key)
    return cast(dict[str, Any], _listed(found))


def _reader_defaults(base: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the reader that the data are read by."""
    return {"data": _listed(asdict(READERS[base["data"]["name"]]()))} if "data" in base else {}


def _listed(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _open_keys(schema: type, base: Mapping[str, Any]) -> Iterator[str]:
    """Keys that no default shows: terms, parts and their settings, a rule's, and those of a stream's arrangement."""
    hints = get_type_hints(schema)
    if "stream" in hints:
        kinds = [registry.get("arrangement", name) for name in registry.ARRANGEMENTS]
        yield from ("stream.name", *(f"stream.{each.name}" for kind in kinds for each in fields(kind)))
    for name in hints:
        if hints[name] is MethodConfig:
            yield from _method_keys(name)
        elif get_origin(hints[name]) is dict and get_args(hints[name])[1] is MethodConfig:
            yield from (key for method in base[name] for key in _method_keys(f"{name}.{method}"))
    if "objective" in getattr(schema, "LIFTED", {}):
        yield from _composed_keys("")


def _method_keys(prefix: str) -> Iterator[str]:
    """What a method's file may say."""
    yield from (f"{prefix}.{each.name}" for each in fields(MethodConfig))
    kinds = [registry.get("update rule", rule) for rule in registry.RULES]
    yield from (f"{prefix}.rule.{each.name}" for kind in kinds for each in fields(kind) if each.name != "lr")
    yield from _composed_keys(f"{prefix}.")


def _composed_keys(prefix: str) -> Iterator[str]:
    """Objective terms, and parts with their settings."""
    yield from (f"{prefix}objective.{term}" for term in registry.TERMS)
    for part in registry.PARTS:
        yield f"{prefix}parts.{part}"
        yield from (f"{prefix}parts.{part}.{each.name}" for each in fields(registry.get("part", part).Config))


def _read(argv: Sequence[str]) -> Iterator[_Override]:
    """Each argument as an override, ``--policy`` included; Hydra's prefixes and other options are refused."""
    for argument in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python passes on bytes that are no text
            raise ConfigError(f"{argument!a} is no UTF-8 text; settings and paths are: rename what it names")
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


def _groups(config_name: str, folder: Path) -> dict[str, list[str]]:
    """Options of each group that this command chooses one of, by the group's name; those of included files too."""
    defaults = cast(DictConfig, OmegaConf.load(folder / f"{config_name}.yaml")).get("defaults", [])
    names = [str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry if "@" not in str(key)]
    groups = {name: sorted(path.stem for path in (folder / name).glob("*.yaml")) for name in names}
    for included in (entry for entry in defaults if isinstance(entry, str) and entry != "_self_"):
        groups |= _groups(included, folder)
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


def _check_key(override: _Override, known: Sequence[str], groups: dict[str, list[str]], folder: Path) -> None:
    """Refuse a key that the settings do not have."""
    key = override.key.lstrip("+~")
    if key not in known:
        _refuse(override.key, key, known, groups, folder)
    if key != override.key:
        raise ConfigError(f"{override.key} is not allowed; settings are never added or removed: write {key}=VALUE")
    inner = list(dict.fromkeys(k for k in known if k.startswith(f"{key}.") and "." not in k.removeprefix(f"{key}.")))
    if inner and not override.value.startswith("{") and ".parts." not in f".{key}":
        raise ConfigError(f"{key}={override.value} is not allowed; {key} holds {', '.join(inner)}: set one of these")


def _refuse(written: str, key: str, known: Sequence[str], groups: dict[str, list[str]], folder: Path) -> NoReturn:
    group, _, rest = key.partition(".")
    for option in groups.get(group, []):
        values = _plain(OmegaConf.load(folder / group / f"{option}.yaml"))
        names = [each.name for each in fields(READERS[option])] if group == "data" and option in READERS else []
        if rest and rest in (*_keys(values), *names):
            raise ConfigError(f"{written} is a setting of {group}={option} alone; choose it: add {group}={option}")
    key = key.partition("@")[0]
    raise ConfigError(f"{written} is an unknown setting; did you mean {_nearest(key, known)}? --help shows all")


def _nearest(word: str, candidates: Sequence[str]) -> str:
    """The candidate most like ``word``, as a whole or in its last part (``lr`` for ``method.lr``)."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word, candidate).ratio()
        last = difflib.SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return max(candidates, key=likeness)


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key, inner ones included."""
    for name, value in config.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
