"""What people read after a run: the report as data, and the report as a page.

`data` holds plain numbers and words (a JSON file, no drawing), `gather` reads them off tensors
and the machine; `render` and `write` turn them into one HTML file that needs nothing else. Drawing
needs the extra `secateurs[report]`, and asks for it when it is used: the data works without.
"""

from secateurs.report.data import (
    ControlRow,
    DiagnosisRow,
    Histogram,
    MetricRow,
    Report,
    StepRow,
    TargetRow,
    VerificationRow,
)
from secateurs.report.gather import environment, score_histogram, weight_histograms
from secateurs.report.html import check_available, render, write

__all__ = [
    "ControlRow",
    "DiagnosisRow",
    "Histogram",
    "MetricRow",
    "Report",
    "StepRow",
    "TargetRow",
    "VerificationRow",
    "check_available",
    "environment",
    "render",
    "score_histogram",
    "weight_histograms",
    "write",
]
