"""How far criteria agree: rank correlation, and overlap of what each would remove."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateurs.errors import ConfigError, choose
from secateurs.scores.units import Aligned, aligned, labelled, ranks
from secateurs.types import Scores

__all__ = ["Agreement", "agreement"]

Matrix = tuple[tuple[float, ...], ...]
WIDEST = 100
"""Characters of a table whose columns are named; of a wider one they are numbered."""


@dataclass(frozen=True)
class Agreement:
    """How far several criteria agree about the same units.

    Attributes:
        labels: of the criteria: row i and column i of both matrices.
        correlation: Spearman rank correlation in [-1, 1]; nan where it is undefined, because a
            criterion gives every unit the same score.
        overlap: shared part of what two criteria would remove, in [0, 1]; nan as above.
        within: "network" or "target".
        sparsity: fraction of the units that would be removed, for `overlap`.
        n_units: units that were compared.
        notes: what a reader should know.
    """

    labels: tuple[str, ...]
    correlation: Matrix
    overlap: Matrix
    within: str
    sparsity: float
    n_units: int
    notes: tuple[str, ...] = ()

    def table(self) -> str:
        """Both matrices as Markdown that reads well as plain text; "-" is undefined."""
        where = "over the network" if self.within == "network" else "inside each target"
        chance = self.sparsity / (2 - self.sparsity)
        blocks = [
            f"Spearman rank correlation {where} ({self.n_units:,} units)",
            _grid(self.labels, self.correlation, "{:+.2f}"),
            f"Overlap of the {100 * self.sparsity:.3g} % that would go first (Jaccard, by chance "
            f"{chance:.2f})",
            _grid(self.labels, self.overlap, "{:.2f}"),
            *(f"Note: {note}" for note in self.notes),
        ]
        return "\n\n".join(blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; undefined figures are None."""
        return {
            **asdict(self),
            "labels": list(self.labels),
            "correlation": _plain(self.correlation),
            "overlap": _plain(self.overlap),
            "notes": list(self.notes),
        }


def agreement(
    scores: Sequence[Scores] | Mapping[str, Scores],
    within: Literal["network", "target"] = "network",
    sparsity: float = 0.5,
) -> Agreement:
    """How far criteria agree about the same units: one row and column for each.

    Correlation is Spearman's: Pearson's correlation of the ranks, equal scores sharing the mean of
    theirs. Overlap is that of the units that each would remove at a sparsity, |A and B| / |A or B|;
    a unit counts by its share where the cut falls between equal scores or inside a unit. "network"
    compares all units with each other, as allocation "global" does. "target" compares inside each
    target only, as "uniform" does, and is the mean over targets weighted by their units; a target
    in which a criterion gives one score to all says nothing about it and is left out.

    Args:
        scores: two or more, with the same targets; the keys of a mapping, as from `score` with
            several criteria, are the labels.
        within: "network" or "target".
        sparsity: fraction of the units that would be removed, in (0, 1).

    Raises:
        ConfigError: fewer than two scores, the same label twice, other targets, or a sparsity
            outside (0, 1).
        ScoringError: a score is nan or inf.

    References:
        Spearman, The Proof and Measurement of Association between Two Things, 1904.

    Example:
        >>> from secateurs.types import Graph, WeightTarget
        >>> graph = Graph({"fc.weight": WeightTarget("fc.weight", (1, 4))})
        >>> lines = {"taylor": [1.0, 2.0, 3.0, 4.0], "magnitude": [2.0, 3.0, 1.0, 4.0]}
        >>> given = [Scores(graph, {"fc.weight": torch.tensor(x)}, n) for n, x in lines.items()]
        >>> print(agreement(given).table())
        Spearman rank correlation over the network (4 units)
        <BLANKLINE>
        |           | taylor | magnitude |
        | :-------- | -----: | --------: |
        | taylor    |  +1.00 |     +0.40 |
        | magnitude |  +0.40 |     +1.00 |
        <BLANKLINE>
        Overlap of the 50 % that would go first (Jaccard, by chance 0.33)
        <BLANKLINE>
        |           | taylor | magnitude |
        | :-------- | -----: | --------: |
        | taylor    |   1.00 |      0.33 |
        | magnitude |   0.33 |      1.00 |
    """
    choose(within, ("network", "target"), "within")
    hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity must be in (0, 1), got {sparsity:g}.{hint}")
    labels, parts = labelled(scores, "agreement")
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            f"labels must differ, got {', '.join(twice)} more than once; give a dict of label to "
            "scores"
        )
    found = aligned(labels, parts)
    blocks = _blocks(found) if within == "target" else {"": torch.stack(found.lines)}
    pairs = [(_correlation(x), _overlap(x, sparsity), x.shape[1]) for x in blocks.values()]
    return Agreement(
        labels=tuple(labels),
        correlation=_mean([(c, n) for c, _, n in pairs]),
        overlap=_mean([(o, n) for _, o, n in pairs]),
        within=within,
        sparsity=float(sparsity),
        n_units=int(found.alive.sum()),
        notes=(*found.notes, *_constant(labels, blocks)),
    )


