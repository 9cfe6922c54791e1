"""Per-sample gradients against autograd on one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateurs.batches import call_model
from secateurs.errors import ConfigError, ScoringError
from secateurs.statistics import persample_layers
from secateurs.statistics.persample import PerSample
from secateurs.statistics.persample_layers import layer_of, product_squares
from secateurs.statistics.units import one_sample
from secateurs.statistics.vmapped import vmapped, vmapped_obstacle
from secateurs.types import Batch, LossFn

N = 4


def squared(outputs: Any, targets: Tensor) -> Tensor:
    """A mean over samples that no gradient is constant for."""
    flat = outputs.flatten(1)
    waves = torch.sin(torch.arange(flat.shape[1], dtype=torch.float64) + 1).to(flat.dtype)
    loss: Tensor = ((flat * waves).sum(1) - targets).square().mean()
    return loss


def oracle(model: nn.Module, batch: Batch, loss_fn: LossFn, n: int) -> dict[str, Tensor]:
    """Parameter name -> (n, *shape), one backward pass for each sample."""
    twin = copy.deepcopy(model).requires_grad_(True)
    params = dict(twin.named_parameters(remove_duplicate=False))
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(n):
        inputs, targets = one_sample(batch, i, n)
        loss = loss_fn(call_model(twin, inputs), targets)
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for (name, p), g in zip(params.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g.to_dense())
    return {name: torch.stack(found) for name, found in rows.items()}


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def run(
    samples: PerSample, model: nn.Module, batch: Batch, loss_fn: LossFn, n: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (sum of squares, per-sample gradients), handed over in the backward pass."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if not samples.covered:
        return found

    def each(name: str) -> None:
        found[name] = samples.squares(name), torch.cat(list(samples.chunks(name, max_bytes=1)))

    with samples.running(n, each):
        loss = loss_fn(call_model(model, batch[0]), batch[1])
        torch.autograd.grad(loss, samples.leaves, allow_unused=True)
    return found


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-30)


def check(
    model: nn.Module,
    inputs: Any,
    *,
    missing: tuple[str, ...] = (),
    loss_fn: LossFn = squared,
    n: int = N,
    tolerance: float = 1e-10,
) -> dict[str, str]:
    """Everything but `missing` is covered and equals the oracle; gives the reasons."""
    model.eval().requires_grad_(False)
    batch = (inputs, torch.linspace(-1, 1, n, dtype=torch.float64))
    samples = PerSample(model, names_of(model))
    reasons = samples.probe(batch, loss_fn)
    assert set(reasons) == set(missing), reasons
    assert set(samples.covered) == set(names_of(model)) - set(missing)
    want = oracle(model, batch, loss_fn, n)
    found = run(samples, model, batch, loss_fn, n)
    assert set(found) == set(samples.covered)
    for name, (squares, rows) in found.items():
        assert close(rows, want[name], tolerance), name
        assert close(squares, want[name].square().sum(0), tolerance), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    return reasons


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """Float64, with norm statistics and scales that are not 1 and 0."""
    model = model.double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5 if tensor.dim() == 1 else tensor.data
    return model


class Flat(nn.Module):
    """Something before and after a layer, so that gradients differ between positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x * 1.5)).flatten(1)


