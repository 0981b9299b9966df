"""The program ``metaopt``: one command in front of the others."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "meta-train": ("metaopt.cli.meta_train", "learn an adaptation policy on a few unlabeled images"),
    "adapt": ("metaopt.cli.adapt", "adapt a model online, on a stream of shifted images"),
    "benchmark": ("metaopt.cli.benchmark", "run methods side by side on the same stream"),
    "footprint": ("metaopt.cli.footprint", "measure how small an adaptation step can get"),
    "source": ("metaopt.cli.source", "train a source model on the embedded digits"),
    "speed": ("metaopt.cli.speed", "measure what meta-training costs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command that the first argument names, with the others; None: those of this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = [f"  {name.ljust(12)}{words}" for name, (_, words) in COMMANDS.items()]
        print("usage: metaopt COMMAND [key=value ...]", "", *rows, "", "metaopt COMMAND --help says more.", sep="\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: {name} is no command; allowed are {', '.join(COMMANDS)}: see metaopt --help", file=sys.stderr)
        return 2
    return import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
