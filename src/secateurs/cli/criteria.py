"""`secateurs criteria`: what can say how much a unit matters, and what each costs."""

from __future__ import annotations

import json

import typer


def criteria(
    name: str | None = typer.Argument(None, help="One criterion: everything about it."),
    family: str | None = typer.Option(None, "--family", help="Only those of one family."),
    long: bool = typer.Option(False, "--long", help="With formulas and sources."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the criteria: what they look at, what they cost, which units they score."""
    from rich.markdown import Markdown
    from rich.markup import escape
    from rich.table import Table

    from secateurs.cli.output import stdout
    from secateurs.criteria import CRITERIA, get_criterion
    from secateurs.criteria.pages import cost_text, describe, kinds_text, page
    from secateurs.errors import choose

    families = list(dict.fromkeys(c.family for c in CRITERIA.values()))
    if family is not None:
        choose(family, families, "family")
    if name is not None:
        held = get_criterion(name)
        if as_json:
            typer.echo(json.dumps(describe(held), indent=1))
        else:
            stdout().print(Markdown(page(held)))
        return
    chosen = [c for f in families for c in CRITERIA.values() if c.family == f]
    chosen = [c for c in chosen if family is None or c.family == family]
    if as_json:
        typer.echo(json.dumps([describe(c) for c in chosen], indent=1))
        return
    table = Table("criterion", "looks at", "costs", "units", "what it says", box=None,
                  pad_edge=False)  # fmt: skip
    for f in families:
        rows = [c for c in chosen if c.family == f]
        if rows:
            table.add_row(f"[bold]{f}[/bold]")
        for c in rows:
            said = f"{c.summary}\nscore = {c.formula}\n{c.reference}\n" if long else c.summary
            table.add_row(f"  {c.name}", c.sees, cost_text(c), kinds_text(c), escape(said))
    console = stdout()
    console.print(table)
    console.print(
        "\ncosts: of a batch; the figure is a multiple of one forward and backward pass, where it "
        "was measured."
        "\nsecateurs criteria NAME tells everything about one.",
        style="dim", highlight=False,
    )  # fmt: skip
