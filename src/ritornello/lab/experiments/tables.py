"""Tables that every experiment shows."""

from collections.abc import Mapping, Sequence

import numpy as np

from ritornello.lab.arms import ARMS, NONE, Arm
from ritornello.lab.measure import Row, pick_rows
from ritornello.lab.report import Table


def costs_table(
    rows: Sequence[Row],
    models: Sequence[str],
    *,
    arms: Mapping[str, Arm] = ARMS,
    metric: str = "accuracy",
    loops: Mapping[str, int] = NONE,
) -> Table:
    """What each arm is and takes: parameters, training FLOPs, time and cache after so many `loops`, by arm; else at the
    deepest forced depth shown."""
    lines = []
    for model in models:
        found = pick_rows(rows, model=model, metric=metric, rule=None)
        deepest = loops.get(model, max(row["loops"] for row in found))
        there = [row for row in found if row["loops"] == deepest]
        mean = lambda name, there=there: float(np.mean([row[name] for row in there]))  # noqa: E731
        lines.append(
            (
                arms[model].title,
                *(f"{there[0][name]:,}" for name in ("total", "active", "non_embedding")),
                f"{mean('training_flops') / 1e12:.1f}",
                f"{mean('training_seconds') / 60:.1f}",
                f"{max(row['peak_bytes'] for row in there) / 1e6:.0f}",
                str(deepest) if deepest else "none",
                f"{min(row['latency_ms'] for row in there):.1f}",
                f"{mean('kv_bytes'):,.0f}",
            )
        )
    head = (
        "model",
        "parameters",
        "active",
        "non-embedding",
        "training TFLOPs",
        "minutes",
        "peak MB",
        "loops",
        "ms a problem",
        "KV bytes a token",
    )
    note = "ms and KV bytes (float32) at the number of loops named; means over seeds, ms of the fastest run"
    return Table(title="What the arms cost", head=head, rows=tuple(lines), note=note)
