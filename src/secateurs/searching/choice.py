"""Which candidate to take, and why: pure functions over trials.

    judge(trials, Search, Design) -> standings of all candidates
    decide(standings, Search, ...) -> Choice, explained in words

"smallest" and "fastest" test candidates from the largest to the smallest in each family (all other
choices equal) and stop at the first whose bound exceeds the limit. A search over hundreds of
candidates then errs no more often than a single test: a family that ends with too small a candidate
has passed the first one that is too small in truth, by a single test at its level. The level of all
is shared equally among the families. All that passed keep the promise together, so among equals the
better metric may decide.

References:
    Wiens, A fixed sequence Bonferroni procedure for testing multiple endpoints, Pharmaceutical
    Statistics 2, 2003. Angelopoulos, Bates, Candes, Jordan and Lei, Learn then Test, 2021,
    arXiv:2110.01052. Breiman, Friedman, Olshen and Stone, Classification and Regression Trees,
    1984: one standard error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from secateurs.searching.config import Search
from secateurs.searching.results import Choice, Standing, Trial
from secateurs.searching.statistics import Design, family, standing

__all__ = ["decide", "families", "front", "judge"]

ADAPTIVE = ("tpe", "nsga2")
ALIKE = 0.01
"""Sizes that differ by no more than this share count as equal: then the metric decides."""


def families(trials: Sequence[Trial]) -> int:
    """Number of families among the candidates, those that failed included."""
    return len({_key(family(t.candidate.values)) for t in trials})


def _key(values: Mapping[str, object]) -> str:
    return json.dumps(values, sort_keys=True)


def judge(trials: Sequence[Trial], search: Search, design: Design) -> list[Standing]:
    """The standing of every candidate, by number, with all flags.

    Args:
        trials: finished or not, in any order.
        search: what is wanted.
        design: of the folds; its level and limit are set here.
    """
    level = (1 - search.confidence) / max(1, families(trials))
    design = replace(design, level=level, max_drop=search.max_drop)
    ordered = sorted(trials, key=lambda t: t.candidate.number)
    found = [standing(t, design) for t in ordered]
    # Folds that all show the same drop do not show its spread: take that of the steadiest other.
    least = min((s.spread for s in found if s.spread), default=0.0)
    found = [
        standing(t, design, least) if s.spread == 0 else s
        for t, s in zip(ordered, found, strict=True)
    ]
    found = _one_se(found, design.maximize)
    if search.bounded:
        found = _sequences(found, search)
    ahead = set(front(found, design.maximize))
    return [replace(s, front=s.candidate.number in ahead) for s in found]


def size_of(found: Standing, search: Search) -> float | None:
    """What "smallest" or "fastest" counts."""
    return found.latency_ms if search.goal == "fastest" else found.remaining.get(search.size)


def _sequences(found: list[Standing], search: Search) -> list[Standing]:
    """Fixed-sequence tests, family by family."""
    by_family: dict[str, list[tuple[float, int, int]]] = {}
    for place, one in enumerate(found):
        size = size_of(one, search)
        if one.judged and size is not None:
            row = (-size, one.candidate.number, place)
            by_family.setdefault(_key(one.family), []).append(row)
    done = list(found)
    for rows in by_family.values():
        for _, _, place in sorted(rows):
            one = found[place]
            done[place] = replace(one, tested=True, passed=one.within)
            if not one.within:
                break
    return done


def _one_se(found: list[Standing], maximize: bool) -> list[Standing]:
    """Flag those within one standard error of the best mean metric."""
    best = _best(found, maximize)
    if best is None or best.metric is None or best.metric_se is None:
        return found
    sign = 1 if maximize else -1
    least = sign * best.metric - best.metric_se - 1e-12
    return [replace(s, one_se=s.metric is not None and sign * s.metric >= least) for s in found]


def _best(found: Sequence[Standing], maximize: bool) -> Standing | None:
    """The best mean metric; of equals the one with the fewest MACs, then the first."""
    sign = -1 if maximize else 1
    judged = [s for s in found if s.judged and s.metric is not None]
    return min(
        judged,
        key=lambda s: (sign * (s.metric or 0.0), s.remaining.get("macs", 0.0), s.candidate.number),
        default=None,
    )


def front(found: Sequence[Standing], maximize: bool) -> list[int]:
    """Numbers of the candidates that no other one beats, from the largest to the smallest.

    One beats another if its mean metric, MACs, bytes and latency (as far as all have them) are at
    least as good, and one of them is better.
    """
    judged = [s for s in found if s.judged and s.metric is not None]
    names = [n for n in ("macs", "bytes") if all(n in s.remaining for s in judged)]
    timed = bool(judged) and all(s.latency_ms is not None for s in judged)

    def costs(one: Standing) -> list[float]:
        metric = (one.metric or 0.0) * (-1 if maximize else 1)
        return [metric, *(one.remaining[n] for n in names),
                *([one.latency_ms or 0.0] if timed else [])]  # fmt: skip

    points = {s.candidate.number: costs(s) for s in judged}
    ahead = [
        number for number, mine in points.items()
        if not any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True))
            for other in points.values()
        )
    ]  # fmt: skip
    return sorted(ahead, key=lambda number: ([-c for c in points[number][1:]], number))


def decide(
    found: Sequence[Standing], search: Search, *, metric: str = "metric", maximize: bool = True
) -> Choice:
    """The choice of a search, with its reasons; without a candidate where nothing fits.

    Args:
        found: from `judge`.
        search: goal, rule and limit.
        metric: name of the main metric.
        maximize: whether a larger metric is better.
    """
    judged = [s for s in found if s.judged]
    if not judged:
        why = "; ".join(dict.fromkeys(s.problem for s in found)) or "nothing was tried"
        return Choice(None, (), problem=f"no candidate could be judged: {why}")
    start = _compared(found, judged, metric)
    if search.goal == "pareto":
        ahead = front(judged, maximize)
        return Choice(None, (*start, (
            f"{len(ahead)} of them are not beaten by another in metric and size together; which "
            "of these to take is for you to say (the test split stays unread)."
        )))  # fmt: skip
    untested = () if search.max_drop is None else (
        "max_drop is not tested under this goal and rule: nothing is promised.",
    )  # fmt: skip
    if search.goal == "best":
        best = _best(judged, maximize)
        assert best is not None
        return Choice(
            best.candidate,
            (*start, f"Best mean {metric}: {_figures(best)}.", *_gap(judged, best, maximize),
             *untested),
        )  # fmt: skip
    if search.rule == "one_se":
        return _decide_one_se(judged, search, metric, maximize, (*start,), untested)
    return _decide_bound(found, judged, search, metric, start)


def _compared(found: Sequence[Standing], judged: Sequence[Standing], metric: str) -> list[str]:
    folds = judged[0].n_folds
    lines = [
        f"{len(judged)} candidates were judged by {metric} on {folds} held-out parts each, always "
        "against the dense network of the same part."
    ]
    if len(judged) < len(found):
        first = next(s for s in found if s.problem)
        lines.append(
            f"{len(found) - len(judged)} could not be judged; the first: {first.candidate.text}: "
            f"{first.problem}."
        )
    return lines


def _figures(one: Standing) -> str:
    """A candidate in one clause: what it is, what it keeps, what it loses."""
    kept = ", ".join(f"{100 * v:.3g} % of the {_words(n)}" for n, v in one.remaining.items())
    time = "" if one.latency_ms is None else f", {one.latency_ms:.3g} ms"
    text = f"{one.candidate.text} (keeps {kept}{time}): mean drop {_number(one.drop)}"
    return text if one.upper is None else f"{text}, upper bound {_number(one.upper)}"


def _words(name: str) -> str:
    return {"macs": "MACs", "params": "parameters"}.get(name, name)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


def _gap(judged: Sequence[Standing], best: Standing, maximize: bool) -> list[str]:
    rest = [s for s in judged if s.candidate.number != best.candidate.number]
    second = _best(rest, maximize)
    if second is None or second.metric is None or best.metric is None:
        return []
    gap = abs(best.metric - second.metric)
    close = best.metric_se is not None and gap <= best.metric_se
    return [
        f"The next one, {second.candidate.text}, is {gap:.4f} behind"
        + (": less than one standard error, so chance may have decided." if close else ".")
    ]


def _decide_one_se(
    judged: Sequence[Standing], search: Search, metric: str, maximize: bool,
    start: tuple[str, ...], end: tuple[str, ...],
) -> Choice:  # fmt: skip
    best = _best(judged, maximize)
    near = [s for s in judged if s.one_se and size_of(s, search) is not None]
    if best is None or not near:
        return Choice(None, start, problem=_no_size(search))
    chosen = min(near, key=lambda s: (size_of(s, search) or 0.0, s.candidate.number))
    return Choice(chosen.candidate, (
        *start,
        f"Best mean {metric}: {best.candidate.text}, {_number(best.metric)} with standard error "
        f"{_number(best.metric_se)}.",
        f"{len(near)} are within one standard error of it; the {search.goal} of these is "
        f"{_figures(chosen)}.",
        *end,
    ))  # fmt: skip


def _no_size(search: Search) -> str:
    what = "latency" if search.goal == "fastest" else search.size
    return f"no candidate has a figure for {what}, which the goal {search.goal!r} needs"


def _decide_bound(
    found: Sequence[Standing], judged: Sequence[Standing], search: Search, metric: str,
    start: Sequence[str],
) -> Choice:  # fmt: skip
    """The smallest (fastest) that passed its sequence."""
    n_families = len({_key(s.family) for s in found})
    level = (1 - search.confidence) / n_families
    limit = f"{search.max_drop:g}"
    sized = [s for s in judged if size_of(s, search) is not None]
    if not sized:
        return Choice(None, tuple(start), level, _no_size(search))
    rule = (
        f"The limit: {metric} may drop by {limit}, with confidence {search.confidence:g}. In each "
        f"family (all but the size equal) candidates are tested from the "
        f"{'slowest' if search.goal == 'fastest' else 'largest'} on, until one fails."
    )
    shared = [] if n_families == 1 else [
        f"{n_families} families share the error of {1 - search.confidence:.3g}: each is tested at "
        f"{level:.3g}."
    ]  # fmt: skip
    if search.sampler in ADAPTIVE:
        shared.append(
            f"The sampler {search.sampler!r} chose candidates after seeing earlier results on the "
            "same folds, so the confidence is not exact; a grid keeps it."
        )
    why = [*start, rule, *shared]
    passed = [s for s in sized if s.passed]
    if not passed:
        nearest = min(sized, key=lambda s: (s.upper or 0.0, s.candidate.number))
        return Choice(None, tuple(why), level, (
            f"no candidate keeps {metric} within a drop of {limit} with confidence "
            f"{search.confidence:g}. Nearest: {_figures(nearest)} over {nearest.n_folds} folds. "
            "Try larger candidates, longer fine-tuning, more validation samples or folds, or a "
            "larger max_drop"
        ))  # fmt: skip
    least = min(size_of(s, search) or 0.0 for s in passed)
    alike = [s for s in passed if (size_of(s, search) or 0.0) <= least * (1 + ALIKE)]
    chosen = min(alike, key=lambda s: (s.drop or 0.0, size_of(s, search), s.candidate.number))
    why.append(f"Chosen, the {search.goal} that passed: {_figures(chosen)}.")
    why.append(
        "The bound is on the drop of one more network made like these, measured on as many samples "
        "as a held-out part has."
    )
    if len(alike) > 1:
        why.append(
            f"{len(alike)} that passed differ by at most {100 * ALIKE:g} % in size; of these it "
            "has the smallest mean drop."
        )
    why += _why_not(sized, chosen, search)
    why += _about_spread(chosen)
    return Choice(chosen.candidate, tuple(why), level)


def _about_spread(chosen: Standing) -> list[str]:
    if chosen.spread == 0:
        return ["All folds of all candidates show equal drops: how far they spread is not known."]
    if chosen.spread is None or chosen.floor < chosen.spread:
        return []
    return [
        "Its folds differ by less than so few samples can show, so their spread was taken as "
        f"{chosen.floor:.4f}: as if one more sample had changed, or, where the metric does not "
        "count samples, that of the steadiest other candidate."
    ]


def _why_not(sized: Sequence[Standing], chosen: Standing, search: Search) -> list[str]:
    """Why nothing smaller: in the family of the chosen one, then in the others."""
    own, size = _key(chosen.family), size_of(chosen, search) or 0.0
    smaller = [s for s in sized if (size_of(s, search) or 0.0) < size]
    word = "faster" if search.goal == "fastest" else "smaller"
    if not smaller:
        return [f"Nothing {word} was tried: the limit may allow more."]
    failed = [s for s in smaller if s.tested and not s.passed]
    lines = [
        f"Not {one.candidate.text}: its bound {_number(one.upper)} is above the limit "
        f"(mean drop {_number(one.drop)})."
        for one in sorted(failed, key=lambda s: _key(s.family) != own)
    ]
    after = [s for s in smaller if not s.tested]
    lucky = [s for s in after if s.within]
    if lucky:
        lines.append(
            f"{len(lucky)} {word} ones after a failed one have a bound within the limit; they are "
            "not taken, because choosing the lucky ones would break the promise."
        )
    return lines
