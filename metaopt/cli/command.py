"""What every command does around its work: read the settings, and turn errors into one line and an exit code."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from metaopt.cli.compose import compose, help_text
from metaopt.cli.stop_signals import StoppedBySignal
from metaopt.errors import ConfigError, MetaoptError

T = TypeVar("T")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_SIGNAL = 128
PROGRAMS = {
    "meta_train": "metaopt meta-train",
    "online": "metaopt adapt",
    "benchmark": "metaopt benchmark",
    "footprint": "metaopt footprint",
    "source": "metaopt source",
    "speed": "metaopt speed",
}
"""How each command is called, by the name of its YAML file."""


def run_command(
    main: Callable[[T], None],
    schema: type[T],
    config_name: str,
    argv: Sequence[str] | None = None,
    completed: Callable[[Sequence[str]], list[str]] = list,
) -> int:
    """Run ``main`` on the settings in ``argv`` and return the exit code.

    Args:
        main: the command's work.
        schema: class of its settings, from :mod:`metaopt.cli.settings`.
        config_name: of its YAML file at the top of ``configs/``.
        argv: arguments without the program's name; None: those of this process.
        completed: the arguments that the given ones stand for.

    Returns:
        0; 2 after a :class:`~metaopt.errors.MetaoptError`, told in one line on stderr; 130 after Ctrl-C; 128 and the
        signal's number where ``main`` says that one stopped it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if "-h" in arguments or "--help" in arguments:
            overrides = [argument for argument in arguments if argument not in ("-h", "--help")]
            usage = f"usage: {PROGRAMS[config_name]} [--policy CKPT] [key=value ...]"
            print(usage, help_text(schema, config_name, overrides), sep="\n\n")
        else:
            main(compose(schema, config_name, completed(arguments)))
    except MetaoptError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_ERROR
    except StoppedBySignal as stop:
        with suppress(OSError):  # the terminal may be what is gone
            print(stop, file=sys.stderr, flush=True)
        return EXIT_SIGNAL + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is an accelerator where there is one, else the CPU.

    Raises:
        ConfigError: no such device exists, or this machine has none.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(
            f"device={name} cannot be used here; allowed are cpu, auto and torch's device names: set device=auto"
        ) from None
    return device


def invoked(command: str, script: str) -> list[str]:
    """How another command is called, the way that this one was: by the installed program, or by its script."""
    return ["metaopt", command] if Path(sys.argv[0]).stem == "metaopt" else ["python", script]
