"""Which targets a user's patterns name: `include=` and `exclude=`. A leaf.

A pattern is compared with names only: that of the target, those of its parameters' modules, and
those of the modules around them. `Graph.only` is what users call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from secateurs.errors import ConfigError

__all__ = ["Pattern", "Patterns", "Place", "pattern_text", "taken_out"]

Pattern = str | re.Pattern[str] | type[nn.Module] | nn.Module
"""A name, glob or kind, a regular expression, a module class, or a module."""
Patterns = Pattern | Iterable[Pattern]
"""One pattern or several."""


@dataclass(frozen=True)
class Place:
    """What a pattern is compared with.

    Attributes:
        name: of the target.
        kind: of its units.
        tensors: names of the parameters in which the units live.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]

    @property
    def modules(self) -> frozenset[str]:
        """Paths of the modules of its tensors and of all modules around them, the root as "".

        Example:
            >>> sorted(Place("a.b:neuron", "neuron", ("a.b.weight",)).modules)
            ['', 'a', 'a.b']
        """
        parts = [tensor.split(".")[:-1] for tensor in self.tensors]
        return frozenset(".".join(p[:n]) for p in parts for n in range(len(p) + 1))

    @property
    def names(self) -> frozenset[str]:
        """All names that a text can match."""
        return (self.modules | {self.name}) - {""}


def taken_out(
    places: Sequence[Place],
    whole: Mapping[str, str],
    include: Patterns | None,
    exclude: Patterns | None,
    model: nn.Module | None,
) -> dict[str, str]:
    """Target name -> why it goes, for targets outside `include` or inside `exclude`.

    Args:
        places: all targets.
        whole: parts that are left whole anyway, with reasons: they may be excluded again.
        include, exclude: see `Graph.only`.
        model: where module classes and modules are looked up.

    Raises:
        ConfigError: all patterns that are wrong or match nothing, or that nothing is left.
    """
    problems: list[str] = []

    def matched(option: str, pattern: Pattern) -> set[str]:
        try:
            return _matched(option, pattern, places, whole, model)
        except ConfigError as error:
            problems.append(str(error))
            return set()

    wanted, unwanted = _listed("include", include), _listed("exclude", exclude)
    inside = [matched("include", pattern) for pattern in wanted]
    outside = {pattern_text(p, model): matched("exclude", p) for p in unwanted}
    if problems:
        raise ConfigError("\n  ".join(dict.fromkeys(problems)))
    out = {}
    if include is not None:
        texts = ", ".join(pattern_text(p, model) for p in wanted)
        stay = set().union(*inside)
        out = {
            p.name: f"excluded by the user: not in {texts}" for p in places if p.name not in stay
        }
    for place in places:
        reason = next((text for text, names in outside.items() if place.name in names), None)
        if reason is not None:
            out[place.name] = f"excluded by the user: {reason}"
    if places and len(out) == len(places):
        raise ConfigError("include and exclude leave no target; name less in exclude")
    return out


def _listed(option: str, given: Patterns | None) -> list[Pattern]:
    """One or several patterns as a list, checked."""
    if given is None:
        return []
    several = isinstance(given, Iterable) and not isinstance(given, (str, type, nn.Module))
    patterns: list[Any] = [*given] if several else [given]  # type: ignore[misc]
    if not patterns:
        raise ConfigError(f"{option} is empty; name something, or leave it away")
    for pattern in patterns:
        is_class = isinstance(pattern, type) and issubclass(pattern, nn.Module)
        if pattern == "" or not (is_class or isinstance(pattern, (str, re.Pattern, nn.Module))):
            raise ConfigError(
                f"{option}: a pattern is a name, a glob, a kind, a regular expression, a module "
                f"class or a module; got {pattern!r}"
            )
    return patterns


def pattern_text(pattern: Pattern, model: nn.Module | None = None) -> str:
    """A pattern as a user would write it.

    Example:
        >>> pattern_text("layer3.*"), pattern_text(re.compile("fc[12]")), pattern_text(nn.Linear)
        ('layer3.*', 're:fc[12]', 'Linear')
    """
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern):
        return f"re:{pattern.pattern}"
    if isinstance(pattern, type):
        return pattern.__name__
    paths = [] if model is None else _paths(model, lambda m: m is pattern)
    return min(paths, default="") or type(pattern).__name__


def _paths(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> set[str]:
    """Every name of the modules that are wanted."""
    return {n for n, m in model.named_modules(remove_duplicate=False) if wanted(m)}


def _matched(
    option: str,
    pattern: Pattern,
    places: Sequence[Place],
    whole: Mapping[str, str],
    model: nn.Module | None,
) -> set[str]:
    """Names of the targets that a pattern matches."""
    test = _test(option, pattern, model)
    found = {place.name for place in places if test(place)}
    if not found and isinstance(pattern, str):
        found = {place.name for place in places if place.kind == pattern}
    if found:
        return found
    wanted = pattern_text(pattern, model)
    text = f"{option} {wanted!r}"
    # A part that is left whole is named after a parameter, a module, or a module and a kind.
    left = [n for n in whole if test(Place(n, "", (n, f"{n.partition(':')[0]}.x")))]
    if left and option == "exclude":
        return set()
    if left:
        raise ConfigError(f"{text} matches what must be left whole: {left[0]}: {whole[left[0]]}")
    known = {name for place in places for name in (place.kind, *place.names)}
    near = get_close_matches(wanted, known, n=1, cutoff=0.5)
    raise ConfigError(
        f"{text} matches no target."
        + (f" Did you mean {near[0]!r}?" if near else "")
        + " (Names of targets: graph.summary())"
    )


def _test(option: str, pattern: Pattern, model: nn.Module | None) -> Callable[[Place], bool]:
    """Whether a pattern matches a place, kinds apart."""
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            pattern = re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{option} {pattern!r}: not a regular expression: {error}") from error
    if isinstance(pattern, re.Pattern):
        search = pattern.search
        return lambda place: any(search(name) for name in place.names)
    if isinstance(pattern, str):
        glob = pattern
        return lambda place: any(glob == n or fnmatchcase(n, glob) for n in place.names)
    if model is None:
        raise ConfigError(
            f"{option} {pattern_text(pattern)!r} is a module or a module class: give model= too"
        )
    kind = pattern
    paths = _paths(model, lambda m: isinstance(m, kind) if isinstance(kind, type) else m is kind)
    if not paths:
        raise ConfigError(
            f"{option} {pattern_text(pattern)!r}: the model has no such module; "
            "give a class or a module of the model that was traced"
        )
    return lambda place: bool(paths & place.modules)
