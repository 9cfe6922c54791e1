"""Norms that go on to count what was removed: exact, kept in files, settled on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.errors import ConfigError, FileFormatError
from secateurs.surgery.padded import PaddedLayerNorm
from secateurs.surgery.settling import has_padded, settle
from secateurs.surgery.shrinking import info_of
from tests.graph.nets import Net, gap, image, outputs, plan_of, randomized, rows, shrunk

operators = torch.ops.secateurs
KEPT = [0, 2, 4]


def holed() -> Tensor:
    """(3, 5, 6) float64, zero at positions 1 and 3 of dim 1."""
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x[:, [1, 3]] = 0
    return x


def test_operators_equal_the_dense_ones_over_zeros() -> None:
    x = holed()
    small = x[:, KEPT]
    last = x.transpose(1, 2).contiguous()
    w, b = torch.randn(2, 5, dtype=torch.float64)
    for dense, padded in (
        (F.layer_norm(x, [5, 6])[:, KEPT],
         operators.padded_layer_norm(small, [3, 6], None, None, 1e-5, 30)),
        (F.layer_norm(last, [5], w, b)[..., KEPT],
         operators.padded_layer_norm(last[..., KEPT], [3], w[KEPT], b[KEPT], 1e-5, 5)),
        (F.rms_norm(x, [5, 6])[:, KEPT],
         operators.padded_rms_norm(small, [3, 6], None, None, 30)),
        (F.group_norm(x, 1, w, b)[:, KEPT],
         operators.padded_group_norm(small, 1, w[KEPT], b[KEPT], 1e-5, 5)),
        (x.var(1), operators.padded_var(small, [1], 1.0, False, 3, 5)),
        (x.var((0, 1), keepdim=True), operators.padded_var(small, [0, 1], 1.0, True, 3, 5)),
        (x.mean(1), operators.kept_share(small.mean(1), 0.6)),
    ):  # fmt: skip
        assert torch.allclose(dense, padded, atol=1e-12)


def test_operators_differentiate() -> None:
    x = holed()[:, KEPT].requires_grad_()
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    fn = operators.padded_group_norm
    assert torch.autograd.gradcheck(lambda x, w: fn(x, 1, w, w, 1e-5, 5), (x, w))


def test_low_precision_is_summed_in_float32() -> None:
    x = (100 + torch.randn(4, 64)).to(torch.bfloat16)
    found = operators.padded_layer_norm(x, [64], None, None, 1e-5, 64)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found, F.layer_norm(x, [64]), atol=0.05)


def normed() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8),
                        nn.RMSNorm(8), nn.Linear(8, 4))  # fmt: skip
    return randomized(net)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_exact_saved_loaded_and_settled(form: str, tmp_path: Path) -> None:
    net = normed()
    plan = plan_of(net, sc.trace(net, rows()))
    small, info = shrunk(net, plan, rows(), form)
    assert info.verification.error < 1e-6
    assert list(small.state_dict()) == list(net.state_dict())
    assert has_padded(small)
    sc.save(small, plan, tmp_path / "exact")
    loaded = sc.load(tmp_path / "exact", normed)
    assert torch.equal(outputs(small, rows())[0], outputs(loaded, rows())[0])
    before = outputs(small, rows())[0]
    plain, settled = settle(loaded, rows())
    assert settled.n_norms == 2
    assert settled.difference == pytest.approx(gap(small, plain, rows()))
    assert settled.difference > 1e-3
    assert not has_padded(plain)
    assert torch.equal(before, outputs(loaded, rows())[0])  # a copy was settled


def test_what_a_padded_module_is() -> None:
    net = normed()
    plan = plan_of(net, sc.trace(net, rows()))
    small, info = shrunk(net, plan, rows(), "module")
    norm = small.get_submodule("1")
    assert type(norm) is PaddedLayerNorm
    assert "n_dense=8" in repr(norm)
    assert info.attributes["1"] == {"normalized_shape": 4, "n_dense": 8}
    again = plan_of(small, sc.trace(small, rows()))  # a second round: the dense size stays
    twice, found = shrunk(small, again, rows(), "module")
    assert found.verification.ok
    assert twice.get_submodule("1").n_dense == 8
    third, found = shrunk(small, again, rows(), "graph")
    assert gap(twice, third, rows()) < 1e-6
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(rows()).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("form", ["auto", "module", "graph"])
def test_plain_on_request(form: str, tmp_path: Path) -> None:
    net = normed()
    plan = plan_of(net, sc.trace(net, rows()))
    small = sc.shrink(net, plan, rows(), form=form, norm="plain")
    info = info_of(small)
    assert info.settled is not None
    assert info.settled > 1e-3
    assert "2 norms and means count only what is left" in info.notes[-1]
    assert not has_padded(small)
    if form != "graph":
        assert type(small.get_submodule("1")) is nn.LayerNorm
    sc.save(small, plan, tmp_path / "plain")
    loaded = sc.load(tmp_path / "plain", normed)
    assert torch.equal(outputs(small, rows())[0], outputs(loaded, rows())[0])
    assert info_of(loaded).settled == info.settled
    with pytest.raises(ConfigError, match="unknown norm 'simple'"):
        sc.shrink(net, plan, rows(), norm="simple")


def test_plain_in_the_users_class_where_exact_needs_the_graph() -> None:
    """The mean of a hand-written norm is over what is left: only the plain one is this code."""
    net = Net(
        lambda n, x: n.c(n.g * n.a(x) * torch.rsqrt(n.a(x).pow(2).mean(-1, keepdim=True) + 1e-6)),
        a=nn.Linear(6, 8), g=nn.Parameter(torch.ones(8)), c=nn.Linear(8, 4),
    )  # fmt: skip
    randomized(net)
    plan = plan_of(net, sc.trace(net, rows()))
    assert info_of(sc.shrink(net, plan, rows())).form == "graph"
    plain = sc.shrink(net, plan, rows(), norm="plain")
    assert info_of(plain).form == "module"
    assert isinstance(plain, Net)


def test_groups_of_channels_and_single_ones() -> None:
    for groups, expected in ((4, {"num_channels": 4, "num_groups": 2}),
                             (1, {"num_channels": 4, "n_dense": 8})):  # fmt: skip
        net = Net(
            lambda n, x: n.h(n.n(n.a(x)).mean((2, 3))), a=nn.Conv2d(3, 8, 3),
            n=nn.GroupNorm(groups, 8), h=nn.Linear(8, 4),
        )  # fmt: skip
        randomized(net)
        plan = plan_of(net, sc.trace(net, image()))
        _, info = shrunk(net, plan, image(), "module")
        assert info.attributes["n"] == expected


def test_the_dense_size_in_a_file_is_for_norms_only(tmp_path: Path) -> None:
    import json

    net = normed()
    plan = plan_of(net, sc.trace(net, rows()))
    sc.save(sc.shrink(net, plan, rows(), form="module"), plan, tmp_path / "a")
    path = tmp_path / "a" / "plan.json"
    data: dict[str, Any] = json.loads(path.read_text())
    data["attributes"]["0"]["n_dense"] = 8
    path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match=r"attribute 0\.n_dense"):
        sc.load(tmp_path / "a", normed)
