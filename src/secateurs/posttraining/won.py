"""What a repair without training has won."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Won"]


@dataclass(frozen=True)
class Won:
    """What a repair has won.

    Attributes:
        what: the repair, e.g. "batch norms measured again".
        before, after: what was measured before and after it by name, e.g. "accuracy", "loss" or
            "error" (of the repaired layers, relative to the dense model); the same names in both.
        samples: that the repair looked at.
        seconds: wall time, measuring included.
        changed: tensor names that are different now.
        notes: what a reader should know (a layer that was left as it was, and why).

    Example:
        >>> Won("biases moved", {"loss": 0.5}, {"loss": 0.25}, samples=64, seconds=1.0).text()
        'biases moved: loss 0.5 -> 0.25 (64 samples, 1.0 s)'
    """

    what: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    samples: int
    seconds: float
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """One line for people."""
        told = [f"{name} {self.before[name]:.4g} -> {self.after[name]:.4g}" for name in self.before]
        found = ", ".join(told) or "nothing was measured"
        return f"{self.what}: {found} ({self.samples} samples, {self.seconds:.1f} s)"
