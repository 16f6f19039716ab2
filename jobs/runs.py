"""The list of runs as text. How runs are found and read: `esper.nissa.runs`."""

from __future__ import annotations

from typing import Any

from esper.nissa.runs import RunStore, UnknownRunError

__all__ = ["RunStore", "UnknownRunError", "list_table"]


def list_table(rows: list[dict[str, Any]]) -> str:
    """The rows as text for a terminal."""
    if not rows:
        return "no runs yet; start one: esper train configs/digits.yaml"
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "started (UTC)", "val", "test", "parameters", "fossils", box=None, pad_edge=False)
    for row in rows:
        if "task" not in row:
            table.add_row(row["run_id"], row["status"])
            continue
        value = row["val_accuracy"]
        shown = (
            f"{value:.1%}" if value is not None else (f"{row['val_loss']:.3f}" if row["val_loss"] is not None else "-")
        )
        test = f"{row['test_accuracy']:.1%}" if row["test_accuracy"] is not None else "-"
        size = f"{row['params_start']:,} -> {row['params_final']:,}"
        table.add_row(row["run_id"], row["status"], row["started"][:19], shown, test, size, str(row["fossils"]))
    # ids are there to be copied: a table for a pipe or a narrow terminal is not folded
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
