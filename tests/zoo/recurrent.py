"""Recurrent layers and cells, and causal convolutions over sequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from secateurs.types import Inputs
from tests.zoo.blocks import case, conv_bn, image, tokens, vectors
from tests.zoo.case import Case

__all__ = ["CASES"]

RNNS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Tagger(nn.Module):
    """Batch-first layers of one kind; every step is labelled."""

    def __init__(self, kind: str, layers: int, both: bool = False, **options: Any) -> None:
        super().__init__()
        make = RNNS[kind]
        self.rnn = make(9, 16, layers, batch_first=True, bidirectional=both, **options)
        self.fc = nn.Linear(32 if both else 16, 5)

    def forward(self, x: Tensor) -> Any:
        out, _ = self.rnn(x)
        return self.fc(out)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(9, 24, 2, batch_first=True, proj_size=12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.lstm(x)[0][:, -1, :])


class TextClassifier(nn.Module):
    """The last hidden states of both directions, joined; the starting state made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 20, num_layers=2, dropout=0.1, bidirectional=True)
        self.fc1, self.fc2 = nn.Linear(40, 24), nn.Linear(24, 4)

    def forward(self, ids: Tensor) -> Any:
        x = self.embedding(ids).permute(1, 0, 2)
        h0 = next(self.parameters()).new_zeros(4, ids.size(0), 20)
        _, (h_n, _) = self.lstm(x, (h0, torch.zeros_like(h0)))
        h = torch.cat((h_n[-2, :, :], h_n[-1, :, :]), dim=1)
        return self.fc2(torch.relu(self.fc1(h)))


