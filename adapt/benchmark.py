"""Run methods side by side on the same stream: ``python adapt/benchmark.py --help``."""

import sys

from metaopt.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
