"""Latency budgets: asked, predicted, realised, and measured again by other code in a fresh process.

    python -m benchmarks.latency_budgets                 # resumes where it stopped
    python -m benchmarks.latency_budgets --nets lstm     # some networks
    python -m benchmarks.latency_budgets --table         # print what is there

For each network a table is measured (`measure_table`), then three budgets are fitted
(`fit_latency`): 0.75, 0.5 and 0.35 of the dense latency, by the norms of the weights, ranked over
all layers, untrained. Afterwards a fresh process builds the same models from the counts and times
them in turns with the dense one, with code of its own: "realised" is that median ratio times the
dense milliseconds of the table. One thread; rows are appended as soon as they are there.

A busy machine makes every call slower, and how much slower depends on how long a call is: `busy` is
wall time over processor time of the dense model; all ratios are there by the wall and by processor
time, which is what a quiet machine shows.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateurs as sc
from secateurs.allocation import allocate
from secateurs.latency import LatencyTable, fit_latency, measure_table
from secateurs.report import environment
from secateurs.surgery.shrinking import info_of
from secateurs.tasks.models import MiniLM, RecurrentClassifier, ResNet20
from secateurs.tasks.text import minilm_folder
from secateurs.types import Budget, Counts, Scores

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "latency_budgets.jsonl"
SUMMARY = HERE / "results" / "latency_budgets.json"
SHARES = (0.75, 0.5, 0.35)
SEED = 0
METHOD = "global_normalized"
CRITERION = "l2_norm"
WITHIN = 0.10
CHECK_SECONDS = 40.0


def resnet20() -> tuple[nn.Module, Tensor]:
    """ResNet-20 on 16 images of 28 x 28 pixels."""
    return ResNet20(), torch.randn(16, 1, 28, 28)


def minilm() -> tuple[nn.Module, Tensor]:
    """MiniLM (6 layers, 384 wide, 12 heads) on 4 texts of 32 tokens."""
    return MiniLM(minilm_folder()), torch.randint(1000, 20000, (4, 32))


def lstm() -> tuple[nn.Module, Tensor]:
    """An LSTM with 256 hidden units on 16 sequences of 50 steps."""
    return RecurrentClassifier(nn.LSTM, 40, 256, 10), torch.randn(16, 50, 40)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet20": resnet20,
    "minilm": minilm,
    "lstm": lstm,
}


def built(net: str) -> tuple[nn.Module, Tensor, Scores]:
    """A network, its example, and scores; the same in every process."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model, example = NETS[net]()
    model = model.eval()
    graph = sc.trace(model, example)
    return model, example, sc.score(model, criterion=CRITERION, graph=graph)


# -- asked and predicted -----------------------------------------------------------------------


def fit(net: str) -> None:
    """The table of a network, and a row for each budget that is not there yet."""
    model, example, scores = built(net)
    file = SUMMARY.with_name(f"latency_budgets.{net}.json")
    if file.is_file():
        table = LatencyTable.load(file, scores.graph)
    else:
        table = measure_table(model, scores.graph, example)
        table.save(file)
    if not known("table", net):
        append(kind="table", net=net, parts=NETS[net].__doc__, **facts(table))
    for share in SHARES:
        if known("fit", net, share):
            continue

        def allocated(budget: Budget) -> Counts:
            return allocate(scores, budget, method=METHOD, latency=table)

        budget = Budget(latency_ms=share * table.dense_ms)
        found = fit_latency(model, scores, budget, table, allocated, example)
        print(net, share, found.text(), flush=True)
        append(kind="fit", net=net, share=share, **found.to_dict())


def facts(table: LatencyTable) -> dict[str, Any]:
    """What is worth knowing of a table."""
    return {
        "seconds": table.seconds,
        "dense_ms": table.dense_ms,
        "busy": table.busy,
        "error": table.error,
        "layers": len(table.layers),
        "points": sum(len(layer.work) for layer in table.layers),
        "bytes": len(json.dumps(table.to_dict())),
        "runtime": table.to_dict()["runtime"],
        "widths": [(w.name, w.ms, w.predicted_ms) for w in table.widths],
    }


# -- measured again ----------------------------------------------------------------------------


def check(net: str) -> None:
    """Rebuild each fitted model from its counts and time it beside the dense one."""
    model, example, scores = built(net)
    dense_ms = rows("table", net)[0]["dense_ms"]
    for row in rows("fit", net):
        share = row["share"]
        if known("check", net, share):
            continue
        counts = Counts(row["kept"], Budget(latency_ms=row["asked_ms"]))
        small = sc.shrink(model, sc.select(scores, counts), example)
        found = ratios(model, small.eval(), example)
        for clock in ("wall", "processor"):
            found[f"{clock}_realised_ms"] = found[f"{clock}_ratio"] * dense_ms
            found[f"{clock}_of_asked"] = found[f"{clock}_realised_ms"] / row["asked_ms"]
        append(kind="check", net=net, share=share, form=info_of(small).form, **found)
        of = [found[f"{clock}_of_asked"] for clock in ("wall", "processor")]
        print(
            net, share, f"by the wall {of[0]:.3f} of what was asked, by the processor {of[1]:.3f}"
        )


