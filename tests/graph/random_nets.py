"""Random networks over images, sequences, vectors and heads: everything combines with everything.

`random_net(seed)` returns a `Program`. Each step is one draw from a family; it reads recent values,
whichever family made them, is run at once to know its result, and is dropped when the operator
refuses the shapes or the result is not worth going on with. So families need not know what fits.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor

from tests.graph import (  # noqa: F401  (families)
    random_attention,
    random_blocks,
    random_layers,
    random_moves,
    random_pointwise,
    random_writes,
)
from tests.graph.random_drawer import FAMILIES, Drawer, Program

__all__ = ["random_net"]


def _start(d: Drawer) -> None:
    """Inputs, and a layer after them so that there is something to prune."""
    kind = d.one_of(*["image"] * 4, *["sequence"] * 4, "vector", "vector", "tokens")
    generator = torch.Generator().manual_seed(d.seed)
    batch = d.one_of(2, 3)
    shape = {
        "image": (batch, 3, 6, 6), "sequence": (batch, d.one_of(4, 5, 6), 5),
        "vector": (batch, 6), "tokens": (batch, 5),
    }[kind]  # fmt: skip
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "tokens":
        x = torch.randint(0, 9, shape, generator=generator)
    d.inputs.append(("v0", x))
    d.scope["v0"] = x
    if d.chance(0.15):
        d.inputs.append(("u0", torch.randn(shape, generator=generator, dtype=torch.float64)))
        d.scope["u0"] = d.inputs[-1][1]
    width = d.wide()
    if kind == "image":
        d.let(f"{d.part(f'nn.Conv2d(3, {width}, 3, padding=1)')}(v0)")
    elif kind == "tokens":
        d.let(f"{d.part(f'nn.Embedding(9, {width})')}(v0)")
    else:
        d.let(f"{d.part(f'nn.Linear({shape[-1]}, {width})')}(v0)")


def _finish(d: Drawer) -> str:
    """Read out the last value and, half of the time, all those that nothing reads."""
    floats = [n for n, v in d.scope.items() if isinstance(v, Tensor) and v.is_floating_point()]
    words = Counter(re.findall(r"\b[uv]\d+\b", "\n".join(d.lines)))
    unread = [n for n in floats[:-1] if words[n] < 2 and n not in dict(d.inputs)]
    ends = [*(unread[-3:] if d.chance(0.6) else []), floats[-1]]
    outs = []
    for end in ends:
        at = end
        if len(d.shape(at)) > 2:
            inner = list(range(1, len(d.shape(at))))
            spread = d.rng.sample(inner, len(inner) - 1)
            flat = f"{at}.flatten(1)" if d.chance(0.3) else f"{at}.mean({tuple(sorted(spread))})"
            at = d.let(flat)
        if len(d.shape(at)) == 2:
            at = d.let(f"{d.part(f'nn.Linear({d.shape(at)[1]}, 3)')}({at})")
        outs.append(at)
    ways = [", ".join(outs) + ("," if len(outs) == 1 else ""), f"[{', '.join(outs)}]"]
    ways += ["{" + ", ".join(f"'{o}': {o}" for o in outs) + "}"]
    return outs[0] if len(outs) == 1 and d.chance(0.7) else str(d.rng.choice(ways))


def _use(d: Drawer) -> None:
    """A layer that reads the last value, so that what is in front of it can be pruned."""
    name = next(n for n, v in d.scope.items() if v is d.late()[0])
    shape = d.shape(name)
    if len(shape) == 4 and d.chance(0.7):
        d.let(f"{d.part(f'nn.Conv2d({shape[1]}, {d.wide()}, 1)')}({name})")
    elif len(shape) == 3 and d.chance(0.2):
        part = d.part(f"nn.Conv1d({shape[2]}, {d.wide()}, 1)")
        d.let(f"{part}({name}.transpose(1, 2)).transpose(1, 2)")
    else:
        d.let(f"{d.part(f'nn.Linear({shape[-1]}, {d.wide()})')}({name})")


def random_net(seed: int) -> Program:
    """A program with its inputs; the same for the same seed."""
    d = Drawer(seed)
    _start(d)
    wanted, tries = d.rng.randrange(2, 8), 0
    while wanted > 0 and tries < 60:
        tries += 1
        ranks = {v.dim() for v in d.late(3)} & {2, 3, 4} or {2, 3, 4}
        fit = [e for _, e in sorted(FAMILIES.items()) if ranks & set(e.ranks)]
        entry = d.rng.choices(fit, [e.weight for e in fit])[0]
        if d.attempt(entry.step):
            wanted -= 1
            if d.chance(0.35):
                d.attempt(_use)
    return d.program(_finish(d))
