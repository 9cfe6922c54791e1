"""A made-up report with everything a real one has, for tests and for looking at."""

from __future__ import annotations

from dataclasses import replace

import torch

from secateurs.report import (
    ControlRow,
    DiagnosisRow,
    Histogram,
    MetricRow,
    Report,
    StepRow,
    TargetRow,
    VerificationRow,
    score_histogram,
    weight_histograms,
)
from secateurs.types import Exclusion

_LAYERS = (
    ("stem.conv", 16, 12),
    ("stages.0.blocks.0.conv1", 32, 17),
    ("stages.0.blocks.1.conv1", 32, 9),
    ("stages.1.blocks.0.conv1", 64, 22),
    ("stages.1.blocks.1.conv1", 64, 3),
    ("stages.2.blocks.0.attention.qkv", 8, 4),
    ("stages.2.blocks.1.a_module_with_an_exceedingly_long_name.projection.conv1", 128, 41),
    ("head.hidden", 128, 128),
)


def fake_rows() -> tuple[MetricRow, ...]:
    return (
        MetricRow("test accuracy", "", 0.9889, 0.9822, "higher", "360 images, read once"),
        MetricRow("parameters", "", 1_234_568, 283_950),
        MetricRow("non-zeros", "", 1_234_568, 141_975, note="stored weights that are not zero"),
        MetricRow("MACs", "", 41_652_000, 8_172_000, note="multiply-adds for one sample"),
        MetricRow("size on disk", "bytes", 4_953_112, 1_146_840, note="safetensors"),
        MetricRow(
            "latency, batch 1",
            "ms",
            1.214,
            1.187,
            note="median and quartiles of 200 runs, one thread",
            spread_before=(1.18, 1.26),
            spread_after=(1.15, 1.23),
        ),
        MetricRow(
            "latency, batch 256",
            "ms",
            88.4,
            24.1,
            note="median and quartiles of 50 runs, one thread",
            spread_before=(86.9, 91.0),
            spread_after=(23.8, 24.9),
        ),
        MetricRow("peak memory", "bytes", 61_000_000, None, note="the runtime does not say"),
    )


def fake_steps() -> tuple[StepRow, ...]:
    masked = (0.981, 0.943, 0.902, 0.871, 0.946)
    healed = (0.989, 0.987, 0.984, 0.983, 0.981)
    return tuple(
        StepRow(
            step=i + 1,
            fraction=(i + 1) / 5,
            remaining={"units": r + 0.1, "params": r + 0.04, "macs": r},
            metric_masked=masked[i],
            metric_healed=healed[i],
            loss=0.05 + 0.013 * i,
        )
        for i, r in enumerate((0.61, 0.39, 0.271, 0.214, 0.1962))
    )


def fake_targets() -> tuple[TargetRow, ...]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, (name, n_units, n_kept) in enumerate(_LAYERS):
        noise = torch.randn(n_units, generator=generator)
        scores = (1.5 * noise).exp() * 1e-4 if i % 2 else noise
        threshold = scores.sort().values[n_units - n_kept].item() if n_kept < n_units else None
        if i == 3:
            scores[:6] = -torch.inf
        kind = "head" if "qkv" in name else "neuron" if "head" in name else "channel"
        rows.append(
            TargetRow(
                name=f"{name}:{kind}",
                kind=kind,
                n_units=n_units,
                n_kept=n_kept,
                members=(
                    f"{name}.weight",
                    f"{name}.bias",
                    f"{name}.norm.weight",
                    f"{name}.norm.bias",
                    "next.conv.weight",
                ),
                histogram=score_histogram(scores),
                threshold=threshold,
                reason=f"taylor under macs = 0.2: {n_units - n_kept} of {n_units} removed",
            )
        )
    return tuple(rows)


def fake_weights() -> tuple[dict[str, Histogram], dict[str, Histogram]]:
    torch.manual_seed(0)
    before = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3),
        torch.nn.Conv2d(16, 32, 3),
        torch.nn.Linear(256, 128),
        torch.nn.Linear(128, 10),
    )
    dense = weight_histograms(before)
    with torch.no_grad():
        for i, p in enumerate(p for p in before.parameters() if p.dim() >= 2):
            if i < 3:
                p[p.abs() < (0.3 + 0.2 * i) * p.abs().max()] = 0.0
                p.mul_(1.15)
    return dense, weight_histograms(before)


def fake_diagnosis(shrink: float, flags: dict[int, str]) -> tuple[DiagnosisRow, ...]:
    return tuple(
        DiagnosisRow(
            layer=name,
            activation_rms=0.8 + 0.02 * i,
            gradient_rms=2e-5 * shrink * 2.2**i,
            gradient_norm=3e-4 * shrink * 2.4**i,
            flag=flags.get(i, "ok"),
        )
        for i, (name, _, _) in enumerate(_LAYERS)
    )


