"""Spans of training, as texts: "100 steps", "2 epochs", "restart"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateurs.errors import ConfigError

__all__ = ["UNITS", "Span", "span"]

UNITS = ("steps", "epochs", "restarts")
"""What training is counted in: optimizer steps, passes over the batches, learning-rate cycles."""


@dataclass(frozen=True)
class Span:
    """So many steps, epochs or restarts."""

    amount: int
    unit: str

    def in_steps(self, n_steps: int, per_epoch: int | None, cycles: int) -> int:
        """The same in optimizer steps.

        Args:
            n_steps: of the whole training.
            per_epoch: optimizer steps of one epoch, if that is known.
            cycles: of the learning rate.

        Raises:
            ConfigError: epochs of unknown length.
        """
        if self.unit == "restarts":  # the first step at or after the boundary of the cycle
            return -(-self.amount * n_steps // cycles)
        if self.unit == "steps":
            return self.amount
        if per_epoch is None:
            raise ConfigError(
                f"{self.amount} epochs: these batches have no length, so epochs cannot be counted "
                'in optimizer steps; write for example "100 steps"'
            )
        return self.amount * per_epoch


def span(text: str, where: str) -> Span:
    """Read a span.

    Raises:
        ConfigError: the text is something else.

    Example:
        >>> span("100 steps", "every"), span("epoch", "every")
        (Span(amount=100, unit='steps'), Span(amount=1, unit='epochs'))
    """
    found = re.fullmatch(r"\s*(\d*)\s*(step|epoch|restart)s?\s*", text) if _text(text) else None
    if found is None:
        raise ConfigError(
            f'{where} must be a text such as "100 steps", "2 epochs" or "1 restart", got {text!r}'
        )
    return Span(int(found[1] or 1), f"{found[2]}s")


def _text(value: object) -> bool:
    return isinstance(value, str)