def _plain(matrix: Matrix) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in matrix]


def _blocks(found: Aligned) -> dict[str, Tensor]:
    """Target -> (n_scores, n) values of the units that are left in it."""
    left = [int(part.sum()) for part in torch.split(found.alive, list(found.sizes))]
    parts = torch.split(torch.stack(found.lines), left, dim=1)
    return {name: x for name, x in zip(found.names, parts, strict=True) if x.shape[1]}


def _is_constant(lines: Tensor) -> Tensor:
    return (lines == lines[:, :1]).all(dim=1)  # (n_scores, n) -> (n_scores,)


def _constant(labels: Sequence[str], blocks: Mapping[str, Tensor]) -> list[str]:
    """One sentence for each criterion that cannot tell the units of a block apart."""
    constant = torch.stack([_is_constant(x) for x in blocks.values()])
    notes = []
    for label, column in zip(labels, constant.T, strict=True):
        names = [name for name, same in zip(blocks, column.tolist(), strict=True) if same]
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            where = f" of {first} ({len(names)} of {len(blocks)} targets)" if names[0] else ""
            notes.append(f"{label}: one score for all units{where}, so nothing can be compared")
    return notes


def _correlation(lines: Tensor) -> Tensor:
    """(m, m) Spearman correlation of (m, n) scores; nan for a constant row."""
    x = torch.stack([ranks(line) for line in lines])
    x -= x.mean(dim=1, keepdim=True)
    x /= x.norm(dim=1, keepdim=True)
    x[_is_constant(lines)] = float("nan")  # and not what rounding leaves of 0 / 0
    found = (x @ x.T).clamp(-1, 1)
    found.diagonal()[~found.diagonal().isnan()] = 1.0
    return found


def _overlap(lines: Tensor, sparsity: float) -> Tensor:
    """(m, m) Jaccard overlap of the units that go, of (m, n) scores; nan for a constant row."""
    gone = torch.stack([_share_removed(line, sparsity * len(line)) for line in lines])
    gone[_is_constant(lines)] = float("nan")
    found = torch.empty(len(gone), len(gone), dtype=torch.float64)
    for i, a in enumerate(gone):
        for j, b in enumerate(gone):
            if j <= i:
                both = torch.minimum(a, b).sum() / torch.maximum(a, b).sum()
                found[i, j] = found[j, i] = both
    return found


def _share_removed(line: Tensor, k: float) -> Tensor:
    """(n,) how much of each unit goes when the `k` lowest go; units of equal score alike."""
    limit = line.sort().values[int(k)]
    below, tied = (line < limit).double(), (line == limit).double()
    return below + tied * ((k - below.sum()) / tied.sum())


def _mean(parts: Sequence[tuple[Tensor, int]]) -> Matrix:
    """The mean of matrices weighted by units, entry by entry over those that are defined."""
    values = torch.stack([matrix for matrix, _ in parts])
    units = torch.tensor([n for _, n in parts], dtype=torch.float64).view(-1, 1, 1)
    known = ~values.isnan()
    mean = (values.nan_to_num(0.0) * units).sum(0) / (known * units).sum(0)
    return tuple(tuple(float(x) for x in row) for row in mean)


def _grid(labels: Sequence[str], matrix: Matrix, form: str) -> str:
    """A Markdown table with its columns lined up."""
    names = [" ".join(label.split()).replace("|", "\\|") for label in labels]
    cells = [["-" if math.isnan(x) else form.format(x) for x in row] for row in matrix]
    heads = names
    if max(map(len, names)) + sum(max(len(n), 5) + 3 for n in names) + 4 > WIDEST:
        heads = [str(i + 1) for i in range(len(names))]
        names = [f"{i + 1} {name}" for i, name in enumerate(names)]
    rows = [["", *heads], *([name, *row] for name, row in zip(names, cells, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)