class LastState(nn.Module):
    """All final states of a stack, flattened, and the last output."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(7, 12, 3, batch_first=True)
        self.state = nn.Linear(3 * 12, 16)
        self.head = nn.Linear(16 + 12, 3)

    def forward(self, x: Tensor) -> Any:
        out, h_n = self.gru(x)
        state = torch.tanh(self.state(h_n.transpose(0, 1).reshape(x.size(0), -1)))
        return self.head(torch.cat([state, out[:, -1]], dim=-1))


class CarriedState(nn.Module):
    """Starts from a state computed from a context and gives the final one back."""

    def __init__(self) -> None:
        super().__init__()
        self.init_h, self.init_c = nn.Linear(6, 16), nn.Linear(6, 16)
        self.inp = nn.Linear(8, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor, context: Tensor) -> Any:
        h0 = torch.tanh(self.init_h(context)).unsqueeze(0)
        c0 = self.init_c(context).unsqueeze(0)
        y, (_, c) = self.lstm(F.relu(self.inp(x)), (h0, c0))
        return self.out(y + c.transpose(0, 1))


class Packed(nn.Module):
    """Sequences of different lengths, packed and padded again, masked mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = RNNS[kind](8, 14, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(28, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.size(1))
        return self.fc(out.sum(dim=1) / lengths.unsqueeze(1))


class CellLoop(nn.Module):
    """Two cells in a loop over time with states made by size."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        cells: dict[str, Callable[[int, int], nn.Module]]
        cells = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
        self.kind, self.hidden = kind, 16
        self.inp = nn.Linear(6, 12)
        self.cell1, self.cell2 = cells[kind](12, 16), cells[kind](16, 16)
        self.fc = nn.Linear(16, 3)

    def step(self, cell: nn.Module, x: Tensor, state: list[Tensor]) -> list[Tensor]:
        if self.kind == "lstm":
            return list(cell(x, (state[0], state[1])))
        return [cell(x, state[0])]

    def forward(self, x: Tensor) -> Any:
        s1 = [x.new_zeros(x.size(0), self.hidden) for _ in range(2)]
        s2 = [torch.zeros(x.size(0), self.hidden, dtype=x.dtype) for _ in range(2)]
        outputs = []
        for t in range(x.size(1)):
            s1 = self.step(self.cell1, F.leaky_relu(self.inp(x[:, t, :])), s1)
            s2 = self.step(self.cell2, s1[0], s2)
            outputs.append(s2[0])
        return self.fc(torch.stack(outputs, dim=1))


class HandLSTM(nn.Module):
    """The gates written out: one product for input and state, four chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h = nn.Linear(7, 4 * 12), nn.Linear(12, 4 * 12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        h = c = x.new_zeros(x.shape[0], 12)
        for step in x.unbind(1):
            gates = self.x2h(step) + self.h2h(h)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.fc(h)


class CRNN(nn.Module):
    """Convolutions squeeze the height, an LSTM reads the width, log-probabilities per step."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            conv_bn(1, 16), nn.MaxPool2d(2), conv_bn(16, 24), nn.MaxPool2d((4, 1)), conv_bn(24, 20)
        )
        self.rnn = nn.LSTM(20 * 2, 16, 2, bidirectional=True)
        self.fc = nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Any:
        conv = self.cnn(x)
        b, c, h, w = conv.size()
        seq = conv.permute(3, 0, 1, 2).contiguous().view(w, b, c * h)
        out, _ = self.rnn(seq)
        t, b, n = out.size()
        return self.fc(out.view(t * b, n)).view(t, b, -1).log_softmax(2)


class TemporalBlock(nn.Module):
    """Dilated convolutions padded on both sides and cut on the right."""

    def __init__(self, n_in: int, n_out: int, dilation: int) -> None:
        super().__init__()
        pad = 2 * dilation
        self.pad = pad
        weight_norm = parametrizations.weight_norm
        self.conv1 = weight_norm(nn.Conv1d(n_in, n_out, 3, padding=pad, dilation=dilation))
        self.conv2 = nn.Conv1d(n_out, n_out, 3, padding=pad, dilation=dilation)
        self.downsample = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x: Tensor) -> Any:
        out = F.relu(self.conv1(x)[:, :, : -self.pad].contiguous())
        out = F.relu(self.conv2(out)[..., : -self.pad])
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(out + res)


class TCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [TemporalBlock(5, 16, 1), TemporalBlock(16, 16, 2), TemporalBlock(16, 24, 4)]
        self.network, self.linear = nn.Sequential(*blocks), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.network(x.transpose(1, 2))[:, :, -1])


class WaveNet(nn.Module):
    """Gated causal convolutions, residuals, and a sum of skips."""

    def __init__(self, n: int = 16, skip: int = 20) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, n, 1)
        self.dilations = [1, 2, 4]
        self.filters = nn.ModuleList(nn.Conv1d(n, 14, 2, dilation=d) for d in self.dilations)
        self.gates = nn.ModuleList(nn.Conv1d(n, 14, 2, dilation=d) for d in self.dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(14, n, 1) for _ in self.dilations)
        self.skips = nn.ModuleList(nn.Conv1d(14, skip, 1) for _ in self.dilations)
        self.end1, self.end2 = nn.Conv1d(skip, 24, 1), nn.Conv1d(24, 6, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.start(x)
        total: Tensor | int = 0
        for i, d in enumerate(self.dilations):
            padded = F.pad(x, (d, 0))
            z = torch.tanh(self.filters[i](padded)) * torch.sigmoid(self.gates[i](padded))
            total = total + self.skips[i](z)
            x = x + self.residuals[i](z)
        return self.end2(F.relu(self.end1(F.relu(torch.as_tensor(total)))))


class TiedLSTM(nn.Module):
    """A language model; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(32, 16)
        self.rnn = nn.LSTM(16, 16, 2, dropout=0.2)
        self.decoder = nn.Linear(16, 32)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids: Tensor) -> Any:
        out, _ = self.rnn(self.drop(self.encoder(ids.t())))
        decoded = self.decoder(self.drop(out)).view(-1, 32)
        return F.log_softmax(decoded, dim=1)


class MaxOverTime(nn.Module):
    """The strongest value of every feature of a bidirectional GRU over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(25, 12)
        self.gru = nn.GRU(12, 16, batch_first=True, bidirectional=True)
        self.fc1, self.fc2 = nn.Linear(32, 20), nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Any:
        out, _ = self.gru(self.embedding(ids))
        pooled = F.max_pool1d(out.permute(0, 2, 1), out.size(1)).squeeze(2)
        return self.fc2(F.relu(self.fc1(pooled)))


class Hierarchical(nn.Module):
    """Words to sentences to a document: a GRU over the final states of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(25, 12)
        self.words = nn.GRU(12, 14, batch_first=True, bidirectional=True)
        self.sentences = nn.GRU(28, 16, batch_first=True)
        self.attention = nn.Linear(16, 10)
        self.context = nn.Parameter(torch.randn(10))
        self.fc = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Any:
        b, s, w = ids.shape
        _, h = self.words(self.embedding(ids.view(b * s, w)))
        h = h.transpose(0, 1).contiguous().view(b, s, 2 * 14)
        out, _ = self.sentences(h)
        scores = torch.matmul(torch.tanh(self.attention(out)), self.context)
        alpha = torch.softmax(scores, dim=1).unsqueeze(-1)
        return self.fc((alpha * out).sum(dim=1))


class Stacked(nn.Module):
    """Layers of different widths with norms and a residual between them."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn1, self.rnn2 = nn.GRU(8, 20, batch_first=True), nn.LSTM(20, 20, batch_first=True)
        self.rnn3 = nn.RNN(20, 12, batch_first=True, nonlinearity="relu")
        self.norm, self.bn = nn.LayerNorm(20), nn.BatchNorm1d(20)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        a = self.norm(self.rnn1(x)[0])
        b = a + self.rnn2(a)[0]
        b = self.bn(b.transpose(1, 2)).transpose(1, 2)
        return self.fc(self.rnn3(b)[1].squeeze(0))


class ConvLSTM(nn.Module):
    """A convolutional cell over frames: one convolution makes all gates."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(2 + hidden, 4 * hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, 2, 1)

    def forward(self, frames: Tensor) -> Any:
        b, t, _, height, width = frames.shape
        h = torch.zeros(b, self.hidden, height, width)
        c = torch.zeros_like(h)
        for i in range(t):
            gates = self.conv(torch.cat([frames[:, i], h], dim=1))
            cc_i, cc_f, cc_o, cc_g = torch.split(gates, self.hidden, dim=1)
            c = torch.sigmoid(cc_f) * c + torch.sigmoid(cc_i) * torch.tanh(cc_g)
            h = torch.sigmoid(cc_o) * torch.tanh(c)
        return self.out(h)


def projected() -> nn.Module:
    """Called once here: the first call of a process warns that it does not use oneDNN."""
    model = Projected()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model(torch.zeros(1, 1, 9))
    return model


def carried() -> Inputs:
    return torch.randn(2, 5, 8), torch.randn(2, 6)


def ragged() -> Inputs:
    return torch.randn(2, 6, 8), torch.tensor([4, 6])


def tagger(name: str, kind: str, layers: int, both: bool = False, **options: Any) -> Case:
    return case(name, lambda: Tagger(kind, layers, both, **options), vectors(6, 9))


CASES = [
    tagger("lstm", "lstm", 1),
    tagger("lstm-three", "lstm", 3),
    tagger("lstm-bidirectional", "lstm", 2, both=True),
    tagger("lstm-no-bias", "lstm", 1, bias=False),
    case("lstm-projection", projected, vectors(6, 9)),
    tagger("gru", "gru", 1),
    tagger("gru-two-bidirectional", "gru", 2, both=True),
    tagger("rnn-two", "rnn", 2),
    case("text-classifier", TextClassifier, tokens(6, 30)),
    case("last-state", LastState, vectors(5, 7)),
    case("carried-state", CarriedState, carried),
    case("packed-lstm", lambda: Packed("lstm"), ragged),
    case("packed-gru", lambda: Packed("gru"), ragged),
    case("lstm-cells", lambda: CellLoop("lstm"), vectors(4, 6)),
    case("gru-cells", lambda: CellLoop("gru"), vectors(4, 6)),
    case("rnn-cells", lambda: CellLoop("rnn"), vectors(4, 6)),
    case("hand-lstm", HandLSTM, vectors(4, 7)),
    case("crnn-ctc", CRNN, image(1, 16)),
    case("tcn", TCN, vectors(12, 5)),
    case("wavenet", WaveNet, vectors(4, 12)),
    case("tied-lstm", TiedLSTM, tokens(6, 32)),
    case("max-over-time", MaxOverTime, tokens(6, 25)),
    case("hierarchical", Hierarchical, lambda: torch.randint(25, (2, 3, 5))),
    case("stacked-rnns", Stacked, vectors(5, 8)),
    case("conv-lstm", ConvLSTM, vectors(3, 2, 8, 8)),
]
