"""Layers as products: inputs times matrix is what the module makes, for every kind of module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from secateurs.posttraining import layers as room
from secateurs.posttraining.inputs import quiet, watch_calls
from secateurs.posttraining.layers import Call, Layer, flat, layers_of, product

IMAGE = (3, 4, 7, 6)
MODULES: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "linear": (nn.Linear(5, 4), (torch.randn(3, 2, 5),)),
    "no bias": (nn.Linear(5, 4, bias=False), (torch.randn(3, 5),)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=3), (torch.randn(2, 4, 9),)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (torch.randn(IMAGE),)),
    "one image": (nn.Conv2d(4, 6, 3), (torch.randn(IMAGE[1:]),)),
    "same": (nn.Conv2d(4, 6, 4, padding="same"), (torch.randn(IMAGE),)),
    "circular": (nn.Conv2d(4, 2, 3, padding=2, padding_mode="circular"), (torch.randn(IMAGE),)),
    "reflect": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), (torch.randn(IMAGE),)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (torch.randn(IMAGE),)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (torch.randn(IMAGE),)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (torch.randn(2, 2, 3, 4, 3),)),
    "up": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), (torch.randn(IMAGE),)),
    "up more": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 2), groups=2),
        (torch.randn(IMAGE),),
    ),
    "up wide": (nn.ConvTranspose1d(4, 3, 2, dilation=3, padding=4), (torch.randn(2, 4, 9),)),
    "up to": (nn.ConvTranspose1d(4, 3, 3, stride=2), (torch.randn(2, 4, 5), [12])),
}


def calls(module: nn.Module, args: tuple[Any, ...]) -> list[tuple[Layer, Call]]:
    """Each layer of a module with the call of one run."""
    seen: list[Call] = []
    dtype = next(module.parameters()).dtype
    args = tuple(a.to(dtype) if torch.is_tensor(a) else a for a in args)
    with quiet(module):
        watch_calls(module, args, {"": 1}, lambda path, call: seen.append(call))
    return [(layer, seen[0]) for layer in layers_of(module)]


def computed(layer: Layer, call: Call) -> Tensor:
    """(rows, out) from the product."""
    held = dict(call.module.named_parameters())
    bias = None if layer.bias is None else layer.line(held[layer.bias])
    with torch.no_grad():
        parts = [flat(product(x, layer.matrix(held[layer.weight]), bias)) for x in layer.rows(call)]
        return torch.cat(parts)


for each, _ in MODULES.values():
    each.double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", MODULES)
def test_the_product_is_what_the_module_makes(name: str) -> None:
    module, args = MODULES[name]
    ((layer, call),) = calls(module, args)
    assert layer.made is not None
    torch.testing.assert_close(computed(layer, call), layer.made(call), atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", MODULES)
def test_place_is_the_inverse_of_matrix(name: str) -> None:
    ((layer, call),) = calls(*MODULES[name])
    weight = call.module.weight.detach()
    new = torch.full_like(weight, float("nan"))
    layer.place(new, layer.matrix(weight))
    assert torch.equal(new, weight)


def test_small_parts_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ((layer, call),) = calls(*MODULES["grouped"])
    whole = torch.cat(list(layer.rows(call)), 1)
    monkeypatch.setattr(room, "MAX_ELEMENTS", 1)
    parts = list(layer.rows(call))
    assert len(parts) == 3
    assert torch.equal(torch.cat(parts, 1), whole)


def test_conv1d_of_transformers_is_a_transposed_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    module: Any = Conv1D(4, 5).double()  # type: ignore[no-untyped-call]
    ((layer, call),) = calls(module, (torch.randn(3, 5).double(),))
    torch.testing.assert_close(computed(layer, call), call.output)
    new = torch.zeros(5, 4).double()
    layer.place(new, layer.matrix(module.weight.detach()))
    assert torch.equal(new, module.weight)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_seen_before_and_behind_its_heads(batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first).double()
    q, k = torch.randn(3, 3, 4).double(), torch.randn(3, 3, 4).double()
    found = calls(module, (q, k, k))
    assert [layer.name for layer, _ in found[:2]] == ["in_proj_weight[0:4]", "in_proj_weight[4:8]"]
    wanted = nn.functional.linear(k, module.in_proj_weight[4:8], module.in_proj_bias[4:8])
    torch.testing.assert_close(computed(*found[1]), wanted.reshape(-1, 4))
    layer, call = found[3]
    assert layer.name == "out_proj.weight"
    torch.testing.assert_close(computed(layer, call), call.output[0].reshape(-1, 4))


@pytest.mark.parametrize("given", [False, True])
def test_the_states_that_a_recurrent_layer_reads(given: bool) -> None:
    torch.manual_seed(0)
    module = nn.RNN(3, 2, batch_first=True, bidirectional=True).double()
    x, start = torch.randn(4, 5, 3).double(), torch.randn(2, 4, 2).double()
    found = {layer.weight: (layer, call) for layer, call in calls(module, (x, start)[: 1 + given])}
    for back, suffix in enumerate(("", "_reverse")):
        layer, call = found[f"weight_ih_l0{suffix}"]
        inputs = computed(layer, call).view(4, 5, 2).transpose(0, 1)  # (n, time) -> (time, n)
        states = computed(*found[f"weight_hh_l0{suffix}"]).view(5, 4, 2)
        made = call.output[0][..., 2 * back : 2 * back + 2].transpose(0, 1)
        torch.testing.assert_close(torch.tanh(inputs + states), made)


def test_packed_sequences_have_the_states_of_the_sequences_alone() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 2, bidirectional=True).double()
    lengths = [2, 4, 1]
    alone = [torch.randn(n, 3).double() for n in lengths]
    x = nn.utils.rnn.pad_sequence(alone)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    for index in (1, 3):  # states, forward and back
        layer, call = calls(module, (packed,))[index]
        seen = torch.cat(list(layer.rows(call)), 1)
        each = [calls(module, (one,))[index] for one in alone]
        rows = torch.cat([torch.cat(list(one.rows(run)), 1) for one, run in each], 1)
        assert seen.shape == rows.shape == (1, 7, 2)
        order = [torch.argsort(t[0, :, 0]) for t in (seen, rows)]
        torch.testing.assert_close(seen[0][order[0]], rows[0][order[1]])


def test_levels_inside_a_kernel_are_no_layers() -> None:
    assert layers_of(nn.LSTM(3, 2, num_layers=2)) == []
    assert layers_of(nn.LSTM(3, 4, proj_size=2)) == []


def test_a_half_precision_layer_is_read_in_float32() -> None:
    ((layer, call),) = calls(nn.Linear(3, 2).bfloat16(), (torch.randn(4, 3).bfloat16(),))
    assert next(layer.rows(call)).dtype == torch.float32
