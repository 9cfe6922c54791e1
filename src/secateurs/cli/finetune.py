"""`secateurs finetune DIRECTORY`: train a saved smaller model further."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from secateurs.cli.processes import begin
from secateurs.cli.run import CHECKPOINTS, resumable, tell, unseen


def finetune(
    directory: Path = typer.Argument(..., help="Results of `secateurs run`."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change the training: --set finetune.epochs=5"
    ),
    out: Path = typer.Option(None, "--out", help="Directory of the results [DIRECTORY-finetuned]."),
    tensorboard: Path = typer.Option(
        None, "--tensorboard", metavar="DIR", help="Write a log for TensorBoard."
    ),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Go on with a training that was interrupted, from its last checkpoint.",
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier results."),
    as_json: bool = typer.Option(False, "--json", help="Print what happened as JSON."),
) -> None:
    """Train a saved smaller model further; what was removed stays removed."""
    from secateurs.bars import bar
    from secateurs.checkpoints import Checkpoints
    from secateurs.cli.output import prints_to_stderr
    from secateurs.distributed import on_first
    from secateurs.healing import heal_saved, is_healed, read_saved, write_healed

    saved = read_saved(directory, tuple(set_))
    where = out or directory.with_name(f"{directory.name}-finetuned")
    ranks = begin()
    first = ranks.rank == 0
    kept = Checkpoints(where / CHECKPOINTS, say=tell)
    done = on_first(
        ranks.group,
        lambda: is_healed(saved, where, kept, resume=resume, force=force),
        "looking at earlier results",
    )
    if ranks.first(done):
        if first:
            tell(f"{where} is complete: nothing is left to do")
            show(json.loads((where / "finetune.json").read_text(encoding="utf-8")), as_json)
        return
    with ExitStack() as stack:
        if first:
            stack.enter_context(resumable(kept))
        stack.enter_context(prints_to_stderr())
        step = stack.enter_context(bar(saved.recipe.task or "model")) if first else unseen
        step("load", 0, 1)
        healed = heal_saved(
            saved, tensorboard=tensorboard, progress=step, checkpoint=kept, resume=resume,
            group=ranks.group,
        )  # fmt: skip
        files = on_first(
            ranks.group,
            lambda: write_healed(healed, saved, where, force=force or resume),
            "writing the results",
        )
    if files is not None:
        show(healed.to_dict(), as_json)
        tell(f"written: {', '.join(str(f) for f in files)}")


def show(told: Mapping[str, Any], as_json: bool) -> None:
    """Print what a training did to stdout."""
    from secateurs.cli.output import stdout

    if as_json:
        typer.echo(json.dumps(told, indent=1, allow_nan=False))
        return
    console = stdout()
    for name, after in told["validation"]["after"].items():
        before = told["validation"]["before"][name]
        console.print(f"validation {name}: {before:.4g} -> {after:.4g}", highlight=False)
    for name, value in told["test"].items():
        console.print(f"test {name}: {value:.4g}", highlight=False)
