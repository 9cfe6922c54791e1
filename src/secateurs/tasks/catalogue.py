"""The built-in tasks: each is one network on one real data set."""

from __future__ import annotations

from torch import nn

from secateurs.tasks.base import TrainRecipe, accuracy_and_auc, auc_and_accuracy, task
from secateurs.tasks.data import (
    FASHION,
    SKLEARN,
    VOWELS,
    read_cancer,
    read_digits,
    read_fashion,
    read_vowels,
)
from secateurs.tasks.models import (
    MLP,
    DigitsCNN,
    LeNet5,
    MiniLM,
    RecurrentClassifier,
    ResNet20,
    TextTransformer,
)
from secateurs.tasks.text import (
    SPAM,
    SPAM_MINILM,
    VOCABULARY,
    WORDS_LENGTH,
    minilm_folder,
    read_spam_pieces,
    read_spam_words,
)

__all__: list[str] = []

DIGITS = (SKLEARN, read_digits)
CANCER = (SKLEARN, read_cancer)
FASHION_MNIST = (FASHION, read_fashion)
JAPANESE_VOWELS = (VOWELS, read_vowels)
SPAM_WORDS = (SPAM, read_spam_words)
SPAM_PIECES = (SPAM_MINILM, read_spam_pieces)


@task(
    "digits-mlp",
    "8x8 digits (1797 images, split 60/20/20), fully connected 64-128-64-10",
    kind="image",
    data=DIGITS,
    recipe=TrainRecipe(epochs=40, lr=3e-3, batch_size=64, weight_decay=0.01),
    granularity="neuron",
)
def digits_mlp() -> nn.Module:
    """MLP 64-128-64-10."""
    return MLP((64, 128, 64, 10))


@task(
    "digits-cnn",
    "8x8 digits (1797 images, split 60/20/20), three convolutions with one residual addition",
    kind="image",
    data=DIGITS,
    recipe=TrainRecipe(epochs=20, lr=3e-3, batch_size=64, weight_decay=0.01),
    granularity="channel",
)
def digits_cnn() -> nn.Module:
    """CNN with 32 and 64 channels."""
    return DigitsCNN()


@task(
    "cancer-mlp",
    "breast cancer (569 patients, 30 features, split 60/20/20), fully connected 30-64-32-2",
    kind="medical",
    data=CANCER,
    recipe=TrainRecipe(epochs=30, lr=1e-3, batch_size=32, weight_decay=0.01),
    granularity="neuron",
    metric=auc_and_accuracy,
)
def cancer_mlp() -> nn.Module:
    """MLP 30-64-32-2."""
    return MLP((30, 64, 32, 2))


@task(
    "fashion-lenet300",
    "Fashion-MNIST (55,000/5,000/10,000), fully connected LeNet 784-300-100-10",
    kind="image",
    data=FASHION_MNIST,
    recipe=TrainRecipe(epochs=10, lr=1e-3, batch_size=128, weight_decay=0.01),
    granularity="neuron",
)
def fashion_lenet300() -> nn.Module:
    """LeNet-300-100."""
    return MLP((784, 300, 100, 10))


@task(
    "fashion-lenet5",
    "Fashion-MNIST (55,000/5,000/10,000), convolutional LeNet-5 20-50-500",
    kind="image",
    data=FASHION_MNIST,
    recipe=TrainRecipe(epochs=6, lr=1e-3, batch_size=128, weight_decay=0.01),
    granularity="channel",
)
def fashion_lenet5() -> nn.Module:
    """LeNet-5-Caffe."""
    return LeNet5()


@task(
    "fashion-resnet20",
    "Fashion-MNIST (a fixed 10,000 of the training images/2,000/10,000; full data: "
    "55,000/5,000/10,000), ResNet-20",
    kind="image",
    data=FASHION_MNIST,
    recipe=TrainRecipe(
        epochs=6, lr=0.05, batch_size=64, weight_decay=5e-4, optimizer="sgd", momentum=0.9
    ),
    granularity="channel",
    n_train=10_000,
)
def fashion_resnet20() -> nn.Module:
    """ResNet-20 with one input channel."""
    return ResNet20()


@task(
    "vowels-lstm",
    "JapaneseVowels speech (216/54/370 series, 9 speakers), LSTM with 64 hidden units",
    kind="speech",
    data=JAPANESE_VOWELS,
    recipe=TrainRecipe(epochs=40, lr=5e-3, batch_size=32, weight_decay=0.01),
    granularity="hidden",
)
def vowels_lstm() -> nn.Module:
    """LSTM-64."""
    return RecurrentClassifier(nn.LSTM, n_features=12, hidden=64, n_classes=9)


@task(
    "vowels-gru",
    "JapaneseVowels speech (216/54/370 series, 9 speakers), GRU with 64 hidden units",
    kind="speech",
    data=JAPANESE_VOWELS,
    recipe=TrainRecipe(epochs=40, lr=5e-3, batch_size=32, weight_decay=0.01),
    granularity="hidden",
)
def vowels_gru() -> nn.Module:
    """GRU-64."""
    return RecurrentClassifier(nn.GRU, n_features=12, hidden=64, n_classes=9)


@task(
    "spam-transformer",
    "SpamAssassin e-mails (5,555 without copies, split 60/20/20), Transformer encoder over 128 "
    "words: width 64, two layers of 4 heads and 256 neurons",
    kind="text",
    data=SPAM_WORDS,
    recipe=TrainRecipe(epochs=6, lr=2e-3, batch_size=64, weight_decay=0.01),
    granularity="structured",
    metric=accuracy_and_auc,
)
def spam_transformer() -> nn.Module:
    """Transformer encoder, from scratch."""
    return TextTransformer(VOCABULARY, WORDS_LENGTH)


# All of the encoder is trained, not the head alone: a pruned network is trained again, all of it,
# and must be compared with a dense one that had the same chance.
@task(
    "spam-minilm",
    "SpamAssassin e-mails (1,500 of the training e-mails/500/1,111; full data: "
    "3,333/1,111/1,111), pretrained MiniLM over 64 word pieces, fine-tuned with a linear head",
    kind="text",
    data=SPAM_PIECES,
    recipe=TrainRecipe(epochs=2, lr=1e-4, batch_size=32, weight_decay=0.01),
    granularity="structured",
    metric=accuracy_and_auc,
    n_train=1500,
)
def spam_minilm() -> nn.Module:
    """MiniLM-L6 with its pretrained weights."""
    return MiniLM(minilm_folder())
