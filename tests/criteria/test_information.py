"""Information criteria against slow computations on activations taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from secateurs.criteria import get_criterion
from secateurs.errors import ConfigError, DataError
from secateurs.graph import trace
from secateurs.scoring import score
from secateurs.statistics import Pass, Run, Setting, Sums, check_fits, make_job
from secateurs.statistics import estimators as es
from secateurs.statistics.samples import pooled, sample_dims
from secateurs.types import Batch, Batches, Graph, Plan, Scores
from tests.graphs import Case, conv, lstm, mlp, residual, site

Values = np.ndarray[Any, np.dtype[np.float64]]
NAMES = ("entropy", "mutual_information", "information_next", "redundancy", "conditional_entropy")


def found(case: Case, name: str, target: str, **options: Any) -> Tensor:
    scores = score(case.model, case.batches, criterion={"name": name, **options}, graph=case.graph)
    return scores.values[target].double()


def together(case: Case) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(t) for t in zip(*case.batches, strict=True))
    return x, y


def larger(make: Callable[[], Case], shape: tuple[int, ...], n: int = 120) -> Case:
    """The case with more samples, cut raggedly; labels that depend on the input."""
    case = make()
    g = torch.Generator().manual_seed(3)
    x = torch.randn((n, *shape), generator=g, dtype=torch.float64)
    y = (x.flatten(1)[:, 0] > 0).long() + (x.flatten(1)[:, 1] > 0.5).long()
    sizes = [50, 50, n - 100]
    batches: list[Batch] = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    return Case(case.model, case.graph, batches, case.loss_fn)


# -- reference values --------------------------------------------------------------------------


def units_and_next(name: str) -> tuple[Case, str, Values, Values]:
    """A case, its target, and by plain calls: the pooled units, the pooled next layer."""
    if name == "mlp":
        case, target = larger(mlp, (4,)), "0:neuron"
        net: Any = case.model
        hidden = net[1](net[0](together(case)[0]))
        return case, target, hidden.detach().numpy(), net[2](hidden).detach().numpy()
    if name == "conv":
        case, target = larger(conv, (2, 4, 4)), "0:channel"
        net = case.model.eval()
        flat = net[:5](together(case)[0])
        pooled_units = flat.view(-1, 4, 4).mean(2)
        return case, target, pooled_units.detach().numpy(), net[5](flat).detach().numpy()
    case, target = larger(residual, (4,)), "stem:neuron"
    net = case.model
    start = net.stem(together(case)[0])
    inner = net.fc1(start)
    end = torch.relu(start + net.fc2(torch.relu(inner)))
    after = torch.cat([inner, net.head(end)], dim=1)
    return case, target, ((start + end) / 2).detach().numpy(), after.detach().numpy()


EVERY = pytest.mark.parametrize("name", ["mlp", "conv", "residual"])


@EVERY
def test_entropy_of_activations_taken_by_hand(name: str) -> None:
    case, target, units, _ = units_and_next(name)
    p = [
        np.histogram(units[:, u].astype(np.float32), bins=8)[0] / 120 for u in range(units.shape[1])
    ]
    expected = [-sum(q * np.log(q) for q in row if q > 0) for row in p]
    np.testing.assert_allclose(found(case, "entropy", target, bins=8), expected, rtol=1e-6)


@EVERY
def test_gaussian_entropy_of_activations_taken_by_hand(name: str) -> None:
    case, target, units, _ = units_and_next(name)
    expected = 0.5 * np.log(2 * np.pi * np.e * units.var(axis=0))
    result = found(case, "entropy", target, estimator="gaussian")
    np.testing.assert_allclose(result, expected, rtol=1e-4)


@EVERY
def test_information_about_the_labels(name: str) -> None:
    case, target, units, _ = units_and_next(name)
    y = together(case)[1].numpy()
    place = es.bin_index(torch.from_numpy(units).float(), 8).numpy()
    expected = [mutual_info_score(y, place[:, u]) for u in range(units.shape[1])]
    np.testing.assert_allclose(
        found(case, "mutual_information", target, bins=8), expected, rtol=1e-5
    )


def test_information_about_the_labels_by_neighbours() -> None:
    case, target, units, _ = units_and_next("mlp")
    y = together(case)[1].numpy()
    expected = mutual_info_classif(units, y, n_neighbors=5, random_state=0)
    result = found(case, "mutual_information", target, estimator="knn", neighbors=5)
    # The k-th neighbour is on the edge of its own ball: rounding decides whether it counts.
    np.testing.assert_allclose(result, expected, atol=0.05)
    assert expected.max() > 0.2


@EVERY
def test_information_about_the_next_layer(name: str) -> None:
    """-1/2 log(1 - R^2) by least squares with a penalty, unit by unit."""
    case, target, units, after = units_and_next(name)
    b = (after - after.mean(0)) / after.std(0)
    expected = []
    for unit in units.T:
        a = (unit - unit.mean()) / unit.std()
        weight = np.linalg.solve(b.T @ b / 120 + 0.05 * np.eye(b.shape[1]), b.T @ a / 120)
        expected.append(-0.5 * np.log(1 - (b.T @ a / 120) @ weight))
    result = found(case, "information_next", target, noise=0.05)
    np.testing.assert_allclose(result, expected, rtol=1e-4)


@EVERY
def test_what_the_other_units_do_not_know(name: str) -> None:
    case, target, units, _ = units_and_next(name)
    z = (units - units.mean(0)) / units.std(0)
    s = es.shrinkage(torch.from_numpy(z))
    matrix = (1 - s) * (z.T @ z / 120) + s * np.eye(z.shape[1])
    share = 1 / np.diag(np.linalg.inv(matrix))
    np.testing.assert_allclose(found(case, "redundancy", target), share, rtol=1e-4)
    entropy = 0.5 * np.log(2 * np.pi * np.e * units.var(axis=0) * share)
    np.testing.assert_allclose(found(case, "conditional_entropy", target), entropy, atol=1e-4)


# -- meaning -----------------------------------------------------------------------------------


def gates(weights: list[list[float]], n: int = 600, seed: int = 0) -> tuple[Case, Tensor]:
    """y = head(relu(first(x))): the units of `first` are rows of weights over 3 inputs."""
    first = nn.Linear(3, len(weights), bias=False)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(len(weights), 2, bias=False))
    with torch.no_grad():
        first.weight.copy_(torch.tensor(weights))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((n, 3), generator=g)
    y = (x[:, 0] > 0).long()
    return Case(net, trace(net, x[:4]), [(x, y)], nn.functional.cross_entropy), y


def test_a_dead_unit_is_last() -> None:
    case, _ = gates([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
    for name in NAMES:
        values = found(case, name, "0:neuron")
        assert values[2] < values[:2].min()


def test_a_unit_that_follows_the_label_is_first() -> None:
    case, _ = gates([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    # Of log 2 = 0.69; the first bin takes small positive values together with zero.
    for estimator, least in (("histogram", 0.4), ("knn", 0.65)):
        values = found(case, "mutual_information", "0:neuron", estimator=estimator)
        assert values[0] > least
        assert values[1:].max() < 0.05


@pytest.mark.parametrize("estimator", ["histogram", "knn"])
def test_shuffled_labels_tell_nothing(estimator: str) -> None:
    """The true labels are far outside what 19 shuffles give: p = 1/20 for each, seeds fixed."""
    case, y = gates([[1, 0, 0], [1, 1, 0]])
    x = case.batches[0][0]

    def about(labels: Tensor) -> Tensor:
        other = Case(case.model, case.graph, [(x, labels)], case.loss_fn)
        return found(other, "mutual_information", "0:neuron", estimator=estimator)

    g = torch.Generator().manual_seed(0)
    shuffled = torch.stack([about(y[torch.randperm(len(y), generator=g)]) for _ in range(19)])
    assert (about(y) > 2 * shuffled.amax(0)).all()
    assert shuffled.mean() < 0.03
    # Shuffling samples and labels alike is no shuffle at all.
    order = torch.randperm(len(y), generator=g)
    moved = Case(case.model, case.graph, [(x[order], y[order])], case.loss_fn)
    same = found(moved, "mutual_information", "0:neuron", estimator=estimator)
    torch.testing.assert_close(same, about(y))


def test_copies_are_redundant_and_one_that_was_removed_is_no_copy() -> None:
    case, _ = gates([[1, 0, 0], [2, 0, 0], [0, 1, 0]])
    values = found(case, "redundancy", "0:neuron")
    assert values[:2].max() < 0.1
    assert values[2] > 0.9
    gone = Plan({}, {}, {"0:neuron": torch.tensor([0])}, {})
    scores = score(
        case.model, case.batches, criterion="redundancy", graph=case.graph, previous=gone
    )
    first, second, _ = scores.values["0:neuron"].tolist()
    assert first == float("-inf")
    assert second > 0.9


def test_a_unit_that_the_next_layer_does_not_read_tells_it_nothing() -> None:
    case, _ = gates([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    net: Any = case.model
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [1.0, -1.0, 0.0]]))
    values = found(case, "information_next", "0:neuron")
    assert values[:2].min() > 1.0
    assert values[2] < 0.02


# -- labels ------------------------------------------------------------------------------------


def test_numbers_are_labels_too() -> None:
    case, _ = gates([[1, 0, 0], [0, 1, 0]])
    x = case.batches[0][0]
    y = x[:, :1].double()  # (n, 1)
    plain = Case(case.model, case.graph, [(x, y)], case.loss_fn)
    wrapped = Case(case.model, case.graph, [(x, {"value": y[:, 0]})], case.loss_fn)
    place = es.bin_index(y, 16)[:, 0]
    units = torch.relu(x[:, :2])
    expected = es.histogram_information(units, place, 16)
    for one in (plain, wrapped):
        values = found(one, "mutual_information", "0:neuron", bins=16)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (None, "got NoneType"),
        (torch.zeros(10, 7, dtype=torch.long), r"got \(10, 7\)"),
        (torch.zeros(9, dtype=torch.long), r"got \(9,\)"),
        ((torch.zeros(10), torch.zeros(10)), r"got \(10,\), \(10,\)"),
        (torch.full((10,), float("nan")), "not finite"),
    ],
)
def test_other_targets_are_refused(targets: Any, got: str) -> None:
    case = mlp()
    case = Case(case.model, case.graph, [(together(case)[0], targets)], case.loss_fn)
    with pytest.raises(DataError, match=got):
        found(case, "mutual_information", "0:neuron")


def test_label_free_ones_need_neither_targets_nor_loss() -> None:
    case = mlp()
    bare: Batches = [(x, None) for x, _ in case.batches]
    labels = [n for n in NAMES if n != "mutual_information"]
    free = score(case.model, bare, criterion=labels, graph=case.graph)
    full = score(case.model, case.batches, case.loss_fn, criterion=labels, graph=case.graph)
    for name in labels:
        for target, values in full[name].values.items():
            assert torch.equal(free[name].values[target], values)


def test_labels_that_are_all_different_are_reported() -> None:
    case = mlp()
    x = together(case)[0]
    same = score(
        case.model, [(x, torch.arange(10))], criterion="mutual_information", graph=case.graph
    )
    assert any("10 different labels in 10 samples" in note for note in same.notes)


# -- samples -----------------------------------------------------------------------------------


def test_only_the_first_samples_are_kept_and_that_is_said() -> None:
    case = larger(mlp, (4,))
    x, y = together(case)
    first = Case(case.model, case.graph, [(x[:70], y[:70])], case.loss_fn)
    for name in NAMES:
        spec = {"name": name, "samples": 70}
        capped = score(case.model, case.batches, criterion=spec, graph=case.graph)
        whole = score(first.model, first.batches, criterion=spec, graph=first.graph)
        assert capped.notes == ("from the first 70 of 120 samples",)
        assert whole.notes == ()
        for target, values in whole.values.items():
            torch.testing.assert_close(capped.values[target], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_batches_does_not_matter(name: str) -> None:
    case = larger(conv, (2, 4, 4))
    turned = Case(case.model, case.graph, case.batches[::-1], case.loss_fn)
    torch.testing.assert_close(found(turned, name, "0:channel"), found(case, name, "0:channel"))


def test_one_collector_keeps_the_samples_for_all() -> None:
    case = mlp()
    params = check_fits(case.model, case.graph.groups())
    jobs = [
        make_job(get_criterion(n), case.graph.groups(), case.model, params, "structured")
        for n in NAMES
    ]
    alive = {g.name: torch.arange(g.n_units) for g in case.graph.groups()}
    sums = Sums()
    setting = Setting(case.model, params, None, case.graph, alive)
    run = Pass(setting, jobs, Run(0, case.batches[0]), sums)
    for number, batch in enumerate(case.batches):
        run.batch(0, Run(number, batch))
    rows = [key for key in sums if sums.n_rows(key) and key.endswith(":neuron")]
    assert len(rows) == 2
    assert all(sums[key].dtype == torch.float32 for key in rows)


def test_an_interrupted_pass_goes_on(tmp_path: Path) -> None:
    case, file = larger(mlp, (4,)), tmp_path / "half"

    def run(**options: Any) -> dict[str, Scores]:
        return score(case.model, case.batches, criterion=list(NAMES), graph=case.graph, **options)

    def stop(done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop, resume=file)
    assert file.exists()
    resumed, whole = run(resume=file), run()
    for name in NAMES:
        for target, values in whole[name].values.items():
            assert torch.equal(resumed[name].values[target], values)


@pytest.mark.parametrize(
    ("shape", "features", "samples"),
    [((6, 3, 5), 2, 0), ((3, 6, 5), 2, 1), ((5, 4, 6), 0, 2), ((6, 5), -1, 0), ((12, 3, 5), 2, 0)],
)
def test_pooling_wherever_the_samples_are(
    shape: tuple[int, ...], features: int, samples: int
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = value.shape[samples] // 6
    rows = []
    for i in range(6):
        part = value.narrow(samples, i * each, each).movedim(features, -1)
        rows.append(part.reshape(-1, 5).mean(0))
    torch.testing.assert_close(pooled(value, features, samples, 6), torch.stack(rows))


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(7, 3\) does not hold the 6 samples"):
        pooled(torch.zeros(7, 3), 1, 0, 6)


class Windows(nn.Module):
    """Turns the sequence to the front, and cuts samples into windows, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.cut = nn.Linear(3, 4), nn.Linear(4, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.front(x.transpose(0, 1))).transpose(0, 1)  # (t, n, 3)
        x = x.reshape(x.shape[0] * 2, -1, 4)
        x = torch.relu(self.cut(x))  # (2n, t / 2, 4)
        out: Tensor = self.out(x.reshape(x.shape[0] // 2, -1, 5)).mean(1)
        return out


def test_samples_are_found_in_any_dimension() -> None:
    torch.manual_seed(0)
    net, x = Windows(), torch.randn(5, 6, 3)
    sites = [
        site("front", "output", np.arange(4), dim=2),
        site("cut", "output", np.arange(5), dim=2),
    ]
    dims = sample_dims(net, Run(0, (x, None)), sites)
    assert {key[0]: dim for key, dim in dims.items()} == {"front": 1, "cut": 0}
    graph = trace(net, x)
    scores = score(net, [(x, None)], criterion="entropy", graph=graph)
    hidden = torch.relu(net.front(x)).mean(1)
    expected = es.histogram_entropy(hidden.detach(), 32).float()
    torch.testing.assert_close(scores.values["front:neuron"], expected)


class Summed(nn.Module):
    """A layer that sees the mean of the batch, without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).mean(0, keepdim=True))
        return out.expand(x.shape[0], 2)


def test_activations_without_samples_are_refused() -> None:
    net, x = Summed(), torch.ones(5, 3)
    graph = trace(net, x)
    with pytest.raises(DataError, match="no dimension holds the samples"):
        score(net, [(x, None)], criterion="entropy", graph=graph)


# -- which targets -----------------------------------------------------------------------------


def test_a_layer_that_only_feeds_itself_has_no_next_one() -> None:
    case = lstm()
    (group,) = case.graph.groups()
    alone = type(group)(
        group.name, group.kind, group.n_units,
        tuple(m for m in group.members if m.tensor != "fc.weight"),
        (group.sites[0],),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no other layer reads these units"):
        score(
            case.model, case.batches, criterion="information_next", graph=Graph({alone.name: alone})
        )


def test_an_lstm_is_told_by_its_reader_not_by_itself() -> None:
    """The recurrent layer reads its own units; only what another layer makes of them counts."""
    case = larger(lstm, (4, 3))
    values = found(case, "information_next", "lstm:hidden", noise=0.05)
    net: Any = case.model
    with torch.no_grad():
        last = net.lstm(together(case)[0])[0][:, -1]
        z, b = es.standardised(last), es.standardised(net.fc(last))
    torch.testing.assert_close(values, es.noisy_information(z, b, 0.05), rtol=1e-4, atol=0)


class Encoder(nn.Module):
    """Tokens, two encoder layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return out


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize("which", ["cnn", "encoder"])
def test_traced_networks(which: str) -> None:
    torch.manual_seed(0)
    net = (cnn() if which == "cnn" else Encoder()).eval()
    x = torch.randn(40, 1, 8, 8) if which == "cnn" else torch.randint(30, (40, 6))
    batches = [(x[:25], torch.arange(25) % 3), (x[25:], torch.arange(15) % 3)]
    graph = trace(net, x[:2])
    scores = score(net, batches, criterion=list(NAMES), graph=graph)
    for one in scores.values():
        assert one.values.keys() | one.not_scored.keys() == {g.name for g in graph.groups()}
        assert all(torch.isfinite(v).all() for v in one.values.values())
    said = scores["entropy"].not_scored
    if which == "encoder":  # heads live inside a fused kernel
        assert set(said.values()) == {"no activation can be seen from outside"}
        hidden = scores["information_next"].values["encoder.layers.0.linear1:neuron"]
        assert (hidden > 0).all()
    else:
        assert not said
        assert not torch.isclose(
            scores["information_next"].values["0:channel"], torch.zeros(())
        ).any()


def test_the_stream_of_an_encoder_is_read_by_attention() -> None:
    """Attention uses the weights of its projections without calling them: its own output counts."""
    torch.manual_seed(0)
    net = Encoder().eval()
    x = torch.randint(30, (20, 6))
    graph = trace(net, x[:2])
    scores = score(
        net, [(x, None)], criterion="information_next", graph=graph, granularity="embedding"
    )
    assert (scores.values["embed:embedding"] > 0).all()
