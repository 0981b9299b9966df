"""Train a source model on the embedded digits: ``python pretrain/source.py --help``."""

import sys

from metaopt.cli.source import main

if __name__ == "__main__":
    sys.exit(main())
