"""The command line: one verb per file. Verbs import torch inside, so that `--help` is quick.

Data goes to stdout, progress and messages to stderr. Exit code 0: done; 1: it failed; 2: usage.
"""

from __future__ import annotations

import sys

import typer

from secateurs.cli import (
    analyze,
    criteria,
    demo,
    finetune,
    processes,
    run,
    score,
    search,
    sensitivity,
    tasks,
)

__all__ = ["app", "main"]

CTRL_C = 130  # what typer makes of a KeyboardInterrupt

app = typer.Typer(
    help="Make a trained network smaller and faster by gradient-based pruning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("analyze")(analyze.analyze)
app.command("criteria")(criteria.criteria)
app.command("demo")(demo.demo)
app.command("finetune")(finetune.finetune)
app.command("run")(run.run)
app.command("score")(score.score)
app.command("search")(search.search)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("tasks")(tasks.tasks)


def _version(show: bool) -> None:
    if show:
        from secateurs import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
    debug: bool = typer.Option(  # read by `main`, wherever it stands
        False, "--debug", help="Show the traceback of an error; may stand anywhere."
    ),
) -> None:
    """Make a trained network smaller and faster by gradient-based pruning."""
    from secateurs.errors import ConfigError

    n = processes.n_processes()
    if n > 1 and context.invoked_subcommand not in processes.SEVERAL:
        raise ConfigError(
            f"WORLD_SIZE={n}: this command works in one process, and several would write the same "
            f"files. Start it without torchrun. {' and '.join(processes.SEVERAL)} work in several "
            'processes, and in a script score, prune, finetune and prune_during with group="world"'
            ": see docs/guide/many-processes.md"
        )


def main() -> None:
    """Entry point: errors become one message on stderr; a traceback only with --debug."""
    from secateurs.errors import ConfigError, PruningError

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    processes.hush()
    try:
        app()
    except PruningError as error:
        if debug:
            raise
        processes.speak(f"secateurs: {error}", error)
        processes.end(2 if isinstance(error, ConfigError) else 1)
    except SystemExit as end:
        if end.code == CTRL_C:
            processes.speak("secateurs: interrupted")
            processes.end(1)
        if isinstance(end.code, str):  # as Python does it
            processes.speak(end.code)
        processes.end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except Exception as error:  # a bug of ours or of the user's functions: name it, no traceback
        if debug:
            raise
        kind = type(error).__name__
        processes.speak(f"secateurs: {kind}: {error}\n(--debug shows where)", error)
        processes.end(1)
