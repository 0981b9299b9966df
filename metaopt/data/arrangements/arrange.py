"""From the name of an arrangement to the arranged stream."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from metaopt import registry
from metaopt.data.arrangements.arrangement import Arrangement
from metaopt.data.stream import Stream
from metaopt.errors import ConfigError, DataError, check_one_of, check_range
from metaopt.settings import build


def arrangement(how: str | Mapping[str, Any]) -> Arrangement:
    """The arrangement that is meant, its settings checked.

    Args:
        how: its name, or a mapping of ``name`` and some of its settings.

    Raises:
        ConfigError: the name or a setting is unknown, or a value is of another type or out of range.
    """
    if not isinstance(how, str | Mapping):
        raise ConfigError(f"stream is {how!r}; allowed are a name or a mapping with one: set stream=shuffled")
    values = {"name": how} if isinstance(how, str) else {"name": "shuffled", **how}
    name = values.pop("name")
    check_one_of("stream", name, registry.ARRANGEMENTS)
    kind = registry.get("arrangement", name)
    settings = {
        other: [each.name for each in fields(registry.get("arrangement", other))] for other in registry.ARRANGEMENTS
    }
    own = settings[name]
    for key in values:
        others = [other for other, names in settings.items() if key in names]
        if key not in own and others:
            raise ConfigError(
                f"stream.{key} is a setting of {', '.join(others)} alone, and stream is {name}; allowed with it are "
                f"{', '.join(own) or 'none'}: add stream={others[0]}, or leave stream.{key} out"
            )
    return build(kind, values, "stream")


def settings_of(how: str | Mapping[str, Any]) -> dict[str, Any]:
    """Name and all settings of an arrangement as plain values.

    Args:
        how: as in :func:`arrangement`.

    Raises:
        ConfigError: as there.
    """
    name = how.get("name", "shuffled") if isinstance(how, Mapping) else how
    return {"name": name, **asdict(cast(Any, arrangement(how)))}


def arrange(
    stream: Stream, how: str | Mapping[str, Any] = "shuffled", *, seed: int = 0, batch_size: int = 64, **settings: Any
) -> Stream:
    """A stream whose images are met in another way.

    Args:
        stream: domains as read; where the first comes again, another pass begins, which is arranged as the first.
        how: name of an arrangement, or a mapping of ``name`` and some of its settings.
        seed: of all that is drawn.
        batch_size: images that are met at once.
        settings: of the arrangement, by name.

    Raises:
        ConfigError: the arrangement or a setting is unknown, or a value is of another type or out of range.
        DataError: it cannot be made of this stream: labels, severities or images are missing.
    """
    values = settings_of({"name": how, **settings} if not isinstance(how, Mapping) else {**how, **settings})
    chosen, name = arrangement(values), values["name"]
    check_range("seed", seed, 0, example="0")
    check_range("batch_size", batch_size, 1, example="64")
    if not stream:
        return stream
    passes = sum(domain is stream[0] for domain in stream)
    once = stream[: len(stream) // passes]
    if any(domain is not once[place % len(once)] for place, domain in enumerate(stream)):
        passes, once = 1, stream  # domains that come again here and there are no passes
    if any(domain.order is not None for domain in once):
        raise DataError(f"a stream that was arranged cannot be arranged as {name!r} again; arrange it as it was read")
    if chosen.needs_labels:
        _check_labels(once, name)
    found = chosen(once, seed, batch_size)
    return stream if found is once else [*found] * passes


def _check_labels(stream: Stream, name: str) -> None:
    bare = next((domain for domain in stream if domain.labels is None), None)
    if bare is not None:
        free = [other for other in registry.ARRANGEMENTS if not registry.get("arrangement", other).needs_labels]
        raise DataError(
            f"stream={name} arranges images by their labels, and {bare.name!r} has none; allowed without are "
            f"{', '.join(free)}: choose one of these, or set data.labels=PATH"
        )
