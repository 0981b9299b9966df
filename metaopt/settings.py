"""From plain values, of a configuration file, a command line or a checkpoint, to a dataclass that checks itself."""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from metaopt.errors import ConfigError

PathSetting = Annotated[str, "path"]
"""Type of a field that is a path: a leading ``~`` becomes the user's home, which shells leave in ``key=~/file``."""


def build(kind: type, values: Any, key: str = "") -> Any:
    """A dataclass from a mapping of some of its fields; the others keep their defaults.

    Text becomes a list or a tuple at its commas where a field is one, and whole numbers become floats.

    Args:
        kind: the dataclass; fields may be dataclasses, lists, tuples and dictionaries of plain values, or None.
        values: the mapping, or an instance of ``kind``.
        key: what messages call it.

    Raises:
        ConfigError: a field is unknown or missing, or a value is of another type, or, as the class says, out of range.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        names = ", ".join(_below(key, each.name) for each in fields(kind))
        raise ConfigError(f"{key}={values} is not allowed; {key} holds {names or 'nothing'}: set one of these")
    return kind(**checked(kind, values, key))


def checked(kind: type, values: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """The arguments of :func:`build`, checked and converted."""
    known = get_type_hints(kind, include_extras=True)
    hints = {each.name: known[each.name] for each in fields(kind)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            nearest = get_close_matches(str(name), hints, n=1, cutoff=0.0)
            hint = f"did you mean {_below(key, nearest[0])}?" if nearest else "it has no settings: remove it"
            raise ConfigError(f"{_below(key, name)} is an unknown setting; allowed are {', '.join(hints)}: {hint}")
        found[name] = converted(value, hints[name], _below(key, name))
    return found


def converted(value: Any, hint: Any, key: str) -> Any:
    """A value as a type hint has it.

    Raises:
        ConfigError: it cannot be.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        return converted(value, next(option for option in args if option is not NoneType), key)
    if hint is Any:
        return value
    if hint == PathSetting:
        return os.path.expanduser(converted(value, str, key))
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, key)
    if origin in (list, tuple):
        return _sequence(value, origin, args, key)
    if origin is dict and isinstance(value, Mapping):
        return {str(name): converted(item, args[1], _below(key, str(name))) for name, item in value.items()}
    if hint is str and type(value) in (int, float, bool):
        return str(value)
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError:
            pass
    if not isinstance(hint, type) or type(value) is not hint:
        shown = "null" if value is None else repr(value)
        raise ConfigError(f"{key}={shown} is not allowed; it takes {_shown(hint)}: see --help for the defaults")
    return value


def _sequence(value: Any, origin: Any, args: tuple[Any, ...], key: str) -> Any:
    if value is None:
        raise ConfigError(f"{key}=null is not allowed; it takes a list: set {key}=[...]")
    items = value if isinstance(value, list | tuple) else [item.strip() for item in _unbracketed(str(value)).split(",")]
    if origin is tuple and args[-1] is not Ellipsis and len(items) != len(args):
        raise ConfigError(f"{key}={[*items]} is not allowed; it takes {len(args)} values: give as many")
    return origin(converted(item, args[0], key) for item in items)


def _unbracketed(text: str) -> str:
    """A list that nothing else could read, such as ``[~/a.pt,~/b.pt]``, without its brackets."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(hint: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(hint, "a mapping of settings" if get_origin(hint) is dict else str(hint))
