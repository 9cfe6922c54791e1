"""What is saved comes back; what is damaged, or of another graph, is an error that says so."""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateurs.allocation import allocate
from secateurs.errors import ConfigError, FileFormatError, ScoringError
from secateurs.graph import trace
from secateurs.scores import load_scores, save_scores
from secateurs.scoring import score
from secateurs.selection import select
from secateurs.types import Budget, Graph, GroupTarget, Scores, Target, WeightTarget

from ..graphs import units_graph
from .made import INF, flat, quick, same, scored

FULL = scored(
    {"b": [3.0, -0.0, -INF], "a": [1e-45]},
    notes=("sample by sample: b",),
    n_samples=12,
)
FULL = replace(
    FULL,
    graph=replace(FULL.graph, targets={**FULL.graph.targets, "c": GroupTarget("c", "head", 2, ())}),
    not_scored={"c": "no site"},
)


def test_scores_come_back_bit_identical_in_their_order(tmp_path: Path) -> None:
    path = save_scores(FULL, tmp_path / "new" / "taylor.safetensors")
    assert path == tmp_path / "new" / "taylor.safetensors"
    back = load_scores(str(path), FULL.graph)
    assert same(back, FULL)
    assert back.graph is FULL.graph
    assert [f.name for f in path.parent.iterdir()] == ["taylor.safetensors"]


def test_anyone_can_read_the_file(tmp_path: Path) -> None:
    path = save_scores(FULL, tmp_path / "s.safetensors")
    with safe_open(path, framework="np") as file:
        assert file.get_tensor("b").tolist() == [3.0, 0.0, -INF]
        header = json.loads(file.metadata()["secateurs.scores"])
    assert header["criterion"] == "taylor"
    assert header["targets"]["c"] == {"kind": "head", "shape": [2]}


lines_of_any_size = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda n: n != "__metadata__"),
    st.lists(st.one_of(st.floats(width=32, allow_nan=False, max_value=2.0**127), st.just(-INF))),
    max_size=4,
)


@quick
@given(lines_of_any_size, st.text(), st.lists(st.text(), max_size=2), st.integers(0, 2**70))
def test_whatever_is_saved_comes_back(
    lines: dict[str, list[float]], criterion: str, notes: list[str], n: int
) -> None:
    scores = scored(lines, criterion, notes=tuple(notes), n_samples=n)
    with tempfile.TemporaryDirectory() as folder:
        assert same(load_scores(save_scores(scores, f"{folder}/s"), scores.graph), scores)


