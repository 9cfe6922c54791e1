"""The page of a structure: every group and reason, escaped, self-contained, well-formed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import MissingDependencyError
from secateurs.inventory import inventory
from secateurs.report.structure import MANY, MAX_CHIPS, check_drawable, structure_page
from secateurs.types import KINDS, STRUCTURED, Exclusion, Graph, GroupTarget

from .test_html import Page


class Late(nn.Module):
    """Runs its layers in another order than it makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)
        self.side = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(self.first(x))
        return self.last(h), self.side(h).cumsum(1)


def page(graph: Graph, granularity: str | None = None, title: str = "net") -> str:
    kinds = frozenset(KINDS) - {"weight"} if granularity is None else {granularity}
    return structure_page(graph, inventory(graph, kinds, STRUCTURED), title)


@pytest.fixture(scope="module")
def late() -> Graph:
    return sc.trace(Late(), torch.zeros(2, 3))


@pytest.fixture(scope="module")
def deep() -> Graph:
    """More groups than are shown open."""
    layers = [m for _ in range(MANY + 2) for m in (nn.Linear(6, 6), nn.ReLU())]
    return sc.trace(nn.Sequential(*layers, nn.Linear(6, 2)), torch.zeros(2, 6))


def boxes(text: str) -> list[str]:
    return re.findall(r'<svg class="box".*?</svg>', text)


def test_every_group_reason_and_parameter_is_there(late: Graph) -> None:
    text = page(late)
    read = Page(text)
    assert read.faults == []
    assert read.headings == ["s-strip", "s-groups", "s-whole"]
    for group in late.groups():
        assert group.name in read.text
    for part in late.excluded:
        assert part.name in read.text
        assert part.reason in read.text
        assert part.where in read.text
    assert len(boxes(text)) == 6
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = {(a["href"] or "")[1:] for t, a in read.tags if t == "a"}
    assert links <= set(ids)


def test_boxes_run_in_execution_order(late: Graph) -> None:
    names = [re.findall(r'aria-label="(\S+) ', box)[0] for box in boxes(page(late))]
    assert names[:2] == ["first.weight", "first.bias"]
    assert [n.rpartition(".")[0] for n in names] == ["first"] * 2 + ["last"] * 2 + ["side"] * 2
    plain = replace(late, detail=None)  # without the analysis: as they are listed
    assert len(boxes(page(plain))) == 6


def test_a_box_shows_what_it_reads_and_makes(late: Graph) -> None:
    by_name = {re.findall(r'aria-label="(\S+) ', b)[0]: b for b in boxes(page(late))}
    first, last = by_name["first.weight"], by_name["last.weight"]
    assert "makes first:neuron" in first
    assert "reads what is left whole, or the input" in first
    assert re.findall(r'class="(u u1[^"]*|whole)" x="([\d.]+)"', first) == [
        ("whole", "0.5"), ("u u1 k-neuron odd", "17.5")
    ]  # fmt: skip
    assert "reads first:neuron" in last
    assert "left whole: it is part of the model&#x27;s output" in last
    assert re.findall(r'href="([^"]+)"', last) == ["#g1", "#w1"]


def test_a_dimension_is_cut_up_among_its_groups() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(6, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = torch.split(torch.relu(self.a(x)), [6, 2], 1)
            y: torch.Tensor = self.b(left) + self.c(right)
            return y

    graph = sc.trace(Split(), torch.zeros(2, 3))
    assert sorted(graph.units.values()) == [2, 6]
    [box] = [b for b in boxes(page(graph)) if 'aria-label="a.bias ' in b]
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" rx', box)]
    assert heights == [34 * 6 / 8 - 1, 34 * 2 / 8 - 1]


def test_many_groups_are_closed_and_few_are_open(late: Graph, deep: Graph) -> None:
    assert "<details open>" in page(late)
    text = page(deep)
    assert len(deep.groups()) > MANY
    assert "<details open>" not in text
    assert all(f'id="g{i}"' in text for i in range(1, len(deep.groups()) + 1))
    assert Page(text).faults == []


def test_long_lists_are_folded_but_complete(late: Graph) -> None:
    many = tuple(Exclusion(f"part{i}", "too round", f"add (net.py:{i})") for i in range(20))
    text = page(replace(late, excluded=many))
    assert "and 14 more" in text
    assert all(e.where in Page(text).text for e in many)
    group = late.groups()[0]
    copies = [replace(m, tensor=f"b{i}.weight") for i in range(MAX_CHIPS + 3)
              for m in group.members[:1]]  # fmt: skip
    wide = replace(late, targets={group.name: replace(group, members=tuple(copies))}, detail=None)
    text = page(wide)
    assert "and 3 more" in text
    assert all(f"b{i}" in Page(text).text for i in range(MAX_CHIPS + 3))


def test_names_are_text_and_nothing_is_asked_for(late: Graph) -> None:
    group = late.groups()[0]
    evil = "</style><script>alert(1)</script>"
    graph = replace(
        late,
        targets={evil: replace(group, name=evil)},
        excluded=(Exclusion(evil, evil, evil), Exclusion(f"operator {evil}", evil)),
        notes=(evil,),
        unknown_ops=(evil,),
    )
    text = page(graph, title=evil)
    read = Page(text)
    assert read.faults == []
    assert "script" not in {tag for tag, _ in read.tags}
    assert "default-src 'none'" in text
    for _, attributes in read.tags:
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_unknown_operators_come_with_advice(late: Graph) -> None:
    assert "register_rule" not in page(late)
    graph = replace(late, excluded=(Exclusion("operator fold", "no rule yet"),))
    assert "register_rule" in page(graph)
    assert "<code>fold</code>: no rule yet" in page(graph)


def test_layers_are_lines_below_and_weights_are_boxes(late: Graph) -> None:
    layer = GroupTarget(
        "layers:layer", "layer", 1, (), unit_names=("side",),
        unit_tensors=(("side.weight", "side.bias"),),
    )  # fmt: skip
    term = {t.name: t for t in late.costs}["side.weight"]
    from secateurs.types import CostDim, IntArray

    one: IntArray = torch.ones(1, dtype=torch.int64).numpy()
    costs = [replace(term, dims=(*term.dims, CostDim(1, {layer.name: one})))]
    text = page(replace(late, targets={**late.targets, layer.name: layer}, costs=tuple(costs)))
    [box] = boxes(text)
    assert "goes with layers:layer" in box
    assert 'class="u u2 k-layer odd line"' in box
    assert Page(text).faults == []
    weights = page(late, "weight")
    assert "k-weight" in weights
    assert Page(weights).faults == []


def test_nothing_to_prune() -> None:
    text = page(Graph({}))
    assert "Nothing can be pruned" in text
    assert Page(text).faults == []


def test_the_same_graph_gives_the_same_page(late: Graph) -> None:
    assert page(late) == page(late)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"needs jinja2: pip install"):
        check_drawable()
