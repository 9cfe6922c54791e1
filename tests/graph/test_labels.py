"""The arithmetic under the engine: components, blocks, what zero does, and the safety net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateurs.graph import capture, rules
from secateurs.graph.elementwise import at_zero
from secateurs.graph.labels import Labels, Pins, connected
from secateurs.graph.records import Record, Ref, Tape, Value
from secateurs.types import IntArray
from tests.graph.nets import rows


def ints(*values: int) -> IntArray:
    return np.array(values, dtype=np.int64)


def blank(n_atoms: int) -> Labels:
    labels = Labels(Tape([], [], (), "hand"))
    labels.n_atoms = n_atoms
    return labels


def solved(labels: Labels) -> tuple[IntArray, IntArray, Pins]:
    """Components, those that are pinned, and why."""
    component, pins = labels.solve()
    return component, np.flatnonzero(pins.of >= 0), pins


def test_connected_gives_the_smallest_member() -> None:
    chain = [(ints(5, 4), ints(4, 2)), (ints(1), ints(3))]
    assert connected(6, chain).tolist() == [0, 1, 2, 1, 2, 2]
    assert connected(3, []).tolist() == [0, 1, 2]


def test_connected_against_a_slow_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = 40
        a, b = rng.integers(0, n, (2, 30))
        slow = list(range(n))
        for _ in range(n):
            for i, j in zip(a, b, strict=True):
                slow[i] = slow[j] = min(slow[i], slow[j])
        assert connected(n, [(a, b)]).tolist() == slow


def test_a_tie_with_atom_zero_is_a_pin_with_its_reason() -> None:
    labels = blank(4)
    labels.tie(ints(1, 2), ints(0, 3), "because")
    labels.live(ints(2, 3))
    _, pinned, why = solved(labels)
    assert pinned.tolist() == [0, 1]
    assert why[1].reason == "because"


def test_what_never_takes_part_is_pinned() -> None:
    labels = blank(3)
    labels.live(ints(1))
    _, pinned, why = solved(labels)
    assert pinned.tolist() == [0, 2]
    assert "takes no part" in why[2].reason


def test_a_block_loses_whole_rows_or_columns() -> None:
    """(2, 3) views of six atoms: along the longer dimension the columns stay three units."""
    labels = blank(7)
    block = np.arange(1, 7).reshape(2, 3)
    labels.live(block)
    labels.oblige(block)
    component, pinned, _ = solved(labels)
    assert component[block].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert pinned.tolist() == [0]


def test_a_block_with_pinned_entries_comes_to_an_end() -> None:
    """A joint view over a concatenation with the input once looped for ever."""
    labels = blank(4)
    block = np.array([[0, 1], [2, 3]])
    labels.live(ints(1, 2, 3))
    labels.oblige(block)
    component, pinned, why = solved(labels)
    assert pinned.tolist() == [0, 1]
    assert why[1].reason == "it is one block with entries that are fixed"
    assert component[block[1]].tolist() == [2, 2]


F32 = torch.float32


def record(fn: object, n: int, *extra: object) -> Record:
    return Record("op", fn, (*[Ref(i) for i in range(n)], *extra), {}, (n,))  # type: ignore[arg-type]


def operands(n: int, dtype: torch.dtype = F32) -> Labels:
    values = [Value(i, (2,), dtype, "input", str(i)) for i in range(n + 1)]
    return Labels(Tape(values, [], (), "hand"))


ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("fn", "n", "extra", "zeros", "outcome"),
    [
        (ATEN.relu.default, 1, (), {0}, "zero"),
        (ATEN.sigmoid.default, 1, (), {0}, "other"),
        (ATEN.log.default, 1, (), {0}, "undefined"),
        (ATEN.sqrt.default, 1, (), {0}, "zero"),  # negative draws do not count
        (ATEN.mul.Tensor, 2, (), {1}, "zero"),
        (ATEN.add.Tensor, 2, (), {1}, "other"),
        (ATEN.add.Tensor, 2, (), {0, 1}, "zero"),
        (ATEN.div.Tensor, 2, (), {0}, "zero"),
        (ATEN.div.Tensor, 2, (), {0, 1}, "undefined"),
        (ATEN.reciprocal.default, 1, (), {0}, "undefined"),
        (ATEN.pow.Tensor_Scalar, 1, (2,), {0}, "zero"),
        (ATEN.pow.Tensor_Scalar, 1, (0,), {0}, "other"),
        (ATEN.where.self, 3, (), {1}, "other"),
        (ATEN.relu.default, 1, (), set(), "other"),
    ],
)
def test_at_zero(fn: object, n: int, extra: tuple[int], zeros: set[int], outcome: str) -> None:
    labels = operands(n)
    if fn is ATEN.where.self:
        labels.tape.values[0] = Value(0, (2,), torch.bool, "input", "0")
    assert at_zero(labels, record(fn, n, *extra), zeros) == outcome


def test_at_zero_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    draw = record(ATEN.rrelu.default, 1, 0.1, 0.3, True)
    at_zero(operands(1), draw, {0})
    assert torch.equal(before, torch.get_rng_state())


def test_a_rule_that_forgets_a_dimension_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The net under all rules: labels that vanish without a word stay whole."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    tape, _ = capture.tape_of(capture.export_module(net, rows(), training=False), net, rows())

    def forgetful(labels: Labels, found: Record) -> None:
        labels.assign(found.outputs[0], [])

    monkeypatch.setitem(rules.RULES, "relu", forgetful)
    pins = rules.interpret(tape).pins
    assert "operator relu has no rule for this dimension" in {p.reason for p in pins}

    def broken(labels: Labels, found: Record) -> None:
        raise IndexError("no such argument")

    monkeypatch.setitem(rules.RULES, "relu", broken)
    pins = rules.interpret(tape).pins
    expected = "the rule for relu does not fit this call (no such argument)"
    assert expected in {p.reason for p in pins}
