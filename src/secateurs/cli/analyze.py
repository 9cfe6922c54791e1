"""`secateurs analyze`: what of a model can be pruned and how much that is, what cannot and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from secateurs.types import Graph, Inputs

HEADS = ("head", "head_dim")
NORMS = ("exact", "pin")


def analyze(
    what: str = typer.Argument(None, metavar="[RECIPE|TASK]", help="A recipe, or a task's name."),
    model: str = typer.Option(
        None, "--model", metavar="PATH", help="Your own instead: package.module:function or file."
    ),
    inputs: str = typer.Option(
        None, "--inputs", metavar="PATH", help="With --model: a function that returns its inputs."
    ),
    granularity: list[str] = typer.Option(
        [], "--granularity", metavar="KIND", help="Only units of this kind [all but weight]."
    ),
    include: list[str] = typer.Option(
        [], "--include", metavar="PATTERN", help="Only these targets or modules."
    ),
    exclude: list[str] = typer.Option(
        [], "--exclude", metavar="PATTERN", help="Not these targets or modules."
    ),
    heads: str = typer.Option("head", "--heads", help="Of attention: head or head_dim."),
    norm: str = typer.Option("exact", "--norm", help="What norms count: exact or pin."),
    output: list[str] = typer.Option(
        [], "--output", metavar="NAME", help="An output that matters [all of them]."
    ),
    every: bool = typer.Option(False, "--all", help="Name every member and part left whole."),
    html: Path = typer.Option(None, "--html", metavar="FILE", help="Draw it as a page."),
    force: bool = typer.Option(False, "--force", help="Overwrite the page."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what can be pruned and how much that is, what cannot and why; trains nothing."""
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr
    from secateurs.errors import choose
    from secateurs.inventory import inventory, table
    from secateurs.report.structure import check_drawable, structure_page
    from secateurs.types import KINDS, STRUCTURED, expand_granularity

    kinds = expand_granularity(granularity) if granularity else frozenset(KINDS) - {"weight"}
    options: dict[str, Any] = {
        "heads": choose(heads, HEADS, "--heads"),
        "norm": choose(norm, NORMS, "--norm"),
        "outputs": tuple(output),
    }
    if html is not None:
        check_drawable()
        _check_page(html, force)
    with prints_to_stderr(), bar("analyze") as step:
        step("load", 0, 2)
        name, build = _model_and_inputs(what, model, inputs)
        net, example, own = build()
        step("capture", 1, 2)
        graph = _traced(net, example, options)
        graph = _only(graph, net, include or own["include"], exclude or own["exclude"])
        found = inventory(graph, kinds, STRUCTURED)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(structure_page(graph, found, name), encoding="utf-8")
    if as_json:
        data = found.to_dict()
        data = {"model": {"name": name, **data.pop("model")}, "outputs": list(output), **data}
        typer.echo(json.dumps(data, indent=1, allow_nan=False))
    else:
        typer.echo(f"{name}\n\n{table(found, every=every)}")
    if html is not None:
        stderr().print(f"written: {html}", highlight=False, soft_wrap=True)


Loaded = tuple["nn.Module", "Inputs", dict[str, Any]]
"""A model, its example inputs, and the `include` and `exclude` of its recipe."""


def _model_and_inputs(
    what: str | None, model: str | None, inputs: str | None
) -> tuple[str, Callable[[], Loaded]]:
    """The name of what is analysed, and how to get it.

    Raises:
        ConfigError: not exactly one of them is given, or it does not exist.
    """
    from secateurs.errors import ConfigError

    if (what is None) == (model is None):
        raise ConfigError("give either a recipe or a task, or --model with --inputs")
    if (model is None) != (inputs is None):
        raise ConfigError("--model and --inputs belong together: give both or neither")
    if model is not None and inputs is not None:
        return model, lambda: _own(model, inputs)
    assert what is not None
    if Path(what).suffix in (".yaml", ".yml") or Path(what).is_file():
        return Path(what).stem, lambda: _of_recipe(Path(what))
    return what, lambda: _of_task(what)


def _own(model: str, inputs: str) -> Loaded:
    from torch import nn

    from secateurs.errors import ConfigError
    from secateurs.imports import import_function

    made = []
    for path, option in ((model, "--model"), (inputs, "--inputs")):
        function = import_function(path, option)
        try:
            made.append(function())
        except (Exception, SystemExit) as error:  # the user's function can raise anything
            raise ConfigError(f"{option}: {path} fails: {type(error).__name__}: {error}") from error
    net, example = made
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--model: {model} returned {type(net).__name__}, expected an nn.Module")
    return net, example, {"include": None, "exclude": None}


def _of_recipe(path: Path) -> Loaded:
    from secateurs.recipe import read_recipe
    from secateurs.runner import load_problem

    recipe = read_recipe(path).anchored(path.parent)
    problem = load_problem(recipe, path.parent, train=False)
    own = {"include": recipe.include, "exclude": recipe.exclude}
    return problem.model, problem.example_inputs, own


def _of_task(name: str) -> Loaded:
    from secateurs.errors import ConfigError
    from secateurs.tasks import TASKS, get_task

    if name not in TASKS and Path(name).exists():
        raise ConfigError(f"{name} is a directory; give a recipe or a task")
    task = get_task(name)
    task.source.require()
    return task.build(), task.load(0).example_inputs, {"include": None, "exclude": None}


def _traced(net: nn.Module, example: Inputs, options: dict[str, Any]) -> Graph:
    from secateurs.graph import trace

    return trace(net, example, **options)


def _only(graph: Graph, net: nn.Module, include: Any, exclude: Any) -> Graph:
    if not include and not exclude:
        return graph
    return graph.only(include=include or None, exclude=exclude or None, model=net)


def _check_page(page: Path, force: bool) -> None:
    """Refuse what cannot be written, before anything slow.

    Raises:
        ConfigError: the file exists and `force` is not set, or cannot be made.
    """
    from secateurs.errors import ConfigError

    if page.is_dir():
        raise ConfigError(f"{page} is a directory; name a file")
    if page.exists() and not force:
        raise ConfigError(f"{page} exists. Add --force to overwrite, or choose another --html")
    there = next(p for p in page.absolute().parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{there} cannot be written to; choose another --html")
