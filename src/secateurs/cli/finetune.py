"""`secateurs finetune DIRECTORY`: train a saved smaller model further."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def finetune(
    directory: Path = typer.Argument(..., help="Results of `secateurs run`."),
    set_: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change the training: --set finetune.epochs=5"
    ),
    out: Path = typer.Option(None, "--out", help="Directory of the results [DIRECTORY-finetuned]."),
    tensorboard: Path = typer.Option(
        None, "--tensorboard", metavar="DIR", help="Write a log for TensorBoard."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite earlier results."),
    as_json: bool = typer.Option(False, "--json", help="Print what happened as JSON."),
) -> None:
    """Train a saved smaller model further; what was removed stays removed."""
    from secateurs.bars import bar
    from secateurs.cli.output import prints_to_stderr, stderr, stdout
    from secateurs.healing import check_saved, heal_saved, read_saved, write_healed

    saved = read_saved(directory, tuple(set_))
    where = out or directory.with_name(f"{directory.name}-finetuned")
    check_saved(saved, where, force)
    with prints_to_stderr(), bar(saved.recipe.task or "model") as step:
        step("load", 0, 1)
        healed = heal_saved(saved, tensorboard=tensorboard, progress=step)
        files = write_healed(healed, saved, where, force=force)
    if as_json:
        typer.echo(json.dumps(healed.to_dict(), indent=1, allow_nan=False))
        return
    console = stdout()
    for name, after in healed.validation["after"].items():
        before = healed.validation["before"][name]
        console.print(f"validation {name}: {before:.4g} -> {after:.4g}", highlight=False)
    for name, value in healed.test.items():
        console.print(f"test {name}: {value:.4g}", highlight=False)
    stderr().print(f"written: {', '.join(str(f) for f in files)}", highlight=False)
