"""The law that random networks must obey: the smaller model equals the masked one.

`check` traces, removes random units, shrinks, and compares in float64 on inputs that the engine has
not seen, with masking and comparison of its own (nothing of `secateurs.surgery.verification`).
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateurs as sc
from secateurs.errors import CaptureError, SoundnessError
from secateurs.graph.records import refs
from secateurs.surgery.shrinking import info_of
from secateurs.types import Counts, Graph, Inputs, Plan, Scores, Threshold
from tests.graph.nets import STRUCTURE
from tests.graph.random_drawer import Program

__all__ = ["LIMIT", "RATIOS", "Outcome", "check", "difference", "draw_plan", "masked_by"]

LIMIT = 1e-9
RATIOS = (0.1, 0.5, 0.9)
FULL = 5
"""Of sixteen graphs, this one is exported with free sizes and in both modes."""
Kind = Literal["equal", "whole", "vacuous", "uncaptured", "unsound", "refused", "error"]


@dataclass(frozen=True)
class Outcome:
    """What became of one random network.

    Attributes:
        kind: "equal" (something was removed, and the output changed as it should), "vacuous" (as
            equal, but the removal does not change the output), "whole" (nothing is removable),
            "unsound" (wrong numbers or shapes), "refused" (the engine's own verification raised
            `SoundnessError`), "uncaptured" (the graph form is needed and `torch.export` says that
            sizes depend on values: a limit, not a fault) or "error" (anything else raised).
        detail: the error, or how large it is.
        form: of the result, when there is one.
        ops: operators on the tape, how often each.
        cut: of these, how often with labels of removed units.
    """

    kind: Kind
    detail: str
    form: str
    ops: Counter[str]
    cut: Counter[str]

    @property
    def failed(self) -> bool:
        return self.kind in ("unsound", "refused", "error")


def draw_plan(graph: Graph, seed: int, ratio: float) -> Plan | None:
    """Keep a share of the units of every family (of some families, now and then), at random."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    groups = [g for g in graph.groups(STRUCTURE) if g.n_units > 1]
    if len(groups) > 1 and rng.random() < 0.25:
        groups = rng.sample(groups, len(groups) - 1)
    if not groups:
        return None
    values = {g.name: torch.rand(g.n_units, generator=generator) for g in groups}
    kept = {g.name: max(1, min(g.n_units - 1, round(ratio * g.n_units))) for g in groups}
    scores = Scores(graph, values, "random")
    return sc.select(scores, Counts(kept, Threshold("quantile", q=1 - ratio)))


@contextmanager
def light_export() -> Iterator[None]:
    """Export with fixed sizes and in eval mode only: four times faster, one law the less."""
    export = torch.export.export

    def light(model: nn.Module, args: Any, kwargs: Any = None, **options: Any) -> Any:
        if model.training:
            raise RuntimeError("train mode is left out here")
        return export(model, args, kwargs, **{**options, "dynamic_shapes": None})

    with mock.patch.object(torch.export, "export", light):
        yield


def masked_by(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy of the model with everything zero that the masks say is removed.

    The direction of a normalised weight stays where its length is zero: it would be 0 / 0.
    """
    new = copy.deepcopy(model)
    held = {**dict(new.named_parameters()), **dict(new.named_buffers())}
    with torch.no_grad():
        for name, mask in masks.items():
            length = name.removesuffix("1") + "0"
            if name.endswith("weight.original1") and length in masks:
                mask = mask | ~masks[length]
            held[name].copy_(torch.where(mask, held[name], torch.zeros_like(held[name])))
    return new


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    given = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    with torch.no_grad():
        found = model(**given) if isinstance(given, dict) else model(*given)
    return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]


def difference(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest max|a - b| / (1 + max|a|); infinite for other shapes or where one is not finite."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or not bool((torch.isfinite(x) == torch.isfinite(y)).all()):
            return float("inf")
        if x.numel():
            x, y = torch.nan_to_num(x), torch.nan_to_num(y)
            worst = max(worst, float((x - y).abs().max() / (1 + x.abs().max())))
    return worst


def check(program: Program, seed: int, *, form: str | None = None) -> Outcome:
    """Build, trace, prune, shrink and compare one program."""
    ops: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    form = form or ("graph" if seed % 10 == 0 else "auto")
    ratio = RATIOS[seed % 3]

    def outcome(kind: Kind, detail: str = "", made: str = "") -> Outcome:
        return Outcome(kind, detail, made, ops, cut)

    model, example = program.build(), program.example()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = sc.trace(model, example)
            ops.update(_operators(graph, None))
            plan = draw_plan(graph, seed, ratio)
            if plan is None or not plan.structural:
                return outcome("whole")
            cut.update(_operators(graph, plan))
            with light_export() if seed % 16 != FULL else nullcontext():
                small = sc.shrink(model, plan, example, form=form)
    except SoundnessError as error:
        return outcome("refused", str(error))
    except Exception as error:  # whatever the engine raises is a finding
        if isinstance(error, CaptureError) and "data-dependent" in str(error):
            return outcome("uncaptured", str(error))
        return outcome("error", f"{type(error).__name__}: {error}")
    if any(not torch.equal(t, before[n]) for n, t in model.state_dict().items()):
        return outcome("unsound", "the dense model was changed")
    made = info_of(small).form
    masked = masked_by(model, dict(plan.masks))
    if sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in model.parameters()):
        return outcome("unsound", "nothing was removed though the plan removes something", made)
    trials = [example, program.example(seed + 1)]
    light = seed % 16 != FULL
    if not (made == "graph" and (light or any("fixed" in n for n in info_of(small).notes))):
        trials.append(program.example(seed + 2, longer=True))
    changed = 0.0
    for number, inputs in enumerate(trials):
        try:
            expected = run(masked, inputs)
        except Exception:
            if number < 2:
                raise
            continue  # the number of samples is written into the program
        try:
            got = run(small, inputs)
            away = difference(expected, got) if len(got) == len(expected) else float("inf")
        except Exception as error:  # the smaller model does not run on other inputs
            return outcome("unsound", f"inputs {number}: {type(error).__name__}: {error}", made)
        if away > LIMIT:
            return outcome("unsound", f"error {away:.1e} on inputs {number}", made)
        changed = max(changed, difference(run(model, inputs), expected))
    return outcome("equal" if changed > 1e-12 else "vacuous", f"{changed:.1e}", made)


def _operators(graph: Graph, plan: Plan | None) -> Counter[str]:
    """Operators on the tape; with a plan, only those that meet labels of removed units."""
    labels: Any = graph.detail.labels
    if plan is None:
        return Counter(r.op for r in labels.tape.records)
    component = graph.detail.component
    gone = np.zeros(labels.n_atoms, dtype=bool)
    for axis in labels.axes:
        kept = plan.kept.get(axis.name, {}).get(axis.dim) if axis.stored else None
        if kept is not None:
            lost = np.ones(axis.size, dtype=bool)
            lost[kept.numpy()] = False
            gone[component[np.flatnonzero(lost) + axis.offset]] = True

    def meets(ident: int) -> bool:
        return any(bool(gone[component[f.labels]].any()) for f in labels.factors(ident))

    return Counter(
        r.op
        for r in labels.tape.records
        if any(meets(i) for i in (*r.outputs, *(x.id for x in refs([r.args, r.kwargs]))))
    )
