"""Each network of `cases`: the right units, and a smaller model that equals the masked one."""

from __future__ import annotations

import pytest
import torch

from tests.graph.cases import CASES
from tests.graph.nets import n_parameters, plan_of, shrunk, tolerable, traced, units_of


@pytest.mark.parametrize("name", CASES)
def test_units_are_found_and_both_forms_equal_the_masked_model(name: str) -> None:
    case = CASES[name]
    model = case.build()
    graph = traced(model, case.inputs)
    assert units_of(graph) == case.units
    assert not [e for e in graph.excluded if "does not fit this call" in e.reason]

    plan = plan_of(model, graph, 0.5)
    small, info = shrunk(model, plan, case.inputs)
    assert info.form == case.form, info.notes
    assert tolerable(info.verification)
    assert info.verification.changed > 0
    assert n_parameters(small) < n_parameters(model)

    hard = plan_of(model, graph, 0.15)  # down to a single unit where there are few
    small, info = shrunk(model, hard, case.inputs, "graph")
    assert tolerable(info.verification)
    assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["residual", "lstm", "flattened map", "2 groups to 16"])
@pytest.mark.parametrize("units", [0.9, 0.5, 0.15])
def test_double_precision(name: str, units: float) -> None:
    case = CASES[name]
    assert isinstance(case.inputs, torch.Tensor)
    model, x = case.build().double(), case.inputs.double()
    graph = traced(model, x)
    plan = plan_of(model, graph, units)
    for form in ("auto", "graph"):
        _, info = shrunk(model, plan, x, form)
        assert info.verification.dtype == "float64"
        assert info.verification.error < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_decided_in_double(dtype: torch.dtype) -> None:
    """Also the graph form, which has the precision of created states written into it."""
    case = CASES["lstm"]
    assert isinstance(case.inputs, torch.Tensor)
    model, x = case.build().to(dtype), case.inputs.to(dtype)
    plan = plan_of(model, traced(model, x), 0.5)
    for form in ("module", "graph"):
        small, info = shrunk(model, plan, x, form)
        assert tolerable(info.verification)
        assert {p.dtype for p in small.parameters()} == {dtype}


def test_counts_never_leave_a_dimension_empty() -> None:
    """The fewest units that a threshold can leave still run, wherever the pieces are split."""
    case = CASES["uneven chunks"]
    model = case.build()
    graph = traced(model, case.inputs)
    plan = plan_of(model, graph, 0.01)
    small, info = shrunk(model, plan, case.inputs)
    assert tolerable(info.verification)
    assert small.get_parameter("a.weight").shape[0] == 3  # one of each chunk
