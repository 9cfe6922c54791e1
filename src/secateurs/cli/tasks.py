"""`secateurs tasks`: the built-in tasks, and what each needs."""

from __future__ import annotations

import json

import typer


def tasks(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the built-in tasks, with what each needs to be installed."""
    from rich.table import Table

    from secateurs.cli.output import stdout
    from secateurs.tasks import TASKS, available

    rows = [
        {
            "name": t.name,
            "kind": t.kind,
            "prunes": t.default_granularity,
            "description": t.description,
            "needs": t.needs,
            "missing": available(t) or "",
        }
        for t in TASKS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("task", "kind", "what it is", "needs", box=None, pad_edge=False)
    for row in rows:
        state = "ready" if not row["missing"] else f"missing: {row['needs']}"
        table.add_row(row["name"], row["kind"], row["description"], state)
    stdout().print(table)