def fake_report() -> Report:
    """A channel-pruned image classifier: most things went well, some did not."""
    before, after = fake_weights()
    return Report(
        title="digits-resnet, channels by taylor",
        headline=(
            "At most 20 % of the MACs were to remain: 19.6 % do, "
            "and test accuracy went from 98.9 % to 98.2 %."
        ),
        met=True,
        asked={"macs": 0.2},
        reached={"units": 0.412, "params": 0.23, "macs": 0.1962},
        metric="validation accuracy",
        metric_dense=0.991,
        rows=fake_rows(),
        verification=VerificationRow(
            3.4e-7, 1e-5, "module", "float32", text="64 example inputs; eval mode."
        ),
        controls=(
            ControlRow("taylor", 0.9812, 0.0011, (0, 1, 2), -0.0087, 0.0009, "method"),
            ControlRow("magnitude", 0.9741, 0.0019, (0, 1, 2), -0.0158, 0.0017),
            ControlRow("random", 0.9528, 0.0043, (0, 1, 2), -0.0371, 0.0041),
        ),
        steps=fake_steps(),
        targets=fake_targets(),
        excluded=(
            Exclusion("head.out.weight", "its outputs are the outputs of the model", "linear"),
            Exclusion("head.out.bias", "its outputs are the outputs of the model", "linear"),
            Exclusion(
                "stages.2.blocks.0.relative_position_table",
                "an operator without a rule touches it",
                "aten.unique_dim, nets.py:214: table = torch.unique(self.table, dim=0)",
            ),
        ),
        weights_before=before,
        weights_after=after,
        diagnosis_before=fake_diagnosis(1.0, {}),
        diagnosis_after=fake_diagnosis(0.31, {0: "vanishing", 4: "collapsed"}),
        notes=(
            "Batch norm statistics were estimated again after the last cut.",
            "Latency at batch 1 did not change: at this size, calling the operators dominates.",
        ),
        next_steps=(
            "Set a floor per layer: stages.1.blocks.1.conv1 kept 3 of 64 channels.",
            "Fine-tune longer: the loss was still falling at the last step.",
        ),
        recipe={
            "task": "digits-resnet",
            "criterion": "taylor",
            "granularity": "channel",
            "budget": {"macs": 0.2},
            "schedule": {"curve": "cubic", "steps": 5},
            "finetune": {"epochs": 3, "lr": 0.001, "distill": 0.5},
            "seed": 0,
        },
        environment={
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "numpy": "2.4.6",
            "platform": "Linux-6.1-x86_64",
            "cpu": "A processor of 2.5 GHz",
            "threads": 2,
            "seed": 0,
        },
        version="0.1.0",
        created="2026-01-31T12:00:00+00:00",
    )


def hostile_report() -> Report:
    """The same with names that attack the page, numbers that do not exist and bad luck."""
    nasty = '"><script>alert(1)</script>\n$x_1^2$ & \N{SNOWMAN}' + "é" * 300
    report = fake_report()
    nan = float("nan")
    return replace(
        report,
        title=nasty,
        headline=nasty,
        met=False,
        asked={nasty: 0.2},
        reached={"macs": nan, nasty: float("inf")},
        metric=nasty,
        metric_dense=nan,
        rows=(MetricRow(nasty, nasty, nan, float("inf"), note=nasty), *report.rows),
        verification=VerificationRow(nan, 1e-5, nasty, nasty, text=nasty),
        controls=(
            ControlRow(nasty, nan, nan, (), nan, nan, "method"),
            ControlRow(nasty, 0.5),
        ),
        steps=(
            StepRow(1, nan, {"macs": nan}, nan, nan, nan),
            StepRow(2, 0.5, {"macs": 0.5}, 0.5, nan, float("inf")),
        ),
        targets=(
            TargetRow(nasty, nasty, 0, 0, (nasty,) * 9, Histogram((), ()), nan, nasty),
            TargetRow(nasty, "channel", 4, 2, (), Histogram((0.0, 1.0), (4,)), 0.5, nasty),
        ),
        excluded=(Exclusion(nasty, nasty, nasty),),
        weights_before={nasty: Histogram((0.0, 1.0), (4,)), "gone": Histogram((), (), 7)},
        weights_after={nasty: Histogram((), (), 4)},
        diagnosis_before=(DiagnosisRow(nasty, nan, nan, nan, nasty),),
        diagnosis_after=(DiagnosisRow(nasty, 0.0, 0.0, 0.0, nasty),),
        notes=(nasty,),
        next_steps=(nasty,),
        recipe={nasty: nan},
        environment={nasty: nasty},
    )
