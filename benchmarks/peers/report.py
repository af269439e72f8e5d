"""The tables, and the same as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = "-"


@dataclass
class Row:
    """One cell of the comparison.

    Attributes:
        shape: Name of the models' size.
        variant: Of doge-onnx, which the others are compared with.
        what: "decode" or "prefill".
        tokens: In the context of a decode step, or of the prompt.
        batch: Sequences at once.
        speeds: Tokens per second by name of the runtime; those that failed are missing.
        spreads: Slowest less fastest round, as a share of the median, by name.
        ratios: Of doge-onnx's speed to each other one's, by its name.
        mbu: Memory-bandwidth utilisation of doge-onnx.
    """

    shape: str
    variant: str
    what: str
    tokens: int
    batch: int
    speeds: dict[str, float]
    spreads: dict[str, float]
    ratios: dict[str, float] = field(default_factory=dict)
    mbu: float | None = None


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the ratios, by variant, kind of cell and runtime.

    Of cells with one sequence.
    """
    entries = []
    for variant in dict.fromkeys(row.variant for row in rows):
        for kinds in (["decode"], ["prefill"], ["decode", "prefill"]):
            ratios: dict[str, list[float]] = {}
            for row in rows:
                if row.variant == variant and row.what in kinds and row.batch == 1:
                    for name, ratio in row.ratios.items():
                        ratios.setdefault(name, []).append(ratio)
            entries.append(
                {
                    "variant": variant,
                    "what": " and ".join(kinds),
                    "mean": {name: geometric_mean(values) for name, values in ratios.items()},
                    "minimum": {name: min(values) for name, values in ratios.items()},
                }
            )
    return entries


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that does not depend on which way round ratios are taken."""
    return math.exp(sum(map(math.log, values)) / len(values))


def markdown(
    rows: Sequence[Row],
    summary: Sequence[dict[str, Any]],
    ours: str,
    others: Sequence[str],
    notes: Iterable[str],
) -> str:
    """Everything for a reader."""
    speeds = [[_number(row.speeds.get(name), ".1f") for name in (ours, *others)] for row in rows]
    ratios = [[_number(row.ratios.get(name), ".2f") for name in others] for row in rows]
    mbus = [_number(row.mbu, ".0%") for row in rows]
    cells = [
        [row.shape, row.variant, _cell(row), *speed, *ratio, mbu]
        for row, speed, ratio, mbu in zip(rows, speeds, ratios, mbus, strict=True)
    ]
    against = [f"/ {name}" for name in others]
    units = [f"{name} tok/s" for name in (ours, *others)]
    averages = [
        [entry["variant"], entry["what"]]
        + [_number(entry[which].get(n), ".2f") for n in others for which in ("mean", "minimum")]
        for entry in summary
    ]
    columns = [f"/ {name}, {which}" for name in others for which in ("mean", "min")]
    return "\n".join(
        [
            *_table(["shape", ours, "what", *units, *against, f"{ours} MBU"], cells, text=3),
            "",
            *_table([ours, "what", *columns], averages, text=2),
            "",
            *(f"- {note}" for note in notes),
        ]
    )


def _cell(row: Row) -> str:
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    return f"{row.what} @ {row.tokens}{batch}"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]], text: int) -> list[str]:
    """A table in Markdown, its columns as wide as they must be; the first `text` are words."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = ["-" * w if i < text else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    forms = [f"{'<' if i < text else '>'}{width}" for i, width in enumerate(widths)]
    return ["| " + " | ".join(map(format, line, forms)) + " |" for line in [head, rule, *rows]]
