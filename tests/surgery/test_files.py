"""Saved results come back bit-identical; damaged or hostile files are refused and run nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import ConfigError, FileFormatError, SoundnessError
from secateurs.surgery.files import load_plan
from secateurs.surgery.graph_file import _resolve
from secateurs.surgery.shrinking import info_of
from secateurs.types import Plan
from tests.graph.nets import Net, outputs, plan_of, randomized, sequence, traced

Json = dict[str, Any]


def build() -> nn.Module:
    net = Net(
        lambda n, x: {"y": n.h(F.relu(n.bn(n.r(x)[0].transpose(1, 2))).mean(2)), "n": (None,)},
        r=nn.LSTM(4, 6, batch_first=True), bn=nn.BatchNorm1d(6), h=nn.Linear(6, 3),
    )  # fmt: skip
    net.register_buffer("scale", torch.ones(2), persistent=False)
    return net


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Plan]:
    model = build()
    graph = traced(model, sequence())
    structure = plan_of(model, graph)
    scores = sc.score(
        model, criterion="magnitude", granularity="weight", graph=graph, previous=structure
    )
    counts = sc.allocate(scores, sc.Threshold("quantile", q=0.4))
    return model, sc.select(scores, counts, previous=structure)


@pytest.fixture(scope="module", params=["module", "graph"])
def saved(
    request: pytest.FixtureRequest, made: tuple[nn.Module, Plan], tmp_path_factory: Any
) -> tuple[nn.Module, Plan, Path]:
    model, plan = made
    small = sc.shrink(model, plan, sequence(), form=request.param)
    return small, plan, sc.save(small, plan, tmp_path_factory.mktemp("saved") / "out")


Saved = tuple[nn.Module, Plan, Path]


def factory_of(path: Path) -> Callable[[], nn.Module] | None:
    return None if (path / "graph.json").exists() else build


def test_bit_identical(saved: Saved) -> None:
    small, _, path = saved
    loaded = sc.load(path, factory_of(path))
    assert loaded.training is small.training
    for seed in range(3):
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        for a, b in zip(outputs(small, x), outputs(loaded, x), strict=True):
            assert torch.equal(a, b)
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert info_of(loaded).form == info_of(small).form
    assert info_of(loaded).verification.ok
    assert not list(path.glob("*.part"))
    assert not list(path.glob("*.pkl"))


def test_a_loaded_model_trains(saved: Saved) -> None:
    loaded = sc.load(saved[2], factory_of(saved[2])).train()
    before = loaded.get_buffer("bn.running_mean").clone()
    loaded(sequence())["y"].sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    assert not torch.equal(before, loaded.get_buffer("bn.running_mean"))


def test_the_plan_comes_back_with_its_masks(saved: Saved) -> None:
    _, plan, path = saved
    back = load_plan(path)
    assert back.masks.keys() == plan.masks.keys()
    assert all(torch.equal(back.masks[n], plan.masks[n]) for n in plan.masks)
    assert back.kept.keys() == plan.kept.keys()
    assert all(
        torch.equal(back.kept[n][d], index)
        for n, dims in plan.kept.items()
        for d, index in dims.items()
    )
    assert back.granularity == plan.granularity
    assert back.reasons == plan.reasons
    assert back.removed["r:hidden"].tolist() == plan.removed["r:hidden"].tolist()


def test_nothing_is_overwritten_without_force(saved: Saved) -> None:
    small, plan, path = saved
    with pytest.raises(ConfigError, match="already holds a pruned model"):
        sc.save(small, plan, path)
    sc.save(small, plan, path, force=True)


def test_what_cannot_be_saved(made: tuple[nn.Module, Plan], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was not made by secateurs\.shrink"):
        sc.save(made[0], made[1], tmp_path / "a")

    class Extra(nn.Linear):
        def get_extra_state(self) -> str:
            return "notes"

        def set_extra_state(self, state: str) -> None:
            pass

    net = nn.Sequential(Extra(4, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = plan_of(net, traced(net, sequence()))
    small = sc.shrink(net, plan, sequence(), form="module")
    with pytest.raises(ConfigError, match=r"0\._extra_state"):
        sc.save(small, plan, tmp_path / "b")


def test_other_precisions_and_ties_survive(tmp_path: Path) -> None:
    def build_tied() -> nn.Module:
        a, b = nn.Linear(8, 8), nn.Linear(8, 8)
        b.weight = a.weight
        return nn.Sequential(nn.Linear(4, 8), a, nn.ReLU(), b, nn.ReLU(), nn.Linear(8, 2))

    net = randomized(build_tied()).double()
    x = sequence().double()
    plan = plan_of(net, sc.trace(net, x))
    for form in ("module", "graph"):
        small = sc.shrink(net, plan, x, form=form)
        sc.save(small, plan, tmp_path / form)
        loaded = sc.load(tmp_path / form, build_tied)
        assert torch.equal(outputs(small, x)[0], outputs(loaded, x)[0])
        assert loaded.get_parameter("1.weight") is loaded.get_parameter("3.weight")


def test_factories(saved: Saved) -> None:
    path = saved[2]
    if (path / "graph.json").exists():
        return
    with pytest.raises(ConfigError, match="pass factory="):
        sc.load(path)
    with pytest.raises(
        SoundnessError, match=r"r\.weight_ih_l0: saved \(24, 4\), factory \(20, 4\)"
    ):
        sc.load(path, lambda: Net(lambda n, x: x, r=nn.LSTM(4, 5)))
    with pytest.raises(ConfigError, match="factory must return a torch module, got int"):
        sc.load(path, lambda: 3)  # type: ignore[arg-type,return-value]


# -- damage ------------------------------------------------------------------------------


def edited(path: Path, name: str, change: Callable[[Json], object], to: Path) -> Path:
    """A copy of a saved directory in which one JSON file was changed."""
    to.mkdir(exist_ok=True)
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    data = json.loads((path / name).read_text())
    change(data)
    (to / name).write_text(json.dumps(data))
    return to


def test_truncated_files(saved: Saved, tmp_path: Path) -> None:
    path = saved[2]
    for file in path.iterdir():
        whole = file.read_bytes()
        for share in (0.0, 0.5, 0.99):
            target = edited(path, "plan.json", lambda data: None, tmp_path / "cut")
            (target / file.name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(FileFormatError):
                sc.load(target, factory_of(path))
        (target / file.name).unlink()
        with pytest.raises(FileFormatError, match="does not exist"):
            sc.load(target, factory_of(path))
    with pytest.raises(FileFormatError, match="does not exist; is this a directory"):
        sc.load(tmp_path / "nowhere")


def set_at(*keys: Any, value: Any) -> Callable[[Json], object]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


HH = ("kept", "r.weight_hh_l0")
HOSTILE_PLANS: dict[str, Callable[[Json], object]] = {
    "outside": set_at(*HH, "1", value=[0, 99]),
    "negative": set_at(*HH, "1", value=[-1, 2]),
    "huge": set_at(*HH, "1", value=[0, 2**70]),
    "float": set_at(*HH, "1", value=[0.5]),
    "text": set_at(*HH, "1", value="all"),
    "empty": set_at(*HH, "1", value=[]),
    "twice": set_at(*HH, "1", value=[1, 1]),
    "nested": set_at(*HH, "1", value=[[0], [1]]),
    "dimension": set_at(*HH, "7", value=[0]),
    "dimension name": set_at(*HH, "one", value=[0]),
    "kept list": set_at("kept", value=[1]),
    "unknown tensor": set_at("kept", "ghost", value={"0": [0]}),
    "no shapes": set_at("shapes", value=None),
    "other version": set_at("format", value=2),
    "true version": set_at("format", value=True),
    "removed": set_at("removed", "r:hidden", value=["x"]),
    "notes": set_at("notes", value=3),
    "verification": set_at("verification", value={"error": "much"}),
    "no form": lambda data: data.pop("form"),
}


@pytest.mark.parametrize("name", HOSTILE_PLANS)
def test_hostile_plans(name: str, saved: Saved, tmp_path: Path) -> None:
    path = saved[2]
    bad = edited(path, "plan.json", HOSTILE_PLANS[name], tmp_path / "bad")
    with pytest.raises((FileFormatError, ConfigError)) as error:
        sc.load(bad, factory_of(path))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("shape", [[2**40, 6], [24], [2**20, 2**20]])
def test_a_plan_cannot_ask_for_memory(shape: list[int], saved: Saved, tmp_path: Path) -> None:
    change = set_at("shapes", "r.weight_hh_l0", value=shape)
    bad = edited(saved[2], "plan.json", change, tmp_path / "bad")
    with pytest.raises(FileFormatError):
        load_plan(bad)


@pytest.mark.parametrize(
    "attributes",
    [
        {"r": {"ghost": 3}}, {"ghost": {"hidden_size": 3}}, {"r": {"hidden_size": "3"}},
        {"r": {"hidden_size": -3}}, {"r": {"hidden_size": True}}, {"r": {"training": 1}},
        {"r": {"__class__": 3}}, {"r": {"forward": 3}}, {"h": {"hidden_size": 3}}, [1], {"r": [1]},
    ],
)  # fmt: skip
def test_attributes_that_are_none(attributes: Any, saved: Saved, tmp_path: Path) -> None:
    path = saved[2]
    if (path / "graph.json").exists():
        return
    bad = edited(path, "plan.json", set_at("attributes", value=attributes), tmp_path / "bad")
    with pytest.raises(FileFormatError, match="attribute"):
        sc.load(bad, build)


# -- a hostile graph -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph_dir(made: tuple[nn.Module, Plan], tmp_path_factory: Any) -> Path:
    small = sc.shrink(made[0], made[1], sequence(), form="graph")
    return sc.save(small, made[1], tmp_path_factory.mktemp("graph") / "out")


def first_call(data: Json) -> Json:
    found: Json = next(n for n in data["graphs"]["eval"] if n["op"] == "call_function")
    return found


def target(name: str) -> Callable[[Json], object]:
    return lambda data: first_call(data).update(target=name)


def spec_with(kind: str, context: Any) -> Callable[[Json], object]:
    def change(data: Json) -> None:
        protocol, schema = json.loads(data["in_spec"])
        schema.update(type=kind, context=context)
        data["in_spec"] = json.dumps([protocol, schema])

    return change


CODE = "x); import os; os.system('touch owned'"
ENUM = json.dumps({"__enum__": True, "fqn": "antigravity:X", "name": "Y"})
HOSTILE_GRAPHS: dict[str, Callable[[Json], object]] = {
    "system": target("os.system"),
    "file": target("aten.from_file.default"),
    "dunder": target("aten.add.__class__"),
    "packet": target("aten.add.__init__"),
    "namespace": target("aten.__class__.mro"),
    "prims": target("prims.add.default"),
    "eval": target("eval"),
    "unchecked index": target("aten._unsafe_index.Tensor"),
    "set": target("aten.set_.source_Tensor"),
    "own namespace": target("secateurs.padded_evil.default"),
    "region operator": target("cond"),
    "region name": lambda data: data.update(regions={"a.b-c": []}),
    "region place": lambda data: data.update(regions={"__class__": 3}),
    "region node": lambda data: data.update(
        regions={"a": [{"op": "call_method", "name": "x", "target": "y", "args": [], "kwargs": {}}]}
    ),
    "node kind": lambda data: first_call(data).update(op="call_module"),
    "method": lambda data: first_call(data).update(op="call_method", target="__reduce__"),
    "node name": lambda data: first_call(data).update(name=CODE),
    "keyword name": lambda data: first_call(data).update(kwargs={CODE: 1}),
    "argument name": lambda data: data.update(arguments=[CODE]),
    "reserved word": lambda data: data.update(arguments=["class"]),
    "placeholder": lambda data: next(
        n for n in data["graphs"]["eval"] if n["op"] == "placeholder"
    ).update(target=CODE),
    "attribute": lambda data: next(
        n for n in data["graphs"]["eval"] if n["op"] == "get_attr"
    ).update(target="__class__.__init__.__globals__"),
    "argument kind": lambda data: first_call(data).update(args=[{"call": "os.system"}]),
    "unknown node": lambda data: first_call(data).update(args=[{"node": "ghost"}]),
    "unknown name": lambda data: first_call(data).update(args=[{"named": "dtype:os"}]),
    "two kinds": lambda data: first_call(data).update(args=[{"node": "x", "float": "1"}]),
    "import by enumeration": spec_with("builtins.dict", ENUM),
    "import by factory": spec_with(
        "collections.defaultdict",
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []},
    ),
    "import in a list": spec_with("builtins.dict", f"[{ENUM}]"),
    "unknown container": spec_with("os.Popen", "null"),
    "spec": lambda data: data.update(in_spec=3),
    "constant": lambda data: data.update(
        constants={"scale": {"dtype": "float32", "shape": [2**40], "data": [1.0]}}
    ),
    "tensor": lambda data: data["tensors"].update(ghost={"parameter": True, "requires_grad": True}),
    "parameter name": lambda data: data["tensors"].update(
        {"r..x": {"parameter": True, "requires_grad": True}}
    ),
    "version": lambda data: data.update(format=9),
    "no graphs": lambda data: data.update(graphs={}),
    "graphs": lambda data: data.update(graphs=3),
    "deep": lambda data: first_call(data).update(args=json.loads("[" * 300 + "]" * 300)),
}


@pytest.mark.parametrize("name", HOSTILE_GRAPHS)
def test_hostile_graphs(
    name: str, graph_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = edited(graph_dir, "graph.json", HOSTILE_GRAPHS[name], tmp_path / "bad")
    with pytest.raises(FileFormatError):
        sc.load(bad)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]  # nothing was run


def test_operators_of_the_networks_resolve() -> None:
    assert _resolve("aten.linear.default") is torch.ops.aten.linear.default
    assert _resolve("aten._unsafe_view.default") is torch.ops.aten._unsafe_view.default
    assert _resolve("aten.relu_.default") is torch.ops.aten.relu_.default
    assert _resolve("getitem") is not None


def test_a_region_comes_back(tmp_path: Path) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = net.frozen(x)
        y: torch.Tensor = net.c(F.relu(net.a(h)))
        return y

    net = Net(forward, frozen=nn.Linear(4, 4), a=nn.Linear(4, 8), c=nn.Linear(8, 2))
    plan = plan_of(net, traced(net, sequence()))
    small = sc.shrink(net, plan, sequence(), form="graph")
    loaded = sc.load(sc.save(small, plan, tmp_path / "out"))
    assert torch.equal(outputs(small, sequence())[0], outputs(loaded, sequence())[0])
