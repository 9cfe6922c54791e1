"""The Keras callback: weights and the optimizer's variables stay zero where something was cut."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from secateurs import Budget, Schedule, allocate, score, select, shrink, trace
from secateurs.errors import CaptureError, ConfigError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras: Any = pytest.importorskip("keras", reason="pip install 'secateurs[keras]'")

from secateurs.integrations.keras import Pruning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # of Keras

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()


def build(optimizer: Any) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True),
    ],
)
def test_what_is_cut_stays_zero_in_weights_and_optimizer(make: Any) -> None:
    model = build(make())
    pruning = Pruning(
        budget=Budget(params=0.3), granularity="weight", criterion="taylor", example_inputs=X,
        batches=[(X, Y)], loss_fn=F.cross_entropy,
        schedule=Schedule("cubic", steps=3, every="1 epoch", begin="1 epoch"),
    )  # fmt: skip
    model.fit(X, Y, batch_size=8, epochs=5, verbose=0, callbacks=[pruning])
    plan = pruning.plan
    assert plan is not None
    assert plan.n_removed == 114 - int(0.3 * 114)
    parameters = dict(model.named_parameters())
    variables = {id(v.value): i for i, v in enumerate(model.optimizer._trainable_variables)}
    states = 0
    for name, mask in plan.masks.items():
        assert not parameters[name][~mask].any(), name
        assert parameters[name][mask].all(), name
        place = variables[id(parameters[name])]
        for held in vars(model.optimizer).values():
            if isinstance(held, list) and len(held) == len(variables) and held[place] is not None:
                if held[place] is model.optimizer._trainable_variables[place]:
                    continue
                state = held[place].value
                states += 1
                assert not state[~mask].any(), name
                assert state[mask].any(), name
    assert states >= len(plan.masks)


def test_units_can_be_removed_after_the_training() -> None:
    model = build("sgd")
    pruning = Pruning(budget=Budget(units=4), criterion="l2_norm", example_inputs=X)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[pruning])
    assert pruning.plan is not None
    small = shrink(model, pruning.plan, X)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == 4 * 4 + 4 + 4 * 2 + 2


def test_a_model_whose_copy_has_other_names_is_refused_by_name() -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    graph = trace(model, X)
    scores = score(model, graph=graph, criterion="l2_norm")
    plan = select(scores, allocate(scores, Budget(units=4)))
    with pytest.raises(CaptureError, match=r"build it as keras\.Model"):
        shrink(model, plan, X)


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ConfigError, match="KERAS_BACKEND=torch"):
        Pruning(budget=Budget(units=4))
