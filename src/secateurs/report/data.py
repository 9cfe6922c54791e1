"""The report of a run as data: frozen rows of numbers and words, with a JSON round trip.

Nothing here draws. A number that is missing or not finite is `None` in JSON and "not available"
on the page. Fractions are of the dense model, in [0, 1]; metrics are in the user's own unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from secateurs.errors import ConfigError, FileFormatError
from secateurs.types import Exclusion

__all__ = [
    "FORMAT",
    "ControlRow",
    "DiagnosisRow",
    "Histogram",
    "MetricRow",
    "Report",
    "StepRow",
    "TargetRow",
    "VerificationRow",
    "plain",
]

FORMAT = 1
"""Version of the JSON form."""

_STRICT_KEYS: dict[str, str] = {"extra": "forbid"}


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges.

    Attributes:
        edges: ascending, one more than `counts`; both are empty when there was no value.
        counts: values in [edges[i], edges[i + 1]); the last bin includes its upper edge.
        zeros: exact zeros that were counted apart and are in no bin.
        ignored: values that are not finite (a score of -inf: removed earlier).
        scale: "log" when the edges grow by a constant factor.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    zeros: int = 0
    ignored: int = 0
    scale: Literal["linear", "log"] = "linear"

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS

    def __post_init__(self) -> None:
        if len(self.edges) != (len(self.counts) + 1 if self.counts else 0):
            raise ConfigError(
                f"a histogram of {len(self.counts)} bins needs one edge more than bins "
                f"(or none at all); got {len(self.edges)} edges"
            )

    @property
    def total(self) -> int:
        """Values seen, with the zeros, without the ignored ones."""
        return sum(self.counts) + self.zeros


@dataclass(frozen=True)
class MetricRow:
    """One line of the before and after table.

    Attributes:
        name: what is measured, e.g. "MACs" or "test accuracy".
        unit: "bytes", "ms", "s" or "us" are formatted and compared as such; "" is a plain number.
        before: of the dense model.
        after: of the pruned model.
        better: which way is better.
        note: how it was measured.
        spread_before: (low, high) around `before`, e.g. the quartiles of a latency.
        spread_after: the same around `after`.
    """

    name: str
    unit: str
    before: float | None
    after: float | None
    better: Literal["higher", "lower"] = "lower"
    note: str = ""
    spread_before: tuple[float | None, float | None] | None = None
    spread_after: tuple[float | None, float | None] | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS


@dataclass(frozen=True)
class StepRow:
    """One step of the schedule.

    Attributes:
        step: 1 for the first cut.
        fraction: of the schedule, in [0, 1].
        remaining: fraction of the dense model for "units", "params" and "macs".
        metric_masked: validation metric right after the cut.
        metric_healed: validation metric after the fine-tuning that follows.
        loss: training loss at the end of the step.
        rolled_back: the step lost too much and was undone: it is not in the model.
        optimizer_step: of the one fine-tuning in which the cut was made; None when the step has a
            fine-tuning of its own.
    """

    step: int
    fraction: float | None
    remaining: dict[str, float | None]
    metric_masked: float | None = None
    metric_healed: float | None = None
    loss: float | None = None
    rolled_back: bool = False
    optimizer_step: int | None = None

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS


@dataclass(frozen=True)
class TargetRow:
    """What happened to one target, and why.

    Attributes:
        name: name of the target.
        kind: its kind, e.g. "channel".
        n_units: units of the dense model.
        n_kept: units kept.
        members: parameters that its units run through.
        histogram: of its scores.
        threshold: the score below which units went; None if there is no such single number.
        reason: one sentence: criterion, threshold or budget, how many.
    """

    name: str
    kind: str
    n_units: int
    n_kept: int
    members: tuple[str, ...] = ()
    histogram: Histogram | None = None
    threshold: float | None = None
    reason: str = ""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS


@dataclass(frozen=True)
class DiagnosisRow:
    """Signal and gradient of one layer; `flag` says what is wrong with it ("" or "ok": nothing)."""

    layer: str
    activation_rms: float | None = None
    gradient_rms: float | None = None
    gradient_norm: float | None = None
    flag: str = ""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS

    @property
    def flagged(self) -> bool:
        """Whether the diagnosis found something wrong with this layer."""
        return self.flag not in ("", "ok")


@dataclass(frozen=True)
class VerificationRow:
    """Whether the small model computes what the masked one computes.

    Attributes:
        error: max |a - b| / (1 + max |a|) over the outputs.
        tolerance: the largest error that passes.
        form: "module" (the user's own class) or "graph" (the rewritten module).
        dtype: in which the comparison was made, e.g. "float32".
        comparable: False for a model that draws random numbers in its forward pass.
        text: what a reader should know besides.
    """

    error: float | None
    tolerance: float | None
    form: str = ""
    dtype: str = ""
    comparable: bool = True
    text: str = ""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS

    @property
    def passed(self) -> bool:
        """Whether the comparison was possible and its error is within the tolerance."""
        return (
            self.comparable
            and self.error is not None
            and self.tolerance is not None
            and bool(self.error <= self.tolerance)
        )


@dataclass(frozen=True)
class ControlRow:
    """One criterion (or control) at the same budget, over several seeds.

    Attributes:
        name: e.g. "taylor", "random", "magnitude".
        mean: of the metric over the seeds.
        standard_error: of that mean; None with a single seed.
        seeds: the seeds that were run.
        difference: mean paired difference from the dense model of the same seed.
        difference_error: standard error of that difference.
        role: "method" marks the one that made this model.
    """

    name: str
    mean: float | None
    standard_error: float | None = None
    seeds: tuple[int, ...] = ()
    difference: float | None = None
    difference_error: float | None = None
    role: Literal["method", "control"] = "control"

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS


def _version() -> str:
    try:
        return installed_version("secateurs")
    except PackageNotFoundError:
        return "not installed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Report:
    """Everything worth reading about one pruning run.

    Args:
        title: what was pruned.
        headline: one sentence in words: what was asked and what was reached.
        met: whether the budget or threshold was met.
        asked: what was asked, e.g. `{"macs": 0.2}`.
        reached: remaining fraction of "units", "params" and "macs".
        metric: name of the metric in `steps` and `controls`.
        metric_better: which way it is better.
        metric_dense: its validation value for the dense model.
        rows: the before and after table.
        verification: None if nothing was compared.
        controls: the method and its controls.
        steps: along the schedule.
        targets: what was kept, in execution order.
        excluded: what was left whole.
        weights_before: tensor name -> its weights in the dense model.
        weights_after: the same for the pruned model.
        diagnosis_before: per layer, dense.
        diagnosis_after: per layer, pruned.
        notes: what a reader should know.
        next_steps: what to try next.
        recipe: how to run it again.
        environment: from [`environment`][secateurs.report.gather.environment].
        version: of secateurs.
        created: ISO time.

    Example:
        >>> report = Report(title="LeNet", headline="Asked for half, got half.", met=True)
        >>> Report.from_dict(report.to_dict()) == report
        True
    """

    title: str
    headline: str
    met: bool
    asked: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, float | None] = field(default_factory=dict)
    metric: str = "metric"
    metric_better: Literal["higher", "lower"] = "higher"
    metric_dense: float | None = None
    rows: tuple[MetricRow, ...] = ()
    verification: VerificationRow | None = None
    controls: tuple[ControlRow, ...] = ()
    steps: tuple[StepRow, ...] = ()
    targets: tuple[TargetRow, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    weights_before: dict[str, Histogram] = field(default_factory=dict)
    weights_after: dict[str, Histogram] = field(default_factory=dict)
    diagnosis_before: tuple[DiagnosisRow, ...] = ()
    diagnosis_after: tuple[DiagnosisRow, ...] = ()
    notes: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    version: str = field(default_factory=_version)
    created: str = field(default_factory=_now)

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT_KEYS

    def to_dict(self) -> dict[str, Any]:
        """The report as lists, dicts, text, numbers and None: ready for `json.dumps`.

        Raises:
            ConfigError: the recipe or environment holds something JSON cannot.
        """
        return {"format": FORMAT, **plain(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote.

        Raises:
            FileFormatError: another format version, or rows that are not what they claim to be;
                all faults are listed.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise FileFormatError(
                f"a report needs format {FORMAT}, got {got!r}: it is no report.json, or another "
                "version of secateurs wrote it"
            )
        body = {key: value for key, value in data.items() if key != "format"}
        try:
            return TypeAdapter(cls).validate_python(body)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'report'}: {e['msg']}" for e in error.errors()
            )
            raise FileFormatError(f"not a report of format {FORMAT}: {faults}") from error


def plain(value: Any, where: str = "report") -> Any:
    """`value` as JSON can hold it; numbers that are not finite become None.

    Raises:
        ConfigError: a value of another kind; `where` names it.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.dim()):
        return plain(value.tolist(), where)
    if isinstance(value, (Tensor, np.generic)):
        return plain(value.item(), where)
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    raise ConfigError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; "
        "use numbers, text, lists and dicts"
    )
