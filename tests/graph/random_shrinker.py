"""A failing random network, made as short as it can be: for people who read a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.graph.random_drawer import SCOPE, Program

__all__ = ["minimised"]

NAME = re.compile(r"\b[uv]\d+\b")


def minimised(program: Program, fails: Callable[[Program], bool], most: int = 250) -> Program:
    """The shortest program found that still fails: values become inputs, lines go.

    Args:
        program: fails.
        fails: decides; an exception counts as no.
        most: programs tried.
    """
    left, again = most, True
    while again and left > 0:
        again = False
        for smaller in _smaller(program):
            left -= 1
            if left <= 0:
                break
            try:
                _values(smaller)
                again = fails(smaller)
            except Exception:  # the shorter program does not even run
                again = False
            if again:
                program = smaller
                break
    return program


def _values(program: Program) -> dict[str, Any]:
    """What every name holds at the end of a run."""
    net = nn.Module()
    for part in program.parts:
        made = part.make()
        if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
            net.register_buffer(part.name, made)
        else:
            setattr(net, part.name, made)
    held: dict[str, Any] = {**SCOPE, "self": net.eval(), **dict(program.inputs)}
    with torch.no_grad():
        for line in program.lines:
            exec(line, held)
    return held


def _targets(line: str) -> list[str]:
    """Names that a line sets: "v3, v4 = ..." -> [v3, v4]; none for writes in place."""
    if ": v" in line and line.startswith("with"):
        line = line.split(": ", 1)[1]
    left, eq, _ = line.partition(" = ")
    plain = eq and re.fullmatch(r"[uv]\d+(, [uv]\d+)*", left.strip())
    return NAME.findall(left) if plain else []


def _pruned(program: Program) -> Program:
    """Without lines, inputs and parts that the result does not need."""
    needed, lines = set(NAME.findall(program.result)), []
    for line in reversed(program.lines):
        made = _targets(line)
        if needed & set(made or NAME.findall(line)):
            lines.append(line)
            needed |= set(NAME.findall(line))
    text = " ".join([*lines, program.result])
    parts = tuple(p for p in program.parts if re.search(rf"self\.{p.name}\b", text))
    inputs = tuple((n, x) for n, x in program.inputs if n in needed)
    return replace(program, inputs=inputs, parts=parts, lines=tuple(reversed(lines)))


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less, the boldest first."""
    held = _values(program)
    leaves = re.findall(r"[uv]\d+", program.result)
    if len(leaves) > 1 or program.result != leaves[0]:
        for leaf in leaves:
            yield _pruned(replace(program, result=leaf))
        for leaf in leaves:
            rest = [n for n in leaves if n != leaf]
            if rest:
                yield _pruned(replace(program, result=f"[{', '.join(rest)}]"))
    for at in range(len(program.lines) - 1, -1, -1):
        lines = [*program.lines[:at], *program.lines[at + 1 :]]
        made = _targets(program.lines[at])
        if not made:
            yield _pruned(replace(program, lines=tuple(lines)))
            continue
        values = [held[n] for n in made]
        if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            continue
        fed = tuple(
            (n, torch.randn(v.shape, dtype=v.dtype)) for n, v in zip(made, values, strict=True)
        )
        yield _pruned(replace(program, lines=tuple(lines), inputs=(*program.inputs, *fed)))
        if len(made) == 1:
            earlier = [
                *dict(program.inputs),
                *(n for ln in program.lines[:at] for n in _targets(ln)),
            ]
            like = [
                n
                for n in earlier
                if isinstance(held[n], Tensor) and held[n].shape == values[0].shape
            ]
            for other in reversed(like[-3:]):
                new = [re.sub(rf"\b{made[0]}\b", other, ln) for ln in lines]
                result = re.sub(rf"\b{made[0]}\b", other, program.result)
                yield _pruned(replace(program, lines=tuple(new), result=result))
