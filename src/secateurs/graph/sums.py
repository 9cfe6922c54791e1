"""Where a residual branch is added to its skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref, Value, refs
from secateurs.graph.zeroing import SUMS
from secateurs.types import BranchSum

if TYPE_CHECKING:
    from secateurs.graph.layers import Branch

__all__ = ["operands", "sum_places"]


def operands(labels: Labels, record: Record) -> tuple[int, int] | None:
    """The two summands of a sum whose result has the shape and type of both."""
    if record.op not in SUMS or len(record.args) < 2 or len(record.outputs) != 1:
        return None
    a, b = record.args[:2]
    if not isinstance(a, Ref) or not isinstance(b, Ref) or a.id == b.id:
        return None
    values = [labels.value(i) for i in (record.outputs[0], a, b)]
    same = len({(v.shape, v.dtype) for v in values}) == 1
    return (a.id, b.id) if same and values[0].dtype.is_floating_point else None


def sum_places(labels: Labels, units: Sequence[Branch]) -> list[BranchSum]:
    """Where each unit is added to its skip, counted as anyone can who watches a run."""
    inside: dict[tuple[str, int], list[int]] = {}
    for number, record in enumerate(labels.tape.records):
        if operands(labels, record) is not None:
            inside.setdefault((record.module, record.call), []).append(number)
    places = []
    for unit, branch in enumerate(units):
        for number, skip in branch.sums:
            record = labels.tape.records[number]
            same = inside[record.module, record.call]
            dim = _feature_dim(labels, branch, labels.value(record.outputs[0]))
            order = same.index(number)
            places.append(BranchSum(unit, record.module, record.call, order, len(same), skip, dim))
    return places


def _feature_dim(labels: Labels, branch: Branch, value: Value) -> int:
    """The dimension along which the features of a stream lie: as long as what makes the branch."""
    sizes = {labels.tape.values[i].shape[0] for i in branch.producers}
    fits = [d for d, n in enumerate(value.shape) if d and n in sizes]
    if len(fits) != 1:  # as convolutions and norms over channels leave it, or as linear layers do
        readers = [
            r for r in labels.tape.records if {x.id for x in refs(r.args)} & branch.producers
        ]
        last = {"linear", "layer_norm", "rms_norm", "native_layer_norm", "matmul", "addmm", "mm"}
        fits = [len(value.shape) - 1 if {r.op for r in readers} & last else 1]
    return min(fits[0], len(value.shape) - 1)
