"""The pass itself: sums that merge, passes that resume, and models as people have them."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateurs.errors import ConfigError, FileFormatError, ScoringError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics import Sums
from secateurs.types import Scores
from tests.graphs import Case, conv, lstm, mlp, residual

CRITERIA: list[Any] = [
    "taylor", "taylor_batch", "gradient", "activation_mean", "directional", "finite_difference",
    {"name": "taylor", "members": "all"},
]  # fmt: skip


def scores(case: Case, **options: Any) -> dict[str, dict[str, Tensor]]:
    found = score(
        case.model, case.batches, case.loss_fn, criterion=CRITERIA, graph=case.graph, **options
    )
    return {label: dict(s.values) for label, s in found.items()}


def same(a: Any, b: Any) -> bool:
    return all(torch.allclose(a[c][t], b[c][t], rtol=1e-6, atol=0.0) for c in a for t in a[c])


# -- sums ----------------------------------------------------------------------------------


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=50)
def test_parts_merge_to_the_whole(numbers: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(numbers)))
    whole, left, right = Sums(), Sums(), Sums()
    for i, number in enumerate(numbers):
        for sums in (whole, left if i < cut else right):
            sums.add("sum", torch.tensor([float(number)]), weight=2)
            sums.append("rows", torch.tensor([[number]]))
    left.merge(right)
    assert left["sum"].equal(whole["sum"])
    assert left["rows"].equal(whole["rows"])
    assert left.n_rows("rows") == len(numbers)


def test_state_is_everything() -> None:
    sums = Sums()
    view = sums.under("taylor/")
    view.add("a", torch.tensor([1.0, 2.0]))
    view.add_product("a", torch.tensor([2.0, 2.0]), torch.tensor([1.0, 3.0]), weight=2)
    view.append("b", torch.tensor([[1], [2]]))
    again = Sums()
    again.load(sums.state())
    assert again["taylor/a"].tolist() == [5, 14]
    assert again["taylor/b"].tolist() == [[1], [2]]
    assert list(again) == ["taylor/a", "taylor/b"] == list(sums)
    with pytest.raises(ConfigError, match="no sum and no rows"):
        again.load({"other": torch.zeros(1)})


def test_half_precision_is_summed_in_single() -> None:
    sums = Sums()
    for _ in range(1000):
        sums.add("x", torch.ones(1, dtype=torch.bfloat16))
    assert sums["x"].item() == 1000  # bfloat16 would stop at 256


# -- an interrupted pass ---------------------------------------------------------------------


class Stop(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.parametrize("make", [mlp, conv, lstm, residual])
@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_pass_gives_the_same(make: Any, at: int, tmp_path: Path) -> None:
    path, case = tmp_path / "pass", make()
    seen: list[int] = []

    def stop(done: int, total: int | None) -> None:
        seen.append(done)
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        scores(case, resume=path, progress=stop)
    assert path.exists()
    resumed = scores(case, resume=path, progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3]
    assert not path.exists()
    whole = scores(case)
    assert all(torch.equal(resumed[c][t], whole[c][t]) for c in whole for t in whole[c])


def test_a_resumed_pass_is_told_from_another(tmp_path: Path) -> None:
    path, case = tmp_path / "pass", mlp()

    def stop(done: int, total: int | None) -> None:
        raise Stop

    with pytest.raises(Stop):
        scores(case, resume=path, progress=stop)
    with pytest.raises(ConfigError, match=r"belongs to another pass: seed differ\. Delete it"):
        scores(case, resume=path, seed=1)
    other = copy.deepcopy(case.model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ConfigError, match="weights differ"):
        scores(Case(other, case.graph, case.batches, case.loss_fn), resume=path)
    with pytest.raises(ConfigError, match="first batch"):
        scores(Case(case.model, case.graph, case.batches[::-1], case.loss_fn), resume=path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FileFormatError, match="Delete it to start again"):
        scores(case, resume=path)


KILLED = """
import sys, torch
from pathlib import Path
import secateurs.scoring as scoring
from tests.graphs import mlp
scoring.SAVE_EVERY = 0.0
case = mlp()
def progress(done, total):
    print(done, flush=True)
    if done == 2 and len(sys.argv) > 2:
        sys.stdin.read()
