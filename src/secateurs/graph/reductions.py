"""Rules for operators that run along dimensions: sums, means, norms, extremes, softmax, sorting.

Along a prunable dimension a sum or norm may lose entries that are zero; a mean may too if it goes
on to divide by the dense number, a maximum if it goes on to meet a zero. Along other dimensions all
of them let the prunable ones pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from secateurs.graph.labels import Labels
from secateurs.graph.records import Record, Ref, refs
from secateurs.graph.rules import RULES, rule, without

__all__: list[str] = []

Over = Literal["sum", "mean", "extreme", "no"]

REDUCE: dict[str, tuple[Over, bool]] = {
    "sum": ("sum", True),
    "nansum": ("sum", True),
    "mean": ("mean", True),
    "linalg_vector_norm": ("sum", True),
    "norm": ("sum", True),
    "amax": ("extreme", True),
    "amin": ("extreme", True),
    "max": ("extreme", True),
    "min": ("extreme", True),
    "aminmax": ("no", True),
    "prod": ("no", True),
    "var": ("mean", True),
    "std": ("mean", True),
    "padded_var": ("mean", True),
    "var_mean": ("mean", True),
    "padded_var_mean": ("mean", True),
    "std_mean": ("no", True),
    "median": ("no", True),
    "nanmedian": ("no", True),
    "kthvalue": ("no", True),
    "nanmean": ("no", True),
    "logsumexp": ("no", False),
    "argmax": ("no", False),
    "argmin": ("no", False),
    "any": ("no", True),
    "all": ("no", False),
    "count_nonzero": ("no", True),
}
"""Operator -> (what it may do over a prunable dimension, whether zeros give zero)."""

ALONG: dict[str, bool] = {
    "softmax": False,
    "log_softmax": False,
    "_softmax": False,
    "_log_softmax": False,
    "cumsum": True,
    "cumprod": True,
    "cummax": True,
    "cummin": True,
    "logcumsumexp": False,
    "sort": True,
    "argsort": False,
    "topk": True,
    "renorm": True,
}
"""Operator that runs along one dimension and keeps it -> whether zeros give zero."""

INDICES = frozenset("max min median nanmedian cummax cummin sort topk kthvalue".split())


@rule(*REDUCE)
def _reduce(labels: Labels, record: Record) -> None:
    """Over a prunable dimension: exact, exact with the dense count, or pinned."""
    over, zero = REDUCE[record.op]
    x = record.args[0]
    if len(record.args) > 1 and isinstance(record.args[1], Ref):
        RULES["pointwise"](labels, record)  # `torch.max(a, b)`, the maximum of two tensors
        return
    rank = len(labels.value(x).shape)
    gone = set(_dims(record, rank))
    labels.drop(x, gone)
    kept = []
    for f in labels.factors(x):
        if not set(f.dims) & gone:
            kept.append(f)
        elif (
            over == "no"
            or _power(record) == 0
            or (over == "extreme" and _asks_where(labels, record))
        ):
            labels.pin(f.labels, f"{record.op} is taken over it", record.where)
        elif not f.z:
            labels.pin(f.labels, "it is reduced over and nothing makes it zero", record.where)
        elif over in ("sum", "extreme") or labels.normalise(f.labels, record):
            labels.consume(f.labels)
    if not _keepdim(record):
        kept = [replace(f, dims=tuple(d - sum(g < d for g in gone) for d in f.dims)) for f in kept]
    for i, out in enumerate(record.outputs):
        z = zero and not (i == 1 and record.op in INDICES)
        labels.assign(out, [replace(f, z=f.z and z) for f in kept])


def _asks_where(labels: Labels, record: Record) -> bool:
    """Whether the positions of the extremes are used, which a cut would shift."""
    places = set(record.outputs[1:])
    return not places.isdisjoint(labels.tape.outputs) or any(
        not places.isdisjoint(ref.id for ref in refs([later.args, later.kwargs]))
        for later in labels.tape.records
        if places and later.index > record.index
    )


def _dims(record: Record, rank: int) -> list[int]:
    """The dimensions that a reduction removes."""
    position = 2 if record.op in ("norm", "linalg_vector_norm", "kthvalue") else 1
    given = record.kwargs.get("dim", record.kwargs.get("dims"))
    if given is None and len(record.args) > position:
        given = record.args[position]
    if given is None or given == [] or isinstance(given, bool):
        return list(range(rank))
    listed = given if isinstance(given, (list, tuple)) else [given]
    return [int(d) % rank for d in listed] if rank else []


def _keepdim(record: Record) -> bool:
    named = record.kwargs.get("keepdim")
    later = (
        "norm linalg_vector_norm kthvalue var std var_mean std_mean padded_var padded_var_mean"
    ).split()
    position = 3 if record.op in later else 2
    given = record.args[position] if len(record.args) > position else False
    return bool(given if named is None else named)


def _power(record: Record) -> Any:
    """The order of a norm; of order 0 and below, zeros count."""
    if record.op not in ("norm", "linalg_vector_norm"):
        return 1
    order = record.args[1] if len(record.args) > 1 else record.kwargs.get("ord", 2)
    return 0 if isinstance(order, (int, float)) and order <= 0 else 1


@rule("tril", "triu")
def _triangle(labels: Labels, record: Record) -> None:
    """Zeros on one side of a diagonal of the last two dims."""
    x = record.args[0]
    rank = len(labels.value(x).shape)
    kept = without(labels, x, {rank - 1, rank - 2}, f"{record.op} cuts along its diagonal", record)
    labels.assign(record.outputs[0], kept)


@rule(*ALONG)
def _along(labels: Labels, record: Record) -> None:
    x = record.args[0]
    rank = len(labels.value(x).shape)
    position = {"topk": 2, "renorm": 2}.get(record.op, 1)
    given = record.args[position] if len(record.args) > position else None
    if record.op in ("sort", "argsort") and "stable" in record.kwargs:
        given = record.kwargs.get("dim", given)
    dim = record.kwargs.get("dim", -1 if given is None else given)
    over = {int(dim) % max(1, rank)}
    if record.op == "renorm":  # norms are taken over every other dimension
        over = set(range(rank))
    kept = without(labels, x, over, f"{record.op} runs over it", record)
    for i, out in enumerate(record.outputs):
        z = ALONG[record.op] and not (i == 1 and record.op in INDICES)
        labels.assign(out, [replace(f, z=f.z and z) for f in kept])
