"""The table of what each layer holds for backward."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaopt.activation_memory import LayerRecord, Precision
from metaopt.evaluation.meter import MIB

COLUMNS = ("layer", "kind", "dense MiB", "held MiB", "keep ratio", "codec")


@dataclass(frozen=True)
class LayerMemory:
    """What one layer holds for backward in a step, in MiB, beside what plain torch would."""

    layer: str
    kind: str
    dense_mib: float
    held_mib: float
    keep: float
    codec: str

    @property
    def cells(self) -> tuple[str, str, float, float, float, str]:
        """The row of the table."""
        return self.layer, self.kind, self.dense_mib, self.held_mib, self.keep, self.codec


def layer_memory(records: Sequence[LayerRecord], dense: Mapping[str, float]) -> list[LayerMemory]:
    """What the engine recorded; without it, what the meter saw of plain torch.

    Args:
        records: of the engine, in forward order.
        dense: MiB by layer, from the meter.
    """
    if not records:
        return [LayerMemory(layer, "", held, held, 1.0, "float32") for layer, held in dense.items()]
    return [
        LayerMemory(r.name, r.kind, r.dense_bytes / MIB, r.held_bytes / MIB, r.precision.keep, codec_name(r.precision))
        for r in records
        if r.dense_bytes or r.held_bytes
    ]


def memory_rows(rows: Sequence[LayerMemory]) -> list[tuple[str, str, float, float, float, str]]:
    """Rows of the closing table that show as more than 0.00, with the sum of all.

    The keep ratio of all is their mean, weighted by dense bytes.
    """
    dense, held = sum(row.dense_mib for row in rows), sum(row.held_mib for row in rows)
    keep = sum(row.keep * row.dense_mib for row in rows) / max(dense, 1e-12)
    shown = [row.cells for row in rows if max(row.dense_mib, row.held_mib) >= 0.005]
    return [*shown, ("all", "", dense, held, keep, "")]


def codec_name(precision: Precision) -> str:
    """What the entries of a precision are stored as."""
    return {32: "as is", 16: "half"}.get(precision.bits, f"{precision.bits} bit")


def to_csv(rows: Sequence[LayerMemory]) -> str:
    """Content of ``memory.csv``."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.replace(" ", "_").lower() for column in COLUMNS])
    writer.writerows([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row.cells] for row in rows)
    return file.getvalue()