found = scoring.score(case.model, case.batches, case.loss_fn, criterion="taylor", graph=case.graph,
                      resume=Path(sys.argv[1]), progress=progress)
print({n: v.tolist() for n, v in found.values.items()})
"""


def test_a_killed_pass_resumes(tmp_path: Path) -> None:
    path, root = tmp_path / "pass", Path(__file__).parent.parent
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(
        [*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    ) as child:
        assert child.stdout is not None
        assert [child.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
        child.send_signal(signal.SIGKILL)
    assert path.exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    numbers, last = again.stdout.splitlines()[:-1], again.stdout.splitlines()[-1]
    assert numbers in (["2", "3"], ["3"])  # killed before or after the second batch was written
    case = mlp()
    whole = score(case.model, case.batches, case.loss_fn, criterion="taylor", graph=case.graph)
    assert json.loads(last.replace("'", '"')) == {n: v.tolist() for n, v in whole.values.items()}
    assert os.listdir(tmp_path) == []


# -- which batches ---------------------------------------------------------------------------


def test_batches_drawn_at_random() -> None:
    case = mlp()
    drawn = scores(case, sample_batches=2, seed=3)
    pairs = [
        scores(Case(case.model, case.graph, [case.batches[i] for i in only], case.loss_fn))
        for only in ([0, 1], [0, 2], [1, 2])
    ]
    assert sum(same(drawn, pair) for pair in pairs) == 1
    assert same(scores(case, sample_batches=9), scores(case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_batches": 0}, "sample_batches must be at least 1"),
        ({"sample_batches": 1, "max_batches": 1}, "give max_batches"),
        ({"mode": "evil"}, "Did you mean 'eval'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores(mlp(), **options)


def test_drawing_needs_a_length() -> None:
    case = mlp()

    class Endless:
        def __getitem__(self, i: int) -> Any:
            return case.batches[i]

    endless = Case(case.model, case.graph, Endless(), case.loss_fn)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="use max_batches"):
        scores(endless, sample_batches=2)
    assert same(scores(endless, max_batches=3), scores(case))


# -- modes and precisions ----------------------------------------------------------------------


def test_train_mode_uses_the_statistics_of_the_batch_and_moves_none() -> None:
    case = conv()
    before = [b.clone() for b in case.model.buffers()]

    def directional(mode: Any) -> Scores:
        return score(
            case.model, case.batches, case.loss_fn, graph=case.graph, mode=mode,
            criterion="directional",
        )  # fmt: skip

    name = "0:channel"
    assert not torch.equal(directional("train").values[name], directional("eval").values[name])
    assert all(map(torch.equal, before, case.model.buffers()))
    with pytest.raises(ConfigError, match=r"1 mixes the samples of a batch.*\(taylor, taylor\("):
        scores(case, mode="train")
    x, y = case.batches[0]
    model = copy.deepcopy(case.model).train()
    loss = case.loss_fn(model(x), y)
    (grad,) = torch.autograd.grad(loss, [model.get_parameter("1.weight")])
    one = Case(case.model, case.graph, [case.batches[0]], case.loss_fn)
    found = score(
        one.model, one.batches, one.loss_fn, criterion="gradient", graph=case.graph, mode="train"
    )
    (bias,) = torch.autograd.grad(case.loss_fn(model(x), y), [model.get_parameter("1.bias")])
    weights = torch.autograd.grad(
        case.loss_fn(model(x), y), [model.get_parameter("0.weight"), model.get_parameter("0.bias")]
    )
    expected = grad.abs() + bias.abs() + weights[0].abs().flatten(1).sum(1) + weights[1].abs()
    torch.testing.assert_close(found.values["0:channel"], expected.float())


@pytest.mark.parametrize("make", [mlp, conv, residual])
def test_autocast_is_near(make: Any) -> None:
    """Two batches: the cache of cast weights must not outlive the graph of the first."""
    case = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        near = scores(case)
    for label, held in scores(case).items():
        for name, values in held.items():
            scale = float(values.abs().max())
            error = 0.3 if label == "finite_difference" else 0.15
            torch.testing.assert_close(near[label][name], values, rtol=0.2, atol=error * scale)


# -- activation checkpointing, tied weights ------------------------------------------------------


class Checkpointed(nn.Module):
    """The second half of a network is run again in the backward pass."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net = case.model

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.net, nn.Sequential)
        first, second = self.net[:2], self.net[2:]
        out: Tensor = checkpoint(second, first(x), use_reentrant=False)
        return out