def test_a_file_is_replaced_only_with_force_and_by_something_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_scores(FULL, tmp_path / "s")
    other = scored({"a": [7.0]})
    with pytest.raises(ConfigError, match=r"s exists; choose another name or pass force=True"):
        save_scores(other, path)
    with pytest.raises(ConfigError, match="is a folder; name a file, such as"):
        save_scores(other, tmp_path, force=True)

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            save_scores(other, path, force=True)
    assert same(load_scores(path, FULL.graph), FULL)
    assert [f.name for f in tmp_path.iterdir()] == ["s"]
    save_scores(other, path, force=True)
    assert same(load_scores(path, other.graph), other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": {"x": torch.ones(1)}}, ConfigError, "x: the graph has no such target"),
        ({"values": {"a": torch.ones(2)}}, ConfigError, r"a: must be float32 of shape \(1,\), got"),
        ({"values": {"a": torch.ones(1).double()}}, ConfigError, "got float64 of shape"),
        ({"not_scored": {"x": "why"}}, ConfigError, r"x \(not scored\): the graph has no such"),
        ({"values": {"a": torch.tensor([INF])}}, ScoringError, "'taylor': nan or inf in a"),
        ({"values": {"a": torch.tensor([math.nan])}}, ScoringError, "nan or inf in a"),
    ],
)
def test_what_are_no_scores_is_not_saved(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_scores(replace(FULL, **change), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_every_difference_of_the_graph_is_named(tmp_path: Path) -> None:
    graph = Graph({n: WeightTarget(n, (2, 3)) for n in ("fc1.weight", "fc2.weight")})
    scores = Scores(graph, {n: torch.ones(6) for n in graph.targets}, "magnitude")
    path = save_scores(scores, tmp_path / "s")
    targets: dict[str, Target] = {
        "fc1.weight": WeightTarget("fc1.weight", (3, 2)),
        "fc3.weight": WeightTarget("fc3.weight", (4, 1)),
        "fc1:neuron": GroupTarget("fc1:neuron", "neuron", 5, ()),
    }
    with pytest.raises(ConfigError) as caught:
        load_scores(path, Graph(targets))
    assert str(caught.value).splitlines()[1:] == [
        "  fc1.weight: the file has weight (2, 3), the graph weight (3, 2)",
        "  fc2.weight: the file has weight (2, 3), the graph nothing",
        "  fc3.weight: the file has nothing, the graph weight (4, 1)",
    ]
    more = Graph({**graph.targets, "fc1:neuron": targets["fc1:neuron"]})
    assert same(load_scores(path, more), scores)  # of kinds that were not scored there may be more


def test_a_model_that_is_traced_again_takes_its_scores_back(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    scores = score(net, criterion="l2_norm", graph=trace(net, x))
    path = save_scores(scores, tmp_path / "s")
    back = load_scores(path, trace(net, x))
    assert same(back, scores)
    plan = select(back, allocate(back, Budget(units=0.5)))
    assert plan.removed["0:neuron"].tolist() == sorted(scores.values["0:neuron"].argsort()[:3])
    wider = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
    with pytest.raises(
        ConfigError, match=r"0:neuron: the file has neuron \(6,\), the graph neuron"
    ):
        load_scores(path, trace(wider, x))


HEADER: dict[str, Any] = {
    "format": 1, "criterion": "taylor", "notes": [], "n_samples": 0, "not_scored": {},
    "scored": ["a"], "targets": {"a": {"kind": "channel", "shape": [2]}},
}  # fmt: skip
GRAPH = units_graph({"a": 2})


def write(path: Path, values: Mapping[str, Tensor], header: object) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(dict(values), path, {"secateurs.scores": text})
    return path


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "s", {"a": torch.tensor([1.0, 2.0])}, HEADER)
    assert flat(load_scores(path, GRAPH)) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"format": True}, "format True"),
        ({"criterion": 3}, "3' is no text"),
        ({"notes": "abc"}, "no list"),
        ({"notes": [None]}, "no text"),
        ({"n_samples": -1}, "no count"),
        ({"n_samples": 1.5}, "no count"),
        ({"n_samples": True}, "no count"),
        ({"not_scored": ["a"]}, "these are no scores"),
        ({"not_scored": {"a": 1}}, "no text"),
        ({"not_scored": {"z": "why"}}, "do not belong together"),
        ({"scored": ["a", "b"]}, "these are no scores: KeyError"),
        ({"scored": []}, "do not belong together"),
        ({"scored": [["a"]]}, "no text"),
        ({"targets": {}}, "these are no scores"),
        ({"targets": {"a": {"kind": "channel", "shape": [3]}}}, "do not belong together"),
        ({"targets": {"a": {"kind": "channel", "shape": [10**4000, 2]}}}, "not belong together"),
        ({"targets": {"a": {"kind": "channel"}}}, "KeyError"),
        ({"targets": 7}, "these are no scores"),
    ],
)
def test_headers_that_lie(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "s", {"a": torch.ones(2)}, {**HEADER, **change})
    with pytest.raises(FileFormatError, match=message):
        load_scores(path, GRAPH)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (torch.ones(2).half(), "must be float32"),
        (torch.ones(1, 2), "do not belong together"),
        (torch.tensor([1.0, math.nan]), "nan or inf in a"),
    ],
)
def test_tensors_that_are_no_scores(tmp_path: Path, line: Tensor, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        load_scores(write(tmp_path / "s", {"a": line}, HEADER), GRAPH)


@pytest.mark.parametrize("header", ["[" * 100_000, "{", "[]", "null", '{"format": 1' + "0" * 5000])
def test_headers_that_are_none(tmp_path: Path, header: str) -> None:
    with pytest.raises(FileFormatError, match=r"header of the scores is damaged|reads format 1"):
        load_scores(write(tmp_path / "s", {"a": torch.ones(2)}, header), GRAPH)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist or is no file"):
        load_scores(tmp_path, GRAPH)
    path = tmp_path / "s"
    for content in (b"", b"\xff" * 64, pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="truncated or no safetensors file"):
            load_scores(path, GRAPH)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(FileFormatError, match="holds no scores; was it written by save_scores"):
        load_scores(path, GRAPH)


@quick
@given(st.data())
def test_a_damaged_file_is_an_error_of_ours_or_still_scores(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = save_scores(FULL, Path(folder) / "s").read_bytes()
        end = data.draw(st.integers(0, len(whole)))
        if end < len(whole):
            damaged = whole[:end]
        else:
            place = data.draw(st.integers(0, len(whole) - 1))
            byte = bytes([data.draw(st.integers(0, 255))])
            damaged = whole[:place] + byte + whole[place + 1 :]
        path = Path(folder) / "damaged"
        path.write_bytes(damaged)
        try:
            load_scores(path, FULL.graph)
            assert end == len(whole)
        except (FileFormatError, ConfigError):
            pass
