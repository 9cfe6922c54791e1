"""Small Keras 3 models on the torch backend: a Keras model is an `nn.Module` there."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateurs.types import Inputs
from tests.zoo.case import Case, randomise_

__all__ = ["CASES"]


def _keras() -> Any:
    """Keras with torch below; the backend is fixed by its first import."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return importlib.import_module("keras")


def _case(name: str, define: Callable[[Any], nn.Module], inputs: Callable[[], Inputs]) -> Case:
    def build() -> tuple[nn.Module, Inputs]:
        keras = _keras()
        keras.utils.clear_session()  # layer names count from one again
        keras.utils.set_random_seed(0)
        return randomise_(define(keras)), inputs()

    return Case(name, build)


def _cnn(keras: Any) -> nn.Module:
    layers = keras.layers
    image = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, padding="same")(image)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Conv2D(12, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(16, activation="relu")(x)
    model: nn.Module = keras.Model(image, layers.Dense(5)(x))
    return model


def _lstm(keras: Any) -> nn.Module:
    layers = keras.layers
    words = keras.Input((6,), dtype="int32")
    wide = keras.initializers.RandomNormal(stddev=1.0)  # the usual 0.05 makes all words alike
    x = layers.Embedding(30, 12, embeddings_initializer=wide)(words)
    x = layers.LSTM(10)(x)
    model: nn.Module = keras.Model(words, layers.Dense(5)(x))
    return model


def _image() -> Inputs:
    return torch.randn(2, 12, 12, 3, generator=torch.Generator().manual_seed(1))


def _words() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 30, (2, 6), generator=generator)


CASES: list[Case] = [_case("keras_cnn", _cnn, _image), _case("keras_lstm", _lstm, _words)]
