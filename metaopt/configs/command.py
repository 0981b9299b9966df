"""What every command does around its work: read the settings, and turn errors into one line and an exit code."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from metaopt.configs.bridge import compose, help_text
from metaopt.errors import ConfigError, MetaoptError

T = TypeVar("T")

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_command(main: Callable[[T], None], schema: type[T], script: str, argv: Sequence[str] | None = None) -> int:
    """Run ``main`` on the settings in ``argv`` and return the exit code.

    Args:
        main: the command's work.
        schema: class of its settings, from :mod:`metaopt.configs.schema`.
        script: the command's own ``__file__``. Its YAML file has its name and lies in ``configs/`` beside
            its folder.
        argv: arguments without the program's name; None: those of this process.

    Returns:
        0; 2 after a :class:`~metaopt.errors.MetaoptError`, told in one line on stderr; 130 after Ctrl-C.
    """
    path = Path(script).resolve()
    arguments = list(sys.argv[1:] if argv is None else argv)
    folder = path.parent.parent / "configs"
    try:
        if "-h" in arguments or "--help" in arguments:
            overrides = [argument for argument in arguments if argument not in ("-h", "--help")]
            usage = f"usage: python {path.parent.name}/{path.name} [--policy CKPT] [key=value ...]"
            print(usage, help_text(path.stem, overrides, folder), sep="\n\n")
        else:
            main(compose(schema, path.stem, arguments, folder))
    except MetaoptError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return EXIT_ERROR
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
