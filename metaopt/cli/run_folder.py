"""The folder of an adaptation: its answers, and the snapshot that a stopped one goes on from."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metaopt.cli.command import invoked
from metaopt.cli.go_on import check_settings, plain, run_folder, to_keep
from metaopt.cli.settings import OnlineSettings
from metaopt.data import Batch
from metaopt.errors import CheckpointError, OutputError
from metaopt.files import file_sha256, remove_unfinished
from metaopt.online.predictions import Predictions
from metaopt.online.snapshot import SNAPSHOT, load_snapshot, save_snapshot

MEMORY, SUMMARY = "memory.csv", "summary.json"

_LOG = logging.getLogger(__name__)


class RunFolder:
    """Takes in what a run answers, and saves its state.

    A new run leaves an earlier one in the folder as it is until the first batch is answered.

    Args:
        settings: of the run; ``out`` is the folder.
        arguments: of the command.
        saved: what :func:`saved_run` gave, for a run that goes on.

    Raises:
        CheckpointError: the answers of the run that goes on are not as it left them.
        OutputError: another process is writing there.
    """

    def __init__(self, settings: OnlineSettings, arguments: Sequence[str], saved: dict[str, Any] | None) -> None:
        self.path, self._saved = Path(settings.out), saved
        self._about = {
            "arguments": to_keep(arguments) if saved is None else saved["arguments"],
            "settings": plain(settings),
            "policy": _policy_sha256(settings),
        }
        written = None if saved is None else saved["predictions"]
        self._predictions = Predictions(self.path, written, self._clear)
        self._warned = False

    @property
    def state(self) -> dict[str, Any] | None:
        """That of the run that goes on; None for a new one."""
        return None if self._saved is None else self._saved["run"]

    @property
    def done(self) -> int:
        """Batches that were answered before."""
        return 0 if self.state is None else self.state["steps"]

    def answer(self, domain: str, severity: float, batch: Batch, logits: Tensor) -> None:
        """Write the answers of a batch.

        Raises:
            OutputError: they cannot be written.
        """
        self._predictions.add(domain, severity, batch, logits)

    def save(self, state: dict[str, Any]) -> None:
        """Save the state of the run; where the disk has no room for it, the one before stays, and the run goes on.

        Raises:
            OutputError: the answers so far cannot be brought to the disk.
        """
        answered = self._predictions.sync()  # before the state that goes on from them
        try:
            save_snapshot({**self._about, "predictions": answered, "run": state}, self.path)
        except OutputError as error:
            if not self._warned:
                _LOG.warning("%s; the run goes on, and a stopped one from an earlier state", error)
            self._warned = True

    def how_to_go_on(self, done: int, batches: int) -> str:
        """One line for a run that was stopped."""
        told = f"stopped after {done} of {batches} batches"
        if not (self.path / SNAPSHOT).exists():
            return f"{told}; its state could not be saved"
        return f"{told}; go on with: {shlex.join([*invoked('adapt', 'adapt/online.py'), f'resume={self.path}'])}"

    def __enter__(self) -> "RunFolder":
        """The folder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        """Close the answers; those of a whole run are brought to the disk."""
        try:
            if kind is None:
                self._predictions.sync()
        finally:
            self._predictions.close()

    def _clear(self) -> None:
        """Take away what a killed process left half-written and, for a new run, what an earlier one left."""
        for name in (SNAPSHOT, SUMMARY, MEMORY):
            remove_unfinished(self.path / name)
            if self._saved is None:
                (self.path / name).unlink(missing_ok=True)


def saved_run(settings: OnlineSettings) -> dict[str, Any] | None:
    """What the snapshot of the run that goes on holds; None for a new run.

    Raises:
        ConfigError: the settings are not those of that run.
        CheckpointError: it cannot be read, or is damaged, or had another policy.
    """
    if settings.resume is None:
        return None
    saved = load_snapshot(run_folder(settings.resume))
    steps = ("run", "steps"), ("predictions", "bytes"), ("predictions", "crc")
    whole = all(isinstance(saved.get(name), Mapping) for name in ("settings", "predictions", "run"))
    if not whole or not all(isinstance(saved[name].get(key), int) for name, key in steps):
        raise CheckpointError(f"the snapshot in '{settings.resume}' is damaged (parts are missing); start a new run")
    check_settings(settings, saved["settings"])
    if _policy_sha256(settings) != saved.get("policy"):
        raise CheckpointError(
            f"'{settings.policy_path}' is not the policy that the run to resume had; allowed is that one: put it back, "
            "or start a new run"
        )
    return saved


def _policy_sha256(settings: OnlineSettings) -> str | None:
    return None if settings.policy_path is None else file_sha256(settings.policy_path)
