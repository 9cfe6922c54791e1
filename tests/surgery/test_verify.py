"""The check that a smaller model is the same function, shown to fail when it is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import CaptureError, ConfigError, SoundnessError
from secateurs.surgery.shrinking import info_of
from secateurs.surgery.verification import Verification, masked_copy, relative_error
from secateurs.types import Plan
from tests.graph.nets import Net, image, plan_of, randomized, rows, shrunk, traced


@pytest.fixture
def cnn() -> tuple[nn.Module, Plan, nn.Module]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    plan = plan_of(model, traced(model, image()))
    return model, plan, sc.shrink(model, plan, image(), form="module")


Cnn = tuple[nn.Module, Plan, nn.Module]


def test_equal_models_pass(cnn: Cnn) -> None:
    model, plan, small = cnn
    found = sc.verify(model, small, plan, image())
    assert found.ok
    assert found.comparable
    assert found.dtype == "float32"
    assert found.error <= 1e-6
    assert found.changed > 1e-3
    assert "equals the masked one" in found.text()


def test_two_swapped_channels_fail(cnn: Cnn) -> None:
    model, plan, small = cnn
    with torch.no_grad():
        weight = small.get_parameter("0.weight")
        weight[[0, 1]] = weight[[1, 0]].clone()
    with pytest.raises(SoundnessError, match="does NOT equal"):
        sc.verify(model, small, plan, image())
    assert not sc.verify(model, small, plan, image(), strict=False).ok


def test_wrong_statistics_fail(cnn: Cnn) -> None:
    model, plan, small = cnn
    small.get_buffer("1.running_mean")[0] += 0.1
    with pytest.raises(SoundnessError):
        sc.verify(model, small, plan, image())


def test_another_plan_fails(cnn: Cnn) -> None:
    model, plan, small = cnn
    other = dict(plan.masks)
    other["0.weight"] = ~other["0.weight"]
    with pytest.raises(SoundnessError):
        sc.verify(model, small, replace(plan, masks=other), image())


def test_a_plan_of_another_model_is_refused(cnn: Cnn) -> None:
    _, plan, _ = cnn
    with pytest.raises(ConfigError, match=r"another model:\n  0\.bias: the plan has \(8,\)"):
        sc.shrink(nn.Sequential(nn.Conv2d(3, 6, 3)), plan, image())


def test_shapes_must_agree(cnn: Cnn) -> None:
    model, plan, _ = cnn
    with pytest.raises(SoundnessError, match="returns shapes"):
        sc.verify(model, nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), plan, image())


def test_a_model_that_refuses_the_inputs_is_named(cnn: Cnn) -> None:
    model, plan, small = cnn
    with pytest.raises(CaptureError, match="the masked model refuses"):
        sc.verify(model, small, plan, rows())
    with pytest.raises(CaptureError, match="the smaller model refuses"):
        sc.verify(model, nn.Linear(5, 5), plan, image())


def test_relative_error_by_hand() -> None:
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.4])
    assert relative_error([a], [b]) == pytest.approx(0.1)
    assert relative_error([a, torch.tensor([1])], [a, torch.tensor([2])]) == float("inf")
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert relative_error([nan, inf], [nan, inf]) == 0
    assert relative_error([nan], [a[:1]]) == float("inf")
    assert relative_error([a[:0]], [a[:0]]) == 0


# -- random draws -------------------------------------------------------------------------


def test_random_draws_inside_are_not_comparable_and_said() -> None:
    net = Net(lambda n, x: n.c(n.a(x) + torch.randn_like(n.a(x))), a=nn.Linear(6, 8),
              c=nn.Linear(8, 4))  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    small, info = shrunk(net, plan, rows())
    text = "not comparable: the model draws random numbers in eval mode"
    assert info.form == "graph"  # the module form is accepted only on evidence
    assert text in info.notes[0]
    assert info.notes[-1] == text
    assert info.verification.ok
    assert not info.verification.comparable
    with pytest.raises(SoundnessError, match="returns shapes"):
        sc.verify(net, nn.Linear(6, 3), plan, rows())
    assert small(rows()).shape == (3, 4)


def test_random_draws_that_do_not_depend_on_units_are_comparable() -> None:
    net = Net(lambda n, x: n.c(F.relu(n.a(x))) + torch.randn(3, 4), a=nn.Linear(6, 8),
              c=nn.Linear(8, 4))  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    for form in ("module", "graph"):
        _, info = shrunk(net, plan, rows(), form)
        assert info.verification.comparable
        assert info.verification.error < 1e-6


# -- precision ---------------------------------------------------------------------------


def test_a_precision_written_into_the_code_is_judged_as_it_is() -> None:
    net = Net(lambda n, x: n.c(F.relu(n.a(x.bfloat16()))), a=nn.Linear(6, 8), c=nn.Linear(8, 4))
    net = net.bfloat16()
    plan = plan_of(net, traced(net, rows()))
    small = sc.shrink(net, plan, rows(), form="module")
    assert info_of(small).verification.ok
    with torch.no_grad():
        small.get_parameter("a.weight")[0] += 0.01
    found = sc.verify(net, small, plan, rows(), strict=False)
    assert (found.dtype, found.tolerance) == ("bfloat16", 5e-2)
    with torch.no_grad():
        small.get_parameter("a.weight")[0] += 5
    assert not sc.verify(net, small, plan, rows(), strict=False).ok


def test_an_infinite_masked_model_is_explained() -> None:
    """exp(0) - 1 = 0 inside a logarithm: too deep for the analysis, caught by the comparison."""
    net = Net(lambda n, x: n.c(torch.log((torch.exp(n.a(x)) - 1).abs())), a=nn.Linear(6, 8),
              c=nn.Linear(8, 4))  # fmt: skip
    plan = plan_of(net, traced(net, rows()))
    with pytest.raises(SoundnessError, match="values that are not finite"):
        sc.shrink(net, plan, rows())


# -- awkward models ----------------------------------------------------------------------


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.a(x)))
        return y

    def __deepcopy__(self, memo: dict[int, Any]) -> Stubborn:
        raise TypeError("handles are open")


def test_a_model_that_refuses_to_be_copied() -> None:
    net = Stubborn()
    plan = plan_of(net, traced(net, rows()))
    for form in ("auto", "graph"):
        with pytest.raises(CaptureError, match=r"copyable by copy\.deepcopy: handles are open"):
            sc.shrink(net, plan, rows(), form=form)


def test_hooks_run_in_both_forms() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    net[2].register_forward_hook(lambda m, i, out: 3 * out)
    plan = plan_of(net, traced(net, rows()))
    for form in ("module", "graph"):
        _, info = shrunk(net, plan, rows(), form)
        assert info.verification.ok


def test_the_masked_copy_is_the_model_with_zeros(cnn: Cnn) -> None:
    model, plan, _ = cnn
    masked = masked_copy(model, plan)
    for name, tensor in masked.state_dict().items():
        mask = plan.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor, model.state_dict()[name] * mask)


def test_module_form_insisted_on() -> None:
    net = randomized(
        Net(lambda n, x: n.c(n.a(x).view(-1, 8)), a=nn.Linear(6, 8), c=nn.Linear(8, 4))
    )
    plan = plan_of(net, sc.trace(net, rows()))
    with pytest.raises(SoundnessError, match='form="graph" rewrites sizes'):
        sc.shrink(net, plan, rows(), form="module")
    with pytest.raises(ConfigError, match="unknown form 'modul'"):
        sc.shrink(net, plan, rows(), form="modul")


def test_a_verification_as_data() -> None:
    found = Verification(0.0, 1e-5, "float32", True, 0.5)
    assert found.to_dict()["ok"] is True
    assert "limit 1e-05 (float32)" in found.to_dict()["text"]


def test_weights_and_structure_together() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    graph = traced(net, rows())
    structure = plan_of(net, graph)
    scores = sc.score(
        net, criterion="magnitude", granularity="weight", graph=graph, previous=structure
    )
    counts = sc.allocate(scores, sc.Threshold("quantile", q=0.5))
    plan = sc.select(scores, counts, previous=structure)
    held = sc.slice_masks(plan)
    for form in ("module", "graph"):
        small, info = shrunk(net, plan, rows(), form)
        assert info.verification.ok
        for name, mask in held.items():
            assert mask.shape == small.get_parameter(name).shape
            assert not small.get_parameter(name)[~mask].any()
    twin = copy.deepcopy(net)
    sc.apply_masks_(twin, plan.masks)  # already masked: the same result
    assert sc.verify(twin, small, plan, rows()).ok