def test_checkpointing_changes_nothing() -> None:
    plain = mlp()
    case = Checkpointed(plain)
    graph = trace(nn.ModuleDict({"net": plain.model})["net"], plain.batches[0][0])
    wrapped = trace(case, plain.batches[0][0])
    assert wrapped.units == {f"net.{n}": k for n, k in graph.units.items()}
    outer = scores(Case(case, wrapped, plain.batches, plain.loss_fn))
    inner = scores(Case(plain.model, graph, plain.batches, plain.loss_fn))
    for label, held in inner.items():
        for name, values in held.items():
            torch.testing.assert_close(outer[label][f"net.{name}"], values)


class Twice(nn.Module):
    """One layer, called twice inside of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        def inside(h: Tensor) -> Tensor:
            out: Tensor = self.c(torch.relu(self.b(torch.relu(self.b(h)))))
            return out

        out: Tensor = checkpoint(inside, torch.relu(self.a(x)), use_reentrant=False)
        return out


def test_a_module_called_twice_in_a_checkpoint_is_refused() -> None:
    torch.manual_seed(0)
    model, plain = Twice().double(), mlp()
    graph = trace(model, plain.batches[0][0])
    assert "a:neuron" in graph.units
    with pytest.raises(ScoringError, match=r"b is called 2 times .* switch checkpointing off"):
        score(model, plain.batches, plain.loss_fn, graph=graph)


# -- several criteria made one -----------------------------------------------------------------


def test_combined_criteria_share_the_pass() -> None:
    case = conv()
    seen: list[int] = []
    both = {"combine": "rank", "of": ["taylor", "magnitude"], "weights": [2, 1]}
    found = score(
        case.model, case.batches, case.loss_fn, criterion=[both, "taylor"], graph=case.graph,
        progress=lambda done, _: seen.append(done),
    )  # fmt: skip
    assert list(found) == ["rank(2*taylor, 1*magnitude)", "taylor"]
    assert seen == [1, 2, 3]
    parts = [
        score(case.model, case.batches, case.loss_fn, criterion=c, graph=case.graph)
        for c in ("taylor", "magnitude")
    ]
    ranks = [p.values["0:channel"].argsort().argsort() + 1.0 for p in parts]
    expected = (2 * ranks[0] + ranks[1]) / 3 / 4
    torch.testing.assert_close(found["rank(2*taylor, 1*magnitude)"].values["0:channel"], expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"combine": "rnk", "of": ["taylor", "magnitude"]}, "Did you mean 'rank'"),
        ({"combine": "rank", "of": ["taylor"]}, "two or more criteria"),
        ({"combine": "rank", "of": "taylor"}, "two or more criteria"),
        ({"combine": "rank", "of": ["taylor", "magnitud"]}, "Did you mean 'magnitude'"),
        ({"combine": "rank", "of": ["taylor", "magnitude"], "weights": [1]}, "must be 2 numbers"),
        ({"combine": "rank", "of": ["taylor", "magnitude"], "weights": [-1, 1]}, "not negative"),
        ({"combine": "rank", "of": ["taylor", "magnitude"], "weigths": [1, 1]}, "Did you mean 'we"),
    ],
)
def test_combinations_that_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(mlp().model, criterion=spec)
