"""The structure of a model as one HTML page: what can be pruned, what cannot, and where it is.

`structure_page(graph, found, title) -> str`. No script and no request, like the report of a run.
Every parameter is a small box in execution order, in the colours of the groups along its columns
(left, what it reads) and its rows (right, what it makes); every group is a card with its tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from secateurs.errors import MissingDependencyError
from secateurs.graph.records import refs
from secateurs.inventory import ADVICE, GroupRow, Inventory, common_module, percent, range_text
from secateurs.report.html import page_engine
from secateurs.report.words import sentence, shorten
from secateurs.types import Graph

__all__ = ["check_drawable", "structure_page"]

MANY = 12
"""More groups than this are shown closed: one line each, the tensors on request."""
MAX_CHIPS = 8
"""Modules shown per stage of a chain; the others are behind "and n more"."""
MAX_NAMES = 6
"""Parts with the same reason that are shown; the others are behind "and n more"."""
HEIGHT, WIDTH, NARROW = 34, 34, 15
"""Size of a box in pixels; a vector is narrower than a matrix."""

Shapes = dict[str, tuple[int, ...]]


def check_drawable() -> None:
    """Check that the package that fills the page is installed.

    Raises:
        MissingDependencyError: it is not; names the command that installs it.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the HTML page needs jinja2: pip install 'secateurs[report]'"
        ) from error


def structure_page(graph: Graph, found: Inventory, title: str) -> str:
    """The page as text.

    Args:
        graph: as `trace` returns it.
        found: its inventory, with the kinds that are to be shown.
        title: name of the model.

    Raises:
        MissingDependencyError: as `check_drawable`.
    """
    check_drawable()
    from markupsafe import Markup

    room, engine = files("secateurs.report"), page_engine(breaks=".:/_")
    engine.filters |= {
        "percent": percent, "shorten": shorten, "between": range_text, "sentence": sentence
    }  # fmt: skip
    shapes = _shapes(graph)
    reasons = list(found.by_reason().items())
    style = "".join(room.joinpath(f).read_text("utf-8") for f in ("style.css", "structure.css"))
    page: str = engine.from_string(room.joinpath("structure.html.jinja").read_text("utf-8")).render(
        title=title,
        style=Markup(style + _highlights(len(found.groups))),
        found=found,
        graph=graph,
        blocks=[
            (label, [Markup(b) for b in boxes]) for label, boxes in _strip(graph, found, shapes)
        ],
        cards=[_card(n, g, shapes) for n, g in enumerate(found.groups, start=1)],
        closed=len(found.groups) > MANY,
        kinds=list(dict.fromkeys(g.kind for g in found.groups)),
        reasons=reasons,
        max_chips=MAX_CHIPS,
        max_names=MAX_NAMES,
        advice=ADVICE,
    )
    return page


def _shapes(graph: Graph) -> Shapes:
    """Shape of every parameter; without the analysis, from the costs."""
    known = getattr(graph.detail, "shapes", {})
    sizes = {t.name: tuple(d.size for d in t.dims) for t in graph.costs if t.is_parameter}
    return {name: known.get(name, shape) for name, shape in sizes.items()}


def _highlights(n: int) -> str:
    """Rules that bring out one group in the picture: under the pointer, or asked for by a link."""
    rules = [
        f".strip:has(.u{i}:hover) .u{i},main:has(#p{i}:target) .strip .u{i}"
        for i in range(1, n + 1)
    ]
    return ",".join(rules) + "{opacity:1;stroke-width:2}\n" if rules else ""


# -- the picture ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """Positions of one dimension of a parameter that belong to a group."""

    number: int
    group: GroupRow
    n: int
    role: str


@dataclass(frozen=True)
class _Part:
    """A stretch of one dimension of a parameter.

    Attributes:
        share: of the positions along the dimension, in (0, 1].
        look: classes of its rectangle.
        number: of its group, counted from 1; 0 when it is left whole.
        link: where the page says more; "" for nowhere.
        text: what it is, in words.
    """

    share: float
    look: str
    number: int
    link: str
    text: str


