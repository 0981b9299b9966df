"""Write the tables of ``docs/results.md`` from the saved results in ``docs/results/``, one CSV file for each.

python docs/write_results.py          # rewrites what stands between <!-- table: NAME --> and <!-- end -->
python docs/write_results.py --check  # writes nothing; exit code 1 if something differs
"""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("results.md")
FOLDER = Path(__file__).with_name("results")
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def table(name: str) -> str:
    """The rows of a CSV file as Markdown, its first row as the header."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    wrong = [row for row in rows if len(row) != len(header)]
    if wrong:
        raise ValueError(
            f"{name}.csv: {wrong[0]} has {len(wrong[0])} cells, the header {len(header)}: quote its commas"
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def written(page: str) -> str:
    """The page with every table as its CSV file says."""
    return PLACE.sub(lambda place: place[1] + table(place[2]) + place[3], page)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command."""
    arguments = sys.argv[1:] if argv is None else argv
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in arguments:
        if after != before:
            print(f"{PAGE} differs from its CSV files: run python docs/write_results.py", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
