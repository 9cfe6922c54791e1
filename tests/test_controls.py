"""Controls change what they claim, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateurs.controls import CONTROLS, controlled_scores, reinitialise_, resets, shuffled_targets
from secateurs.errors import ConfigError
from secateurs.types import Graph, Scores

GONE = float("-inf")


def scores(*values: float) -> Scores:
    return Scores(Graph({}), {"a": torch.tensor(values)}, "taylor")


def test_shuffle_is_a_permutation_and_no_identity() -> None:
    line = [float(i) for i in range(30)]
    found = controlled_scores(scores(*line, GONE), "shuffle", seed=0)
    values = found.values["a"]
    assert sorted(values[:-1].tolist()) == line
    assert values[:-1].tolist() != line
    assert values[-1] == GONE
    assert found.criterion == "shuffle(taylor)"


def test_shuffle_stays_inside_a_target_and_above_removed_units() -> None:
    both = Scores(
        Graph({}), {"a": torch.tensor([1.0, GONE, 2.0]), "b": torch.tensor([8.0, 9.0])}, "taylor"
    )
    for seed in range(5):
        found = controlled_scores(both, "shuffle", seed).values
        assert sorted(found["a"].tolist()) == [GONE, 1, 2]
        assert found["a"][1] == GONE
        assert sorted(found["b"].tolist()) == [8, 9]


def test_invert_reverses_the_order() -> None:
    values = controlled_scores(scores(3, GONE, 1, 2), "invert", 0).values["a"]
    assert values.argsort(descending=True).tolist() == [2, 3, 0, 1]


def test_random_is_noise_that_depends_on_the_seed_only() -> None:
    first, again, other = (
        controlled_scores(scores(5, 5, GONE, 5), "random", seed).values["a"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[2] == GONE
    assert all(0 <= x < 1 for x in first[[0, 1, 3]].tolist())


@pytest.mark.parametrize("control", [None, "random-labels", "reinit"])
def test_other_controls_leave_the_scores(control: str | None) -> None:
    given = scores(1, 2)
    assert controlled_scores(given, control, 0) is given
    assert control is None or control in CONTROLS


# --- random labels -------------------------------------------------------------------------------


def test_targets_are_permuted_among_all_samples() -> None:
    inputs = [torch.zeros(3, 1), torch.ones(2, 1)]
    batches = [(inputs[0], torch.tensor([0, 1, 2])), (inputs[1], torch.tensor([3, 4]))]
    found = shuffled_targets(batches, nn.Linear(1, 1), seed=0)
    joined = torch.cat([y for _, y in found]).tolist()
    assert sorted(joined) == [0, 1, 2, 3, 4]
    assert joined != [0, 1, 2, 3, 4]
    assert [len(y) for _, y in found] == [3, 2]
    assert all(torch.equal(x, mine) for (x, _), mine in zip(found, inputs, strict=True))


def test_batches_of_one_sample_are_shuffled_too() -> None:
    batches = [(torch.zeros(1, 1), torch.tensor([i])) for i in range(8)]
    found = [int(y) for _, y in shuffled_targets(batches, nn.Linear(1, 1), seed=0)]
    assert found != list(range(8))


@pytest.mark.parametrize(
    "targets",
    [[{"y": torch.zeros(2)}], [torch.tensor(1)], [torch.zeros(2, 3), torch.zeros(2, 4)], [None]],
)
def test_targets_that_cannot_be_permuted(targets: list[object]) -> None:
    with pytest.raises(ConfigError, match="one tensor per batch"):
        shuffled_targets([(torch.zeros(2, 1), t) for t in targets], nn.Linear(1, 1), 0)


# --- fresh weights -------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4), nn.PReLU())


def test_every_weight_is_drawn_again_and_masks_hold() -> None:
    model, mask = network(), torch.ones(4, 3, dtype=torch.bool)
    mask[0] = False
    model.get_buffer("1.running_mean").fill_(3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    reinitialise_(model, {"0.weight": mask}, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weight = model.get_parameter("0.weight")
    assert (weight[0] == 0).all()
    assert not (weight[1:] == before["0.weight"][1:]).any()
    assert not (model.get_parameter("2.weight_hh_l0") == before["2.weight_hh_l0"]).any()
    assert (model.get_buffer("1.running_mean") == 0).all()


def test_the_seed_of_the_model_does_not_bring_its_first_weights_back() -> None:
    """Else the control would be a rewind to the original initialisation."""
    model = network()  # built under seed 0
    before = model.get_parameter("0.weight").clone()
    reinitialise_(model, {}, seed=0)
    assert not (model.get_parameter("0.weight") == before).any()


def test_attention_starts_again_too() -> None:
    layer = nn.MultiheadAttention(4, 2)
    before = layer.in_proj_weight.clone()
    reinitialise_(layer, {}, seed=0)
    assert not (layer.in_proj_weight == before).any()


def test_a_module_without_a_fresh_start_is_named_and_nothing_changes() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    model = nn.Sequential(nn.Linear(2, 2), Scale())
    before = model.get_parameter("0.weight").clone()
    with pytest.raises(ConfigError, match=r"missing on 1 \(Scale\)"):
        reinitialise_(model, {}, 0)
    assert torch.equal(model.get_parameter("0.weight"), before)
    assert len(resets(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == 1