@dataclass(frozen=True)
class _Picture:
    """What the boxes are drawn from.

    Attributes:
        shapes: of all parameters.
        held: (parameter, dimension) -> the groups that live there.
        layers: parameter -> groups of whole layers that it goes with.
        reasons: module or parameter -> number of the reason in the list, and the reason.
        looks: classes for each group.
    """

    shapes: Shapes
    held: dict[tuple[str, int], list[_Held]]
    layers: dict[str, list[tuple[int, GroupRow]]]
    reasons: dict[str, tuple[int, str]]
    looks: list[str]


def _picture(found: Inventory, shapes: Shapes) -> _Picture:
    picture = _Picture(shapes, {}, {}, {}, _looks(found))
    for number, group in enumerate(found.groups, start=1):
        if group.kind == "layer":
            for name in group.tensors:
                picture.layers.setdefault(name, []).append((number, group))
        elif group.kind == "weight":
            for dim, n in enumerate(shapes[group.name][:2]):
                role = "producer" if dim == 0 else "consumer"
                picture.held.setdefault((group.name, dim), []).append(_Held(number, group, n, role))
        else:
            for place in group.places:
                held = _Held(number, group, place.n, place.role)
                picture.held.setdefault((place.tensor, place.dim), []).append(held)
    for number, (reason, rows) in enumerate(found.by_reason().items(), start=1):
        for row in rows:
            picture.reasons.setdefault(row.name.partition(":")[0], (number, reason))
    return picture


def _looks(found: Inventory) -> list[str]:
    """Classes of each group: its kind's colour, in two shades by turns."""
    seen: Counter[str] = Counter()
    looks = []
    for number, group in enumerate(found.groups, start=1):
        seen[group.kind] += 1
        shade = "odd" if seen[group.kind] % 2 else "even"
        looks.append(f"u u{number} k-{group.kind} {shade}")
    return looks


def _strip(graph: Graph, found: Inventory, shapes: Shapes) -> list[tuple[str, list[str]]]:
    """Boxes of all parameters in execution order, by block: a label and SVG elements."""
    picture = _picture(found, shapes)
    used = _first_use(graph)
    names = sorted(shapes, key=lambda name: used.get(name, len(used)))  # stable
    return [
        (label, [_box(picture, name) for name in inside])
        for label, inside in groupby(names, key=_block)
    ]


def _first_use(graph: Graph) -> dict[str, int]:
    """Parameter -> the operator that reads it first; empty for a graph without its analysis."""
    if not hasattr(graph.detail, "labels"):
        return {}
    tape = graph.detail.labels.tape
    used: dict[str, int] = {}
    for record in tape.records:
        for ref in refs([record.args, record.kwargs]):
            value = tape.values[ref.id]
            if value.source == "parameter":
                used.setdefault(value.name, record.index)
    return used


def _module(tensor: str) -> str:
    """The module that holds a parameter; "" for the model itself."""
    before, parametrized, _ = tensor.partition(".parametrizations.")
    return before if parametrized else tensor.rpartition(".")[0]


def _block(tensor: str) -> str:
    """The block of a parameter: its module up to the first number, or two levels of it.

    Example:
        >>> _block("bert.encoder.layer.3.output.dense.weight"), _block("bert.pooler.dense.bias")
        ('bert.encoder.layer.3', 'bert.pooler')
        >>> _block("conv1.weight"), _block("cls_token")
        ('conv1', 'cls_token')
    """
    parts = (_module(tensor) or tensor).split(".")
    end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 2)
    return ".".join(parts[:end])


def _box(picture: _Picture, name: str) -> str:
    """One parameter as an SVG element: its columns to the left, its rows to the right."""
    shape = picture.shapes[name]
    roles = _sides(picture, name)
    width = WIDTH if len(shape) > 1 else NARROW
    step = width / len(roles)
    drawn, words = [], []
    for i, (dim, role) in enumerate(roles):
        parts = _parts(picture, name, dim, role)
        words += [p.text for p in parts]
        drawn.append(_side(parts, i * step, step))
    for number, group in picture.layers.get(name, []):
        words.append(f"goes with {group.name}")
        drawn.append(
            f'<rect class="{picture.looks[number - 1]} line" x="0.5" y="{HEIGHT + 2}" '
            f'width="{width - 1}" height="3"/>'
        )
    size = " x ".join(map(str, shape)) or "scalar"
    title = escape(f"{name} ({size}): {'; '.join(dict.fromkeys(words))}")
    return (
        f'<svg class="box" width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}" '
        f'role="img" aria-label="{title}"><title>{title}</title>{"".join(drawn)}</svg>'
    )


