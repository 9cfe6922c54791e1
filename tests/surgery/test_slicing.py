"""Slicing tensors by hand, and the sizes that modules record."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateurs.errors import SoundnessError
from secateurs.surgery.slicing import fix_sizes, kept_groups, slice_module_, sliced

KEEP = torch.tensor([0, 2])


def test_sliced_by_hand() -> None:
    t = torch.arange(12.0).reshape(3, 4)
    assert sliced(t, {0: KEEP, 1: torch.tensor([3])}).tolist() == [[3.0], [11.0]]
    whole = sliced(t, {})
    whole[0] = 0
    assert t[0, 1] == 1  # a copy


def test_slicing_keeps_order_ties_dtype_and_frozenness() -> None:
    first, second = nn.Linear(4, 3).double(), nn.Linear(4, 3)
    first.weight.requires_grad_(False)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    names = list(net.state_dict())
    slice_module_(net, {"0.weight": {0: KEEP}, "1.bias": {0: KEEP}})
    assert list(net.state_dict()) == names
    assert first.weight is second.weight
    assert first.weight.shape == (2, 4)
    assert first.weight.dtype == torch.float64
    assert not first.weight.requires_grad
    assert (first.bias.shape, second.bias.shape) == ((3,), (2,))


def test_a_recurrent_layer_sees_its_new_weights() -> None:
    layer = nn.RNN(2, 3, bias=False)
    slice_module_(layer, {"weight_ih_l0": {0: KEEP}, "weight_hh_l0": {0: KEEP, 1: KEEP}})
    changed = fix_sizes(layer, nn.RNN(2, 3, bias=False), {})
    assert changed == {"": {"hidden_size": 2}}
    assert layer._flat_weights[0] is layer.weight_ih_l0
    assert layer(torch.zeros(1, 1, 2))[0].shape == (1, 1, 2)


@pytest.mark.parametrize(
    ("rows", "dense", "groups", "left"),
    [
        ([0, 1, 2, 3], 4, 2, 2),  # nothing went
        ([2, 3], 4, 2, 1),  # a whole group went
        ([0, 2], 4, 2, 2),  # one of each
        ([1, 3], 4, 4, 2),  # depthwise
        ([0, 1, 4, 5], 8, 4, 2),  # depthwise with a multiplier of two
        ([0, 1, 4, 5], 8, 2, 2),  # two of each
        ([0], 1, 1, 1),
    ],
)
def test_kept_groups(rows: list[int], dense: int, groups: int, left: int) -> None:
    assert kept_groups(torch.tensor(rows), dense, groups) == left


def test_sizes_of_grouped_convolutions_also_under_a_tied_name() -> None:
    def build() -> nn.Module:
        a, b = nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 1, groups=4)
        b.weight, b.bias = a.weight, a.bias
        return nn.Sequential(a, b)

    dense, small = build(), build()
    kept = {"0.weight": {0: KEEP}, "0.bias": {0: KEEP}}
    slice_module_(small, kept)
    sizes = {"out_channels": 2, "in_channels": 2, "groups": 2}
    assert fix_sizes(small, dense, kept) == {"0": sizes, "1": sizes}
    assert small(torch.zeros(1, 2, 1, 1)).shape == (1, 2, 1, 1)


@pytest.mark.parametrize(
    "kept",
    [
        {"weight": {0: torch.tensor([0, 3])}},
        {"weight": {2: KEEP}},
        {"weight": {0: torch.tensor([-1, 0])}},
        {"weight": {0: torch.tensor([], dtype=torch.int64)}},
    ],
)
def test_positions_outside_are_refused(kept: dict[str, dict[int, torch.Tensor]]) -> None:
    with pytest.raises(SoundnessError, match="the plan keeps positions"):
        slice_module_(nn.Linear(4, 3), kept)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SoundnessError, match=r"does not have: \['wait'\]"):
        slice_module_(nn.Linear(4, 3), {"wait": {0: KEEP}})