def ratios(dense: nn.Module, small: nn.Module, example: Tensor) -> dict[str, float]:
    """Median ratio of calls that alternate, by the wall and by processor time."""
    wall: list[float] = []
    processor: list[float] = []
    taken: list[float] = []
    with torch.inference_mode():
        for model in (dense, small) * 3:
            start = time.thread_time()
            model(example)
        calls = max(1, math.ceil(5e-3 / (time.thread_time() - start)))
        end = time.monotonic() + CHECK_SECONDS
        while time.monotonic() < end:
            pair = {}
            for name, model in (("dense", dense), ("small", small))[:: -1 if len(wall) % 2 else 1]:
                a, b = time.perf_counter(), time.thread_time()
                for _ in range(calls):
                    model(example)
                pair[name] = (time.perf_counter() - a, time.thread_time() - b)
            wall.append(pair["small"][0] / pair["dense"][0])
            processor.append(pair["small"][1] / pair["dense"][1])
            taken.append(pair["dense"][0] / calls * 1e3)
    found: dict[str, float] = {"pairs": len(wall), "dense_ms_now": statistics.median(taken)}
    for clock, line in (("wall", wall), ("processor", processor)):
        p25, ratio, p75 = statistics.quantiles(line, n=4)
        notch = 1.57 * (p75 - p25) / math.sqrt(len(line)) / ratio
        found |= {f"{clock}_ratio": ratio, f"{clock}_p25": p25, f"{clock}_p75": p75}
        found[f"{clock}_unsure"] = notch  # about 95 % of the medians, as a share
    return found


# -- rows --------------------------------------------------------------------------------------


def rows(kind: str, net: str = "") -> list[dict[str, Any]]:
    """What is there."""
    if not ROWS.is_file():
        return []
    lines = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return [r for r in lines if r["kind"] == kind and net in ("", r["net"])]


def known(kind: str, net: str, share: float | None = None) -> bool:
    return any(r.get("share") == share for r in rows(kind, net))


def append(**row: Any) -> None:
    with ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def summary() -> dict[str, Any]:
    """All rows of a budget together, and how many hold what was promised."""
    found = []
    for row in rows("fit"):
        again = [r for r in rows("check", row["net"]) if r["share"] == row["share"]]
        if not again:
            continue
        (table,) = rows("table", row["net"])
        found.append(
            {
                "net": row["net"],
                "share": row["share"],
                "dense_ms": table["dense_ms"],
                "asked_ms": row["asked_ms"],
                "predicted_ms": row["chosen"]["predicted_ms"],
                "first_predicted_ms": row["rounds"][0]["predicted_ms"],
                "first_realised_ms": row["rounds"][0]["realised_ms"],
                "fitted_ms": row["chosen"]["realised_ms"],
                "candidates": len(row["rounds"]),
                "close": row["close"],
                "note": row["note"],
                "fit_seconds": row["seconds"],
                **{k: v for k, v in again[0].items() if k not in ("kind", "net", "share")},
            }
        )
    promised = {
        clock: {
            "within 10 %": sum(abs(r[f"{clock}_of_asked"] - 1) <= WITHIN for r in found),
            "at or below": sum(r[f"{clock}_of_asked"] <= 1 for r in found),
        }
        for clock in ("wall", "processor")
    }
    return {
        "environment": environment(),
        "settings": {
            "seed": SEED, "method": METHOD, "criterion": CRITERION, "threads": 1,
            "check_seconds": CHECK_SECONDS, "cores": os.cpu_count(),
        },
        "tables": [{k: v for k, v in t.items() if k != "kind"} for t in rows("table")],
        "promised": {"of": len(found), **promised},
        "rows": found,
    }  # fmt: skip


def print_table() -> None:
    data = summary()
    print("net      share  dense  asked  predicted  fitted | again: wall (quartiles)  processor")
    for r in data["rows"]:
        low, high = (r[q] * r["dense_ms"] for q in ("wall_p25", "wall_p75"))
        print(
            f"{r['net']:9} {r['share']:4} {r['dense_ms']:6.2f} {r['asked_ms']:6.2f} "
            f"{r['first_predicted_ms']:10.2f} {r['fitted_ms']:7.2f} | {r['wall_realised_ms']:6.2f} "
            f"({low:.2f}-{high:.2f}) = {r['wall_of_asked']:.3f}  "
            f"{r['processor_realised_ms']:6.2f} = {r['processor_of_asked']:.3f}"
        )
    print(json.dumps(data["promised"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--table", action="store_true", help="print what is there")
    args = parser.parse_args()
    if not args.table:
        context = mp.get_context("spawn")
        for work in (fit, check):
            for net in args.nets:
                process = context.Process(target=work, args=(net,))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{work.__name__} of {net} failed")
        SUMMARY.write_text(json.dumps(summary(), indent=1) + "\n", encoding="utf-8")
    print_table()


if __name__ == "__main__":
    main()
