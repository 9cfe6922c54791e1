"""A search in words: what was chosen, what it costs, how it was found, and what was not tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from secateurs.report.words import number, quantity, remaining_words, sentence, shorten
from secateurs.searching.importance import Effect, effects
from secateurs.searching.results import SearchResult, Standing, Trial

__all__ = [
    "bounded",
    "confidence_words",
    "drop_words",
    "failures",
    "final_words",
    "fold_words",
    "headline",
    "how_words",
    "importance_words",
    "remaining_cells",
    "role",
    "scale",
    "size_name",
    "size_of",
    "untried_words",
    "verdict",
]


MINUS = "\N{MINUS SIGN}"


def size_name(result: SearchResult) -> str:
    """What size means in this search: "latency_ms", or a fraction that remains."""
    if result.settings.get("goal") == "fastest":
        return "latency_ms"
    return str(result.settings.get("size", "macs"))


def size_of(found: Standing, name: str) -> float | None:
    """The size of a candidate, by its name."""
    return found.latency_ms if name == "latency_ms" else found.remaining.get(name)


def _is_share(result: SearchResult) -> bool:
    folds = [f for t in result.trials for f in t.folds]
    return bool(folds) and all(f.share for f in folds)


def drop_words(result: SearchResult, value: float | None) -> str:
    """A drop in points of a hundred where the metric is a share of samples, else as it is."""
    if value is None:
        return "not available"
    text = number(float(f"{round(scale(result) * value, 12):.2g}") + 0.0)  # 0, not 1e-16
    if not _is_share(result):
        return text
    return f"{text} point{'' if text in ('1', MINUS + '1') else 's'}"


def scale(result: SearchResult) -> float:
    """100 where drops are told in points, else 1."""
    return 100.0 if _is_share(result) else 1.0


def bounded(result: SearchResult) -> bool:
    """Whether the choice promises a limit on the drop."""
    settings = result.settings
    return settings.get("goal") in ("smallest", "fastest") and settings.get("rule") == "bound"


def confidence_words(result: SearchResult) -> str:
    """The confidence of the promise: "95 %"."""
    return f"{100 * float(result.settings.get('confidence', 0.95)):g} %"


def _size_words(result: SearchResult, found: Standing) -> str:
    """What the candidate saves: "at 3.1x fewer MACs"."""
    name = size_name(result)
    size = size_of(found, name)
    if size is None or size <= 0:
        return "at a size that is not known"
    if name == "latency_ms":
        return f"at {number(float(f'{size:.3g}'))} ms a call"
    word = "smaller" if name == "bytes" else f"fewer {remaining_words(name)}"
    ratio = 1 / size
    return f"at {ratio:.1f}x {word}" if ratio >= 1.05 else f"at the same {remaining_words(name)}"


def headline(result: SearchResult) -> str:
    """What was chosen and what it costs, in one or two sentences."""
    chosen, choice, goal = result.chosen, result.choice, result.settings.get("goal")
    if chosen is None and goal == "pareto" and not choice.problem:
        n = len(result.front)
        if not n:
            return "Nothing was found: no candidate could be judged."
        first, last = result.standing(result.front[0]), result.standing(result.front[-1])
        ends = "" if n == 1 else (
            f", from {first.candidate.text} (drop {drop_words(result, first.drop)} "
            f"{_size_words(result, first)}) to {last.candidate.text} (drop "
            f"{drop_words(result, last.drop)} {_size_words(result, last)})"
        )  # fmt: skip
        are = "candidates are" if n != 1 else "candidate is"
        return f"{n} {are} beaten by no other{ends}. Which one to take is for you to say."
    if chosen is None:
        return f"Nothing was chosen: {choice.problem or 'no candidate could be judged'}."
    start = f"Chosen: {chosen.candidate.text}"
    drop = f"mean drop {drop_words(result, chosen.drop)}"
    size = _size_words(result, chosen)
    if bounded(result):
        return (
            f"{start}: {drop} ({confidence_words(result)} upper bound "
            f"{drop_words(result, chosen.upper)}, promised "
            f"{drop_words(result, result.settings.get('max_drop'))}) {size}."
        )
    if goal == "best":
        return (
            f"{start}: the best mean {result.metric}, {number(chosen.metric)} (dense "
            f"{number(chosen.dense)}), {size}. Nothing is promised."
        )
    return (
        f"{start}: the {goal} within one standard error of the best {result.metric}, {drop} "
        f"{size}. Nothing is promised."
    )


def final_words(result: SearchResult) -> str:
    """What the test split says, which is read once."""
    final = result.final
    if final is None:
        why = (
            "no candidate was chosen" if result.choice.candidate is None
            else "the chosen network has not been made yet"
        )  # fmt: skip
        return f"The test split was not touched: {why}."
    sign = 1 if result.maximize else -1
    drop = sign * (final.test_dense - final.test)
    n = final.samples.get("test")
    text = (
        f"Test split, touched once{f' ({n:,} samples)' if n else ''}: {final.metric} "
        f"{number(final.test_dense)} before, {number(final.test)} after: drop "
        f"{drop_words(result, drop)}"
    )
    if final.within is None:
        return f"{text}."
    kept = "within" if final.within else "ABOVE"
    limit = drop_words(result, result.settings.get("max_drop"))
    more = "" if final.within else (
        f". A promise with {confidence_words(result)} confidence may fail in about one case of "
        f"{1 / max(1e-9, 1 - float(result.settings['confidence'])):.0f}"
    )  # fmt: skip
    return f"{text}, {kept} the promised {limit}{more}."


def verdict(result: SearchResult, found: Standing) -> str:
    """What became of one candidate, in a few words."""
    chosen = result.choice.candidate
    if found.problem:
        return f"not judged: {found.problem}"
    words = []
    if chosen is not None and chosen.number == found.candidate.number:
        words.append("chosen")
    elif bounded(result):
        if found.passed:
            words.append("passed")
        elif found.tested:
            words.append("above the limit")
        else:
            words.append("not tested, a larger one of its family failed")
    elif result.settings.get("rule") == "one_se" and found.one_se:
        words.append("within one standard error")
    if found.front:
        words.append("on the front")
    return ", ".join(words) or "beaten by another"


def role(result: SearchResult, found: Standing) -> Literal["passed", "failed", "other"]:
    """How a candidate is drawn that was not chosen."""
    if not bounded(result) or not found.tested:
        return "other"
    return "passed" if found.passed else "failed"


def importance_words(result: SearchResult) -> list[str]:
    """Which settings mattered, one sentence each, the most important first."""
    found = effects(result.standings)
    lines = [_effect_words(result, effect) for effect in found]
    if found and found[0].share > 0 and result.settings.get("sampler") != "grid":
        lines.append(
            "The candidates were drawn, not a full grid: with few of them a setting can look "
            "important by chance."
        )
    return lines


def _effect_words(result: SearchResult, effect: Effect) -> str:
    best, worst = effect.groups[0], effect.groups[-1]
    errors = [s.se for s in result.standings if s.se is not None]
    typical = sorted(errors)[len(errors) // 2] if errors else 0.0
    gap = worst[1] - best[1]
    text = (
        f"{effect.key} explains {100 * effect.share:.0f} % of the differences between candidates: "
        f"mean drop {drop_words(result, best[1])} with {best[0]}, "
        f"{drop_words(result, worst[1])} with {worst[0]}"
    )
    if gap <= 2 * typical / max(1.0, min(best[2], worst[2])) ** 0.5:
        return f"{text}; that is no more than chance from fold to fold may do."
    return f"{text}."


def how_words(result: SearchResult) -> list[tuple[str, str]]:
    """(what, how) of the search: splits, mode, sampler, seeds, failures."""
    settings = result.settings
    folds = settings.get("folds", {})
    kinds = {
        "stratified": "stratified (class proportions kept)",
        "kfold": "plain",
        "grouped": "grouped (a group is never on both sides)",
        "bootstrap": "bootstrap (judged on what was not drawn)",
    }
    modes = {
        "refit": "refit: a new dense network for each fold, trained without its held-out part",
        "fixed": "fixed: the given dense network, judged on folds of the validation data",
    }
    sampler = str(settings.get("sampler"))
    n, seconds = len(result.standings), sum(f.seconds for t in result.trials for f in t.folds)
    judged = sum(s.judged for s in result.standings)
    rows = [
        ("goal", _goal_words(result)),
        ("folds", f"{folds.get('k')}, {kinds.get(str(folds.get('kind')), folds.get('kind'))}, "
                  f"seed {folds.get('seed')}"),
        ("dense network", modes.get(str(settings.get("mode")), str(settings.get("mode")))),
        ("candidates", f"{n} by sampler {sampler}, {judged} judged"),
        ("work", f"{sum(len(t.folds) for t in result.trials)} fold runs, {_time(seconds)} in all"),
    ]  # fmt: skip
    if result.recipe.get("seed") is not None:
        rows.append(("seed", str(result.recipe["seed"])))
    workers = result.environment.get("workers")
    return rows if workers is None else [*rows, ("workers", str(workers))]


def _goal_words(result: SearchResult) -> str:
    goal, size = str(result.settings.get("goal")), remaining_words(size_name(result))
    if bounded(result):
        what = "fastest network" if goal == "fastest" else f"network with the fewest {size}"
        limit = drop_words(result, result.settings.get("max_drop"))
        return f"{what} whose drop stays within {limit}, with {confidence_words(result)} confidence"
    if goal == "pareto":
        return "all candidates that no other one beats in metric and size together"
    if goal == "best":
        return f"best mean {result.metric}"
    return f"{goal} within one standard error of the best mean {result.metric}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def failures(result: SearchResult) -> list[tuple[str, int]]:
    """Reasons for which candidates could not be judged, and how many each."""
    reasons: dict[str, int] = {}
    for found in result.standings:
        if found.problem:
            reasons[found.problem] = reasons.get(found.problem, 0) + 1
    return sorted(reasons.items(), key=lambda r: -r[1])


def untried_words(result: SearchResult) -> list[str]:
    """What this search says nothing about."""
    space: Mapping[str, Any] = result.settings.get("space", {})
    lines = _edges(result, space)
    missing = int(result.settings.get("trials") or 0) - len(result.standings)
    if missing > 0:
        lines.append(f"{missing} of the candidates that were asked for were not tried.")
    if result.settings.get("sampler") != "grid":
        lines.append(
            f"Between the {len(result.standings)} candidates that were drawn there are others; "
            "more trials would look closer."
        )
    searched = {part for key in space for part in key.split(".")}
    fixed = [
        f"{key} ({shorten(_value(result.recipe[key]), 50)})"
        for key in ("criterion", "granularity", "allocation", "schedule", "finetune")
        if key in result.recipe and key not in searched
    ]
    if fixed:
        lines.append(f"Held fixed, as the recipe says: {', '.join(fixed)}.")
    return lines


def _edges(result: SearchResult, space: Mapping[str, Any]) -> list[str]:
    """Settings in which the chosen candidate stands at an end of what was tried."""
    chosen = result.chosen
    if chosen is None:
        return []
    lines = []
    for key, choice in space.items():
        if isinstance(choice, Mapping):
            ends = (choice["low"], choice["high"])
        else:
            numbers = [v for v in choice if isinstance(v, (int, float))
                       and not isinstance(v, bool)]  # fmt: skip
            if len(numbers) < len(choice) or len(numbers) < 2:
                continue
            ends = (min(numbers), max(numbers))
        value = chosen.candidate.values.get(key)
        if value in ends:
            side = "smallest" if value == ends[0] else "largest"
            lines.append(
                f"The chosen {key} = {_value(value)} is the {side} that was tried: what lies "
                "beyond may be better."
            )
    return lines


def _value(value: Any) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(value)


def fold_words(result: SearchResult, trial: Trial) -> str:
    """The drop of every fold: "0.2, 0.4, 0.1"."""
    factor = scale(result) * (1 if result.maximize else -1)
    drops = [round(factor * (f.dense - f.metric), 12) for f in trial.folds]
    return ", ".join(number(float(f"{d:.2g}") + 0.0) for d in drops)


def remaining_cells(found: Standing) -> str:
    """What remains, in one cell."""
    parts = [f"{100 * v:.3g} % {remaining_words(n)}" for n, v in found.remaining.items()]
    if found.latency_ms is not None:
        parts.append(quantity(found.latency_ms, "ms"))
    return sentence(", ".join(parts))
