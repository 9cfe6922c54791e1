"""Scores in one safetensors file: tensors, and everything else as JSON in its metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from secateurs.errors import ConfigError, FileFormatError, ScoringError
from secateurs.scores.units import check_scores, facts_of, facts_text, spoken_of
from secateurs.tensorfiles import read_tensors, write_tensors
from secateurs.types import Graph, Scores

__all__ = ["load_scores", "save_scores"]

FORMAT = 1
HEADER = "secateurs.scores"
"""Entry of the file's metadata that holds everything but the tensors, as JSON."""


def save_scores(scores: Scores, path: str | Path, *, force: bool = False) -> Path:
    """The path of a new safetensors file with one float32 tensor for each scored target.

    Criterion, notes, samples and unscored targets stand as JSON in the file's metadata. The graph
    is not stored: only kind and shape of its targets, which `load_scores` compares. The file
    appears whole or not at all.

    Args:
        scores: from `score`, or made of such.
        path: the file, best named "*.safetensors"; folders are made.
        force: replace a file that exists.

    Raises:
        ConfigError: the file exists, or the scores do not fit their graph.
        ScoringError: a score is nan or inf.
    """
    check_scores(scores)
    out = Path(path)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file, such as {out / 'scores.safetensors'}")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; choose another name or pass force=True")
    kinds = {t.kind for n, t in scores.graph.targets.items() if spoken_of(scores, n)}
    header = {
        "format": FORMAT,
        "criterion": scores.criterion,
        "notes": list(scores.notes),
        "n_samples": scores.n_samples,
        "not_scored": dict(scores.not_scored),
        "scored": list(scores.values),
        "targets": {n: facts_of(t) for n, t in scores.graph.targets.items() if t.kind in kinds},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, scores.values, {HEADER: json.dumps(header)})
    return out


def load_scores(path: str | Path, graph: Graph) -> Scores:
    """The scores in a file written by `save_scores`, bit-identical.

    Args:
        path: the file.
        graph: of the same model, traced (and narrowed) as when it was scored.

    Raises:
        FileFormatError: the file is missing, truncated, of another version, or no scores.
        ConfigError: the graph has other targets than the scores; all differences are listed.
    """
    file = Path(path)
    tensors, header = _read(file)
    try:
        scores, saved = _scores_of(header, tensors, graph), _saved_targets(header)
        unfit = [n for n, v in scores.values.items() if v.shape != (math.prod(saved[n]["shape"]),)]
        if set(tensors) != set(scores.values) or unfit or not set(scores.not_scored) <= set(saved):
            raise ValueError("tensors and targets do not belong together")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{file}: these are no scores: {error!r}") from error
    kinds = {facts["kind"] for facts in saved.values()}
    have = {name: facts_of(t) for name, t in graph.targets.items() if t.kind in kinds}
    differ = [
        f"{n}: the file has {facts_text(saved.get(n))}, the graph {facts_text(have.get(n))}"
        for n in sorted({*saved, *have})
        if saved.get(n) != have.get(n)
    ]
    if differ:
        raise ConfigError(
            f"{file} was made with another graph; trace the same model in the same way, and narrow "
            "the graph as it was:\n  " + "\n  ".join(differ)
        )
    try:
        check_scores(scores)
    except (ConfigError, ScoringError) as error:
        raise FileFormatError(f"{file}: {error}") from error
    return scores


def _scores_of(header: dict[str, Any], tensors: dict[str, Tensor], graph: Graph) -> Scores:
    return Scores(
        graph=graph,
        values={_text(name): tensors[name] for name in _list(header["scored"])},
        criterion=_text(header["criterion"]),
        notes=tuple(map(_text, _list(header["notes"]))),
        n_samples=_count(header["n_samples"]),
        not_scored={name: _text(why) for name, why in header["not_scored"].items()},
    )


def _saved_targets(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"kind": _text(facts["kind"]), "shape": [_count(n) for n in _list(facts["shape"])]}
        for name, facts in header["targets"].items()
    }


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file; the header is not checked yet."""
    tensors, metadata = read_tensors(file)
    if HEADER not in metadata:
        raise FileFormatError(f"{file} holds no scores; was it written by save_scores?")
    try:
        header = json.loads(metadata[HEADER])
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: the header of the scores is damaged: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if type(found) is not int or found != FORMAT:
        raise FileFormatError(f"{file}: format {found!r}; this version reads format {FORMAT}")
    return tensors, header


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{str(value)[:40]!r} is no count")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r} is no list")
    return value