# --- layers --------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 5), (N, 3)),
    "linear positions": (lambda: nn.Linear(3, 5), (N, 7, 3)),
    "linear few positions": (lambda: nn.Linear(3, 5), (N, 3, 3)),
    "linear more dims": (lambda: nn.Linear(3, 5, bias=False), (N, 2, 4, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2), (N, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (N, 3, 6, 6)),
    "conv2d large map": (lambda: nn.Conv2d(3, 4, 3, padding=1), (N, 3, 12, 12)),
    "conv2d 1x1 stride": (lambda: nn.Conv2d(3, 4, 1, stride=2), (N, 3, 5, 5)),
    "conv2d 1x1 padded": (lambda: nn.Conv2d(3, 4, 1, padding=1), (N, 3, 5, 5)),
    "conv2d 1x1 large": (lambda: nn.Conv2d(3, 4, 1), (N, 3, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), (N, 4, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=2), (N, 2, 6, 6)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (N, 2, 6, 6)),
    "conv2d reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"),
        (N, 2, 6, 6),
    ),
    "conv2d circular": (
        lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
        (N, 2, 9, 9),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2), (N, 2, 4, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), (N, 2, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        (N, 4, 5, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (N, 2, 3, 3, 3)),
    "batch norm vectors": (lambda: nn.BatchNorm1d(3), (N, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3), (N, 3, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (N, 3, 5, 4)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(3), (N, 3, 2, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(6), (N, 5, 6)),
    "layer norm 2 dims": (lambda: nn.LayerNorm((5, 6), bias=False), (N, 5, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (N, 5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (N, 4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (N, 3, 4, 4)),
    "instance norm tracked": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (N, 3, 4, 4),
    ),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (N, 3, 4)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(3, affine=True), (N, 3, 2, 2, 2)),
    "prelu": (lambda: nn.PReLU(3), (N, 3, 4)),
    "prelu one": (lambda: nn.PReLU(), (N, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_equals_autograd_sample_by_sample(name: str) -> None:
    make, shape = LAYERS[name]
    check(Flat(randomised(make())), x64(*shape))


def test_every_rule_is_tested() -> None:
    made = {type(make()) for make, _ in LAYERS.values()} | {nn.Embedding}
    assert made == set(persample_layers.TABLE)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_on_one_side_only() -> None:
    check(Flat(nn.Conv2d(2, 3, (2, 4), padding="same").double()), x64(N, 2, 6, 6))


class Table(nn.Module):
    def __init__(self, padding_idx: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, padding_idx=padding_idx)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.table(x))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx: int | None) -> None:
    check(Table(padding_idx).double(), torch.tensor([[0, 2, 2], [1, 1, 1], [4, 0, 4], [2, 2, 3]]))


def test_hand_checkable_values() -> None:
    model = nn.Linear(2, 1)
    model.requires_grad_(False)
    batch = (torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]]), torch.zeros(2))

    def total(outputs: Tensor, _: Tensor) -> Tensor:
        return outputs.sum((1, 2)).mean()

    samples = PerSample(model, ["weight", "bias"])
    assert samples.probe(batch, total) == {}
    with samples.running(2):
        torch.autograd.grad(total(model(batch[0]), batch[1]), samples.leaves)
    assert torch.cat(list(samples.chunks("weight"))).tolist() == [[[3, 0]], [[0, 0]]]
    assert samples.squares("weight").tolist() == [[9, 0]]
    assert samples.squares("bias").tolist() == [8]  # two positions each: 2^2 + 2^2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions_of_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    dims, groups = draw(1, 3), draw(1, 3)
    transposed = data.draw(st.booleans())
    kernel = tuple(draw(1, 3) for _ in range(dims))
    dilation = tuple(draw(1, 2) for _ in range(dims))
    stride = tuple(draw(1, 3) for _ in range(dims))
    padding = tuple(draw(0, (k - 1) * d // 2) for k, d in zip(kernel, dilation, strict=True))
    kinds: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if transposed:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    conv = kinds[dims - 1](
        groups * draw(1, 2),
        groups * draw(1, 2),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=data.draw(st.booleans()),
    )
    size = tuple(draw(5, 7 if dims == 3 else 10) for _ in range(dims))
    check(Flat(conv.double()), x64(N, conv.in_channels, *size))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    t=st.integers(1, 9),
    out=st.integers(1, 6),
    width=st.integers(1, 6),
    block=st.sampled_from([8, 64, 2**20]),
)
def test_squares_of_products(n: int, t: int, out: int, width: int, block: int) -> None:
    left, right = x64(n, out, t), x64(n, t, width)
    want = torch.einsum("not,nti->noi", left, right).square().sum(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(persample_layers.BLOCK_BYTES, "cpu", block)
        assert close(product_squares(left, right), want, 1e-12)


# --- models --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """In-place operations after layers and on a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.first(x)))
        z = self.second(y)
        z += y
        z[:, 1:] *= 2
        out: Tensor = self.head(z.mul_(2).mean((2, 3)))
        return out.mul_(3)


def test_in_place_operations_after_a_layer_spoil_nothing() -> None:
    check(randomised(Residual()), x64(N, 3, 4, 4))


class Spoiled(nn.Module):
    """Changes what the layer has read: autograd itself can give the gradient of the bias only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.spoil = nn.Linear(3, 3), nn.Linear(3, 2), True

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.fc(x)
        if self.spoil:
            x += 1
        out: Tensor = self.head(y)
        return out


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    model = Spoiled().double().requires_grad_(False)
    batch = (x64(N, 3), torch.linspace(-1, 1, N, dtype=torch.float64))
    samples = PerSample(model, ["fc.bias", "head.weight"])
    assert "changed in place" in samples.probe(batch, squared)["fc.bias"]
    assert samples.covered == ("head.weight",)


def test_a_change_in_place_that_the_probe_did_not_see_is_an_error() -> None:
    model = Spoiled()
    model.spoil = False
    samples, batch = ready(model)
    model.spoil = True
    with pytest.raises(ScoringError, match="changed in place"):
        run(samples, model, batch, squared, N)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(3, 3), nn.Conv1d(3, 3, 1)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.fc(x))
        x = self.conv(torch.sin(self.conv(x[:, :, None])))[:, :, 0]
        out: Tensor = self.tied(x)
        return out


def test_calls_of_reused_and_tied_layers_are_summed() -> None:
    check(Reused().double(), x64(N, 3))


class TiedTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.table(x)))
        return out


def test_an_embedding_tied_to_the_output() -> None:
    check(TiedTable().double(), torch.randint(0, 7, (N, 5)))


class Layouts(nn.Module):
    """Windows in the first dimension, frames first, and a table that is looked up once for all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.windows = nn.Embedding(4, 3), nn.Linear(3, 3)
        self.conv, self.frames = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        x = x + self.table(torch.arange(t)[None])
        x = torch.tanh(self.windows(x.reshape(n * t, d)))
        x = torch.tanh(self.norm(self.conv(x.reshape(n * 2, t // 2, d).transpose(1, 2))))
        x = x.transpose(1, 2).reshape(n, t, d).transpose(0, 1)
        out: Tensor = torch.tanh(self.frames(x)).transpose(0, 1)
        return out


def test_samples_in_other_places() -> None:
    check(randomised(Layouts()), x64(N, 4, 3))


class Shuffled(nn.Module):
    """(positions * n, features): the samples are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        x = torch.tanh(self.fc(x.transpose(0, 1).reshape(t * n, d)))
        out: Tensor = self.after(x.reshape(t, n, d).transpose(0, 1))
        return out


@pytest.mark.parametrize("t", [3, N])
def test_interleaved_samples_are_refused(t: int) -> None:
    reasons = check(Shuffled().double(), x64(N, t, 3), missing=("fc.weight", "fc.bias"))
    assert "differs from autograd for sample 0" in reasons["fc.weight"]


def test_a_flattened_layout_without_gradient_is_not_proven() -> None:
    model = Shuffled().double()
    samples = PerSample(model, names_of(model))

    def middle(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.square().sum((1, 2)) * targets).mean()

    batch = (x64(N, 3, 3), torch.tensor([0.0, 1.0, 2.0, 0.0]))
    reasons = samples.probe(batch, middle)
    assert set(reasons) == {"fc.weight", "fc.bias"}
    assert "could prove" in reasons["fc.weight"]


class Bias(nn.Module):
    """A table that nothing says which sample it is for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(torch.arange(3)[:, None].expand(3, 3) % 2).sum((0, 1))
        out: Tensor = self.fc(x) + bias
        return out


def test_a_layer_without_samples_is_refused() -> None:
    reasons = check(Bias().double(), x64(N, 2), missing=("table.weight",))
    assert "do not begin with the samples" in reasons["table.weight"]


class Repeated(Bias):
    """Its output is repeated by hand: n times what is there already would be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(torch.zeros(1, dtype=torch.long)).repeat(len(x), 1)
        out: Tensor = self.fc(x) + bias
        return out


def test_a_shared_output_that_cannot_be_spread_is_refused() -> None:
    reasons = check(Repeated().double(), x64(N, 2), missing=("table.weight",))
    assert "once for all samples" in reasons["table.weight"]


class CustomNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * (1 + self.scale) - 2 * self.shift


class ChannelNorm(nn.Module):
    """Channels first, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def test_a_custom_norm_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), ChannelNorm(), nn.Tanh(), nn.Conv2d(3, 2, 2))
    check(model.double(), x64(N, 2, 3, 3))  # as many channels as columns


class CustomCurve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(3) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.a)


class Conv1D(nn.Module):
    """The transposed linear layer of GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_custom_scales_are_covered_where_they_are_affine() -> None:
    model = nn.Sequential(Conv1D(3, 4), CustomNorm(), CustomCurve(), nn.Linear(3, 2)).double()
    reasons = check(model, x64(N, 5, 4), missing=("2.a",))
    assert "not affine in a" in reasons["2.a"]


class Functional(nn.Module):
    """One parameter by itself, one used beside its module, a recurrence, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.fc = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.gru, self.head = nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0] @ self.own
        x = torch.tanh(self.fc(x)) @ self.fc.weight
        out: Tensor = self.head(self.gru(x)[0])
        return out


MISSING = (
    "own",
    "fc.weight",
    *(f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias")),
    *(f"attention.out_proj.{n}" for n in ("weight", "bias")),
    *(f"gru.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
)


def test_what_hooks_cannot_see_is_named_and_vectorised() -> None:
    model, inputs = Functional().double(), x64(N, 4, 3)
    reasons = check(model, inputs, missing=MISSING)
    assert "recurrent" in reasons["gru.weight_hh_l0"]
    assert "no rule" in reasons["own"]
    assert "outside the forward" in reasons["fc.weight"]
    batch = (inputs, torch.linspace(-1, 1, N, dtype=torch.float64))
    assert vmapped_obstacle(model, batch, squared, MISSING) == ""
    want = oracle(model, batch, squared, N)
    chunks = list(vmapped(model, batch, squared, MISSING, max_bytes=2000))
    assert len(chunks) > 1
    for name in MISSING:
        assert close(torch.cat([c[name] for c in chunks]), want[name], 1e-10)


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.rnn: nn.RNNBase = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](
            3, 2, **options
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0])
        return out


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("only", ["rnn", "head"])
def test_recurrent_layers_are_vectorised(kind: str, only: str) -> None:
    model = Recurrent(kind).double()
    batch = (x64(N, 4, 3), torch.linspace(-1, 1, N, dtype=torch.float64))
    names = [name for name in names_of(model) if name.startswith(only)]
    assert vmapped_obstacle(model, batch, squared, names) == ""
    want = oracle(model, batch, squared, N)
    (chunk,) = vmapped(model, batch, squared, names)
    assert list(chunk) == names
    assert all(close(chunk[name], want[name], 1e-10) for name in names)


class Branch(nn.Module):
    def __init__(self, cut: float = 0.0) -> None:
        super().__init__()
        self.fc, self.cut = nn.Linear(2, 2), cut

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > self.cut:
            x = x @ self.fc.weight
        return x * 2 + self.fc.bias


def test_control_flow_that_depends_on_the_data_is_not_vectorised() -> None:
    batch = (x64(N, 2), torch.zeros(N, dtype=torch.float64))
    assert "cannot be vectorised" in vmapped_obstacle(
        Branch().double(), batch, squared, ["fc.bias"]
    )
    with pytest.raises(ScoringError, match="cannot be vectorised"):
        list(vmapped(Branch().double(), batch, squared, ["fc.bias"]))


# --- losses, modes, precision --------------------------------------------------------------------


def test_a_loss_that_is_no_mean_over_samples_is_refused() -> None:
    def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
        weights = targets + 2
        return (outputs.sum(1).square() * weights).sum() / weights.sum()

    reasons = check(
        nn.Linear(3, 2).double(), x64(N, 3), missing=("weight", "bias"), loss_fn=weighted
    )
    assert "not the mean of the losses of its samples" in reasons["weight"]


def test_batch_norm_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3)).double().train()
    before = copy.deepcopy(model.state_dict())
    batch = (x64(N, 3, 5), torch.zeros(N, dtype=torch.float64))
    reasons = PerSample(model, names_of(model)).probe(batch, squared)
    assert set(reasons) == set(names_of(model))
    assert "from the batch" in reasons["1.weight"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    inputs = torch.randn(N, 3, 4, 4)
    batch = (inputs, torch.linspace(-1, 1, N))
    want = oracle(model.double(), (inputs.double(), batch[1].double()), squared, N)
    model = model.to(dtype).requires_grad_(False)
    batch = (inputs.to(dtype), batch[1].to(dtype))
    samples = PerSample(model, names_of(model))
    assert samples.probe(batch, squared) == {}
    for name, (squares, rows) in run(samples, model, batch, squared, N).items():
        assert squares.dtype == rows.dtype == torch.float32
        assert close(rows.double(), want[name], 1e-5 if dtype == torch.float32 else 0.1)


def test_autocast() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    inputs, targets = torch.randn(N, 6), torch.linspace(-1, 1, N)
    want = oracle(model, (inputs, targets), squared, N)
    model.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = PerSample(model, names_of(model))
        assert samples.probe((inputs, targets), squared) == {}
        found = run(samples, model, (inputs, targets), squared, N)
    for name, (squares, rows) in found.items():
        assert squares.dtype == torch.float32
        assert close(rows, want[name], 0.05)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(checkpoint(self.body, x, use_reentrant=False))
        return out


def test_a_recomputed_forward_counts_once() -> None:
    check(randomised(Checkpointed()), x64(N, 5, 3))


def test_inputs_by_keyword_and_several() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.fc(input=a * b)
            return out

    check(Two().double(), {"a": x64(N, 3), "b": x64(N, 3)})
    check(Two().double(), (x64(N, 3), x64(N, 3)))


# --- the pass ------------------------------------------------------------------------------------


def ready(model: nn.Module, n: int = N) -> tuple[PerSample, Batch]:
    model.double().eval().requires_grad_(False)
    batch = (x64(n, 3), torch.linspace(-1, 1, n, dtype=torch.float64))
    samples = PerSample(model, names_of(model))
    assert samples.probe(batch, squared) == {}
    return samples, batch


def test_batches_of_another_size_and_results_after_the_run() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    samples, _ = ready(model)
    batch = (x64(3, 3), torch.zeros(3, dtype=torch.float64))
    want = oracle(model, batch, squared, 3)
    with samples.running(3):
        torch.autograd.backward(squared(model(batch[0]), batch[1]))
    for name in samples.covered:
        assert close(samples.squares(name), want[name].square().sum(0), 1e-10)
        sizes = [len(c) for c in samples.chunks(name, max_bytes=2 * 8 * want[name][0].numel())]
        assert sizes == [2, 1]


def test_weight_gradients_beside_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    samples, batch = ready(model)
    params = dict(model.named_parameters())
    want = oracle(model, batch, squared, N)
    model.requires_grad_(True)
    found = {}
    with samples.running(N, lambda name: found.update({name: samples.squares(name)})):
        loss = squared(model(batch[0]), batch[1])
        leaves = [*params.values(), *samples.leaves]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    for name, grad in zip(params, grads, strict=False):
        assert grad is not None
        assert close(grad, want[name].mean(0), 1e-10)
        assert close(found[name], want[name].square().sum(0), 1e-10)


def test_a_parameter_that_is_not_differentiated_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    samples, batch = ready(model)
    model.requires_grad_(True)

    def partial() -> None:
        with samples.running(N):
            loss = squared(model(batch[0]), batch[1])
            leaves = [*model[2].parameters(), *samples.leaves]
            torch.autograd.grad(loss, leaves, allow_unused=True)

    with pytest.raises(ScoringError, match="no gradient arrived"):
        partial()


def test_unused_layers_count_as_zero() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.dropped, self.never = (nn.Linear(3, 3) for _ in range(3))
            self.outside = False

        def forward(self, x: Tensor) -> Tensor:
            self.dropped(x)
            x = x @ self.never.weight if self.outside else x
            out: Tensor = self.fc(x)
            return out

    model = Unused()
    samples, batch = ready(model)
    found = run(samples, model, batch, squared, N)
    assert found["dropped.weight"][0].abs().sum() == 0
    assert found["never.weight"][1].shape == (N, 3, 3)
    assert not model.never.weight.requires_grad
    model.outside = True
    with pytest.raises(ScoringError, match="outside the forward of its module, though not"):
        run(samples, model, batch, squared, N)
    assert not model.never.weight.requires_grad


def test_misuse_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="unknown parameter"):
        PerSample(model, ["0.wieght"])
    with pytest.raises(ConfigError, match="no probe"), PerSample(model, []).running(2):
        pass
    samples, batch = ready(model, n=1)
    with pytest.raises(ConfigError, match="more than one sample"), samples.running(2):
        pass
    samples, batch = ready(model)
    with pytest.raises(ScoringError, match="no gradient arrived"), samples.running(N):
        model(batch[0])
    with pytest.raises(ScoringError, match="does not fit"), samples.running(N - 1):
        model(batch[0])
    with samples.running(N, lambda _: None):
        torch.autograd.backward(squared(model(batch[0]), batch[1]), retain_graph=True)
    with pytest.raises(ConfigError, match="handed over"):
        samples.squares("0.weight")
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_go_after_an_exception() -> None:
    model = nn.Linear(3, 2)
    samples, batch = ready(model)
    with pytest.raises(ZeroDivisionError), samples.running(N):
        raise ZeroDivisionError
    assert not model._forward_hooks

    def explode(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), samples.running(N, explode):
        torch.autograd.backward(squared(model(batch[0]), batch[1]))
    assert not model._forward_hooks


# --- the checkers fail when they should ----------------------------------------------------------


def test_a_wrong_rule_is_caught_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = persample_layers.LINEAR

    def wrong(module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
        return linear.grads(module, name, x, g, n) * (1.01 if name == "weight" else 1)

    monkeypatch.setitem(persample_layers.TABLE, nn.Linear, persample_layers.Layer(wrong, rows=True))
    for dtype in (torch.float64, torch.float32):
        model = nn.Linear(3, 2).to(dtype)
        samples = PerSample(model, ["weight", "bias"])
        batch = (x64(N, 3).to(dtype), torch.zeros(N, dtype=dtype))
        assert list(samples.probe(batch, squared)) == ["weight"]
        assert samples.covered == ("bias",)


def test_the_oracle_fails_on_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = persample_layers.LINEAR

    def wrong(module: nn.Module, name: str, x: Tensor, g: Tensor, n: int) -> Tensor:
        assert right.squares is not None
        return right.squares(module, name, x, g, n) * (1 + 1e-9)

    monkeypatch.setitem(
        persample_layers.TABLE, nn.Linear, persample_layers.Layer(right.grads, wrong, rows=True)
    )
    with pytest.raises(AssertionError, match="weight"):
        check(nn.Linear(3, 2).double(), x64(N, 3))


def test_the_vectorised_path_is_compared_with_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = (x64(N, 3), torch.zeros(N, dtype=torch.float64))
    name = "secateurs.statistics.vmapped.plain_gradients"
    monkeypatch.setattr(name, lambda m, *_: {id(m.weight): torch.ones_like(m.weight)})
    why = vmapped_obstacle(nn.Linear(3, 2).double(), batch, squared, ["weight"])
    assert "sample 0 differs from autograd" in why


def test_a_subclass_with_its_own_forward_has_no_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert layer_of(Doubled(2, 2)) is None
    assert layer_of(nn.Linear(2, 2)) is persample_layers.LINEAR