def _sides(picture: _Picture, name: str) -> list[tuple[int, str]]:
    """The dimensions of a parameter that are drawn, with their roles: what reads goes first."""
    shape = picture.shapes[name]
    roles = {d: held[0].role for d in range(len(shape)) if (held := picture.held.get((name, d)))}
    rest = [d for d, n in enumerate(shape[:2]) if d not in roles and n > 1]
    if not roles and rest:
        roles[rest.pop(0)] = "producer"
    if len(roles) == 1 and rest:  # the other side of a matrix; kernel sizes are no side
        [role] = roles.values()
        roles[rest[0]] = "producer" if role == "consumer" else "consumer"
    order = sorted(roles, key=lambda d: (roles[d] == "producer", -d))
    return [(d, roles[d]) for d in order] or [(0, "producer")]


def _parts(picture: _Picture, name: str, dim: int, role: str) -> list[_Part]:
    """One dimension of a parameter, cut up among the groups that live in it."""
    size = picture.shapes[name][dim] if picture.shapes[name] else 1
    held = picture.held.get((name, dim), [])
    verb = "makes" if role == "producer" else "reads"
    parts = [
        _Part(h.n / size, picture.looks[h.number - 1], h.number, f"#g{h.number}",
              f"{verb} {h.group.name}")
        for h in held
    ]  # fmt: skip
    left = size - sum(h.n for h in held)
    if left > 0 and role == "consumer" and not held:
        parts.append(_Part(1.0, "whole", 0, "", "reads what is left whole, or the input"))
    elif left > 0:
        module = _module(name)
        number, why = picture.reasons.get(name, picture.reasons.get(module, (0, "")))
        link = f"#w{number}" if number else ""
        text = f"left whole: {why}" if why else "belongs to what is left whole"
        parts.append(_Part(left / size, "whole", 0, link, text))
    return parts


def _side(parts: Sequence[_Part], x: float, width: float) -> str:
    """The parts of one dimension from top to bottom, each in the colour of its kind."""
    drawn, y = [], 0.0
    total = sum(p.share for p in parts)
    for part in parts:
        height = HEIGHT * part.share / total
        shape = (
            f'<rect class="{part.look}" x="{x + 0.5:g}" y="{y + 0.5:.4g}" '
            f'width="{width - 1:.4g}" height="{max(0.5, height - 1):.4g}" rx="2"/>'
        )
        if part.number and height > 11:
            small = ' class="small"' if part.number > 99 else ""
            middle = f'x="{x + width / 2:g}" y="{y + height / 2:.4g}"'
            shape += f"<text{small} {middle}>{part.number}</text>"
        drawn.append(f'<a href="{part.link}" tabindex="-1">{shape}</a>' if part.link else shape)
        y += height
    return "".join(drawn)


# -- the cards -----------------------------------------------------------------------------


def _card(number: int, group: GroupRow, shapes: Shapes) -> dict[str, Any]:
    """What a card shows besides the row: its tensors by stage and module."""
    matrices = {_module(name) for name, shape in shapes.items() if len(shape) > 1}
    around = common_module(group.tensors)
    stages: dict[str, dict[str, list[str]]] = {"made by": {}, "scaled by": {}, "read by": {}}
    for place in group.places:
        module = _module(place.tensor)
        stage = "read by"
        if place.role == "producer":
            stage = "made by" if module in matrices else "scaled by"
        short = module.removeprefix(around) if module != around[:-1] else ""
        leaf = place.text.removeprefix(f"{module}.") if module else place.text
        stages[stage].setdefault(short, []).append(leaf)
    chain = [(what, list(chips.items())) for what, chips in stages.items() if chips]
    if group.unit_names:
        chain = [("units", [(name, []) for name in group.unit_names])]
    return {
        "number": number,
        "row": group,
        "around": around[:-1],
        "chain": chain,
        "line": "; ".join(f"{what} {_first(c for c, _ in chips)}" for what, chips in chain),
    }


def _first(names: Iterable[str]) -> str:
    """The first two of some names, and how many there are besides."""
    shown = [n for n in names if n]
    more = len(shown) - 2
    return ", ".join(shown[:2]) + (f" and {more} more" if more > 0 else "")
