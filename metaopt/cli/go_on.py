"""``resume=FOLDER``: an adaptation goes on with the arguments, and under the settings, that its folder has."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaopt.cli.settings import OnlineSettings
from metaopt.errors import CheckpointError, ConfigError
from metaopt.online.snapshot import SNAPSHOT, load_snapshot

FREE = ("resume", "out", "snapshot_every")  # what a run may be told anew when it goes on


def run_folder(resume: str) -> Path:
    """The folder that is meant: itself, or that of the file in it."""
    path = Path(resume)
    return path.parent if path.name == SNAPSHOT else path


def with_those_of_the_run(arguments: Sequence[str]) -> list[str]:
    """The arguments themselves; with ``resume=`` among them, behind those that the run was started with.

    Raises:
        ConfigError: ``out=`` names another folder than ``resume=``.
        CheckpointError: the folder holds no run to go on with.
    """
    own = [*_pairs(arguments)]
    resume = dict(own).get("resume")
    if resume is None:
        return [*arguments]
    folder = run_folder(resume)
    out = dict(own).get("out")
    if out is not None and Path(out).resolve() != folder.resolve():
        raise ConfigError(
            f"out={out} does not go with resume={resume}; a run goes on in its own folder: leave out= away"
        )
    told = {key for key, _ in own}
    before = [(key, value) for key, value in _pairs(arguments_of(folder)) if key not in told]
    return [f"{key}={value}" for key, value in [*before, *dict(own, resume=str(folder), out=str(folder)).items()]]


def arguments_of(folder: Path) -> list[str]:
    """The arguments that a run was started with, but for its folder.

    Raises:
        CheckpointError: the folder holds no run to go on with.
    """
    found = load_snapshot(folder).get("arguments")
    if not isinstance(found, list) or not all(isinstance(argument, str) for argument in found):
        raise CheckpointError(f"'{folder / SNAPSHOT}' is damaged (it holds no arguments); start a new run")
    return found


def to_keep(arguments: Sequence[str]) -> list[str]:
    """The arguments that a snapshot keeps."""
    return [f"{key}={value}" for key, value in _pairs(arguments) if key not in ("resume", "out")]


def plain(settings: OnlineSettings) -> dict[str, Any]:
    """Every setting by its full name, with a plain value."""
    values = json.loads(json.dumps({**asdict(settings), "data": {"name": settings.data.name, **asdict(settings.data)}}))
    return dict(_flat(values, ""))


def check_settings(settings: OnlineSettings, then: Mapping[str, Any]) -> None:
    """Refuse settings that are not those of the run that goes on.

    Args:
        settings: those of now.
        then: those of the run, from :func:`plain`.

    Raises:
        ConfigError: some are others.
    """
    now = plain(settings)
    differing = sorted(key for key in {*now, *then} - {*FREE} if now.get(key) != then.get(key))
    if differing:
        was = ", ".join(f"{key}={then.get(key)}" for key in differing[:3])
        raise ConfigError(
            f"resume={settings.resume} goes on with the settings of its run, and {', '.join(differing)} would be "
            f"another; allowed is what the run had ({was}): leave it away, or start a new run"
        )


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and value of each argument; ``--policy X`` as one."""
    listed = iter(arguments)
    for argument in listed:
        key, _, value = (f"{argument}={next(listed, '')}" if argument == "--policy" else argument).partition("=")
        yield key, value


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
