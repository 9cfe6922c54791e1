"""Whether a loss is what scoring takes it for: the mean over the samples of a batch."""

from __future__ import annotations

import torch

from secateurs.batches import checked_loss
from secateurs.errors import PruningError
from secateurs.statistics.collector import Run, Setting
from secateurs.statistics.units import some_samples

__all__ = ["loss_note"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF = 3e-2


def loss_note(setting: Setting, first: Run) -> str:
    """What to know about the loss, or an empty text.

    The loss of the first two samples is compared with the mean of their own. A sum is twice as
    large; a mean over tokens, or a loss that couples samples, is something else.
    """
    if first.n < 2 or setting.loss_fn is None:
        return ""
    parts = [slice(0, 2), slice(0, 1), slice(1, 2)]
    try:
        with torch.no_grad():
            pair, *singles = [
                float(
                    checked_loss(
                        setting.model,
                        some_samples(first.batch, part, first.n),
                        setting.loss_fn,
                        "two samples",
                    )
                )
                for part in parts
            ]
    except PruningError as error:
        return f"the loss could not be compared with that of single samples: {error}"
    mean = sum(singles) / 2
    dtype = next((p.dtype for p in setting.params.values()), torch.float32)
    autocast = torch.is_autocast_enabled(next(iter(setting.params.values())).device.type)
    limit = HALF if autocast else TOLERANCE.get(dtype, HALF)
    if abs(pair - mean) <= limit * max(abs(pair), abs(mean), 1e-12):
        return ""
    if abs(pair - sum(singles)) <= limit * max(abs(pair), 1e-12):
        return (
            "the loss is a sum over samples, not a mean: gradients grow with the batch size. "
            'Use reduction="mean"'
        )
    return (
        f"the loss of two samples is {pair:.4g}, the mean of their own losses {mean:.4g}: it is "
        "not a mean over samples (a mean over tokens, or samples that act on each other), so that "
        "the scores depend on the batches"
    )
