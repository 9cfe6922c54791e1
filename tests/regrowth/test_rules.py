"""The rules on tensors small enough to check by hand, and the options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateurs.errors import BudgetError, ConfigError
from secateurs.regrowth import FADES, RULES, Regrow
from secateurs.regrowth.rules import How, Seen, centre, dns, dpf, rigl, set_, top

KEPT = torch.tensor([True, True, True, True, False, False, False, False])
WEIGHT = torch.tensor([0.4, -0.1, 0.2, -0.3, 0.0, 0.0, 0.0, 0.0])


def how(share: float = 0.5, *, margin: float = 0.1, whole: bool = False, seed: int = 0) -> How:
    return How(share, margin, whole, torch.Generator().manual_seed(seed))


def kept(mask: Tensor) -> list[int]:
    return mask.nonzero().reshape(-1).tolist()


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    gradient = torch.tensor([9.0, 0.0, 0.0, 9.0, 1.0, -3.0, 2.0, 0.0])
    mask = rigl({"w": Seen(WEIGHT, KEPT, gradient)}, how())["w"]
    assert kept(mask) == [0, 3, 5, 6]  # 1 and 2 go, |-3| and 2 come


def test_rigl_may_grow_what_it_dropped_just_now() -> None:
    gradient = torch.tensor([0.0, 5.0, 0.0, 0.0, 1.0, 3.0, 2.0, 0.0])
    mask = rigl({"w": Seen(WEIGHT, KEPT, gradient)}, how())["w"]
    assert kept(mask) == [0, 1, 3, 5]


def test_the_share_is_rounded_down() -> None:
    gradient = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 3.0, 2.0, 0.0])
    seen = {"w": Seen(WEIGHT, KEPT, gradient)}
    assert kept(rigl(seen, how(0.49))["w"]) == [0, 2, 3, 5]
    assert kept(rigl(seen, how(0.24))["w"]) == [0, 1, 2, 3]


def test_of_equal_entries_the_first_stay_and_the_first_come() -> None:
    mask = rigl({"w": Seen(torch.ones(8) * KEPT, KEPT, torch.ones(8))}, how())["w"]
    assert kept(mask) == [0, 1, 2, 3]  # 2 and 3 are dropped, and come back as the first
    gradient = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1])
    mask = rigl({"w": Seen(torch.ones(8) * KEPT, KEPT, gradient)}, how())["w"]
    assert kept(mask) == [0, 1, 4, 5]


def test_set_grows_at_random_and_repeats_with_its_generator() -> None:
    seen = {"w": Seen(WEIGHT, KEPT)}
    masks = [kept(set_(seen, how(seed=seed))["w"]) for seed in (0, 0, *range(1, 30))]
    assert masks[0] == masks[1]
    assert all({0, 3} <= set(mask) and len(mask) == 4 for mask in masks)
    assert {i for mask in masks for i in mask} == set(range(8))


def test_dpf_keeps_the_largest_in_each_tensor_or_in_all() -> None:
    weights = {"a": torch.tensor([5.0, -4.0, 3.0]), "b": torch.tensor([0.5, 2.0, -1.0])}
    first = {"a": torch.tensor([False, False, True]), "b": torch.tensor([True, True, False])}
    seen = {name: Seen(w, first[name]) for name, w in weights.items()}
    assert [kept(m) for m in dpf(seen, how()).values()] == [[0], [1, 2]]
    assert [kept(m) for m in dpf(seen, how(whole=True)).values()] == [[0, 1, 2], []]


def test_dns_keeps_what_is_between_its_thresholds_as_it_is() -> None:
    weight = torch.tensor([0.8, 0.95, 1.05, 1.2, 0.8, 0.95, 1.05, -1.2])
    mask = dns({"w": Seen(weight, KEPT, centre=1.0)}, how())["w"]
    assert kept(mask) == [1, 2, 3, 7]


def test_dns_without_a_centre_keeps_as_many() -> None:
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.1, 1.2, -1.3, 0.0])
    seen = {"w": Seen(weight, KEPT)}
    assert kept(dns(seen, how(margin=0.1))["w"]) == [0, 1, 2, 6]  # 1.3 / 1.1 > 1 / 0.9 > 1.2 / 1.1
    assert kept(dns(seen, how(margin=0.5))["w"]) == [0, 1, 2, 3]
    assert torch.equal(dns(seen, how(margin=0))["w"], dpf(seen, how())["w"])


def test_dns_does_not_empty_a_tensor() -> None:
    with pytest.raises(BudgetError, match=r"w \(8,\) would lose all its weights"):
        dns({"w": Seen(WEIGHT, KEPT, centre=1.0)}, how())


def test_the_centre_is_over_what_is_not_zero() -> None:
    assert centre(torch.tensor([2.0, 0.0, -4.0]), spread=1) == 4.0
    assert centre(torch.tensor([2.0, -4.0]), spread=-9) == 0.0
    assert centre(torch.zeros(3), spread=1) == 0.0


def test_top_may_be_nothing_or_all() -> None:
    scores = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[3.0]])}
    assert [m.tolist() for m in top(scores, 0).values()] == [[False, False], [[False]]]
    assert [m.tolist() for m in top(scores, 1).values()] == [[False, True], [[False]]]
    assert [m.tolist() for m in top(scores, 3).values()] == [[True, True], [[True]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_rules_take_every_type_and_masks_of_nothing_and_all(rule: str, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for full in (True, False):
        mask = torch.full((3, 4), full)
        moved = RULES[rule].move({"w": Seen(weight, mask, weight)}, how())["w"]
        assert torch.equal(moved, mask)


def test_fades_start_at_the_fraction() -> None:
    assert {name: fade(0.0) for name, fade in FADES.items()} == dict.fromkeys(FADES, 1.0)
    assert [round(FADES["cosine"](t), 6) for t in (0.5, 1.0)] == [0.5, 0.0]
    assert Regrow(fraction=0.4, curve="linear").share(0.75) == pytest.approx(0.1)


def test_all_problems_of_the_options_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        Regrow("dns", every=0, fraction=0.2, until=2, margin=1, spread=float("nan"), scope="global")
    assert str(error.value) == (
        "Regrow: every must be a whole number, at least 1, got 0; margin must be in [0, 1), got 1; "
        "spread must be a number, got nan; until must be in (0, 1], got 2; "
        "fraction has no effect on rule='dns', leave it away; "
        "scope has no effect on rule='dns', leave it away"
    )
    with pytest.raises(ConfigError, match=r"unknown rule 'rig'. Did you mean 'rigl'\?"):
        Regrow("rig")
    with pytest.raises(ConfigError, match="every must be at least 2 for rule='rigl'"):
        Regrow(every=1)
    with pytest.raises(ConfigError, match="fraction must be in"):
        Regrow(fraction=0)
    with pytest.raises(ConfigError, match="every must be a whole number, at least 1, got True"):
        Regrow("set", every=True)


@pytest.mark.parametrize("rule", RULES)
def test_every_field_of_a_rule_is_one_of_the_options(rule: str) -> None:
    changed = {"fraction": 0.2, "curve": "linear", "margin": 0.2, "spread": 1.0, "scope": "global"}
    for name, value in changed.items():
        if name in RULES[rule].uses:
            assert getattr(Regrow(rule, **{name: value}), name) == value  # type: ignore[arg-type]
        else:
            with pytest.raises(ConfigError, match=f"{name} has no effect"):
                Regrow(rule, **{name: value})  # type: ignore[arg-type]
