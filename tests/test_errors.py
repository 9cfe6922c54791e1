"""Errors are also the builtins that fit, and wrong names are answered with the nearest one."""

from __future__ import annotations

import pytest

from secateurs import errors
from secateurs.cli import main
from secateurs.errors import ConfigError, PruningError, choose

BUILTINS = {
    "BudgetError": ValueError,
    "CaptureError": RuntimeError,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "FileFormatError": OSError,
    "MissingDependencyError": ImportError,
    "RankError": RuntimeError,
    "ScoringError": ArithmeticError,
    "SoundnessError": RuntimeError,
}


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"PruningError", "choose"}))
def test_every_error_is_a_pruning_error_and_a_builtin(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, PruningError)
    assert issubclass(kind, BUILTINS[name])
    assert str(kind("the message")) == "the message"


def test_choose() -> None:
    assert choose("a", ["b", "a"], "letter") == "a"
    with pytest.raises(ConfigError, match=r"^unknown letter 'z'\. \(choices: a, b\)$"):
        choose("z", ["b", "a"], "letter")
    with pytest.raises(ConfigError, match=r"Did you mean 'uniform'\? \(choices: global, uniform\)"):
        choose("unifrom", {"uniform": 1, "global": 2}, "allocation")


@pytest.mark.parametrize("name", [None, 5, ["a"], True])
def test_choose_answers_what_is_no_text(name: object) -> None:
    with pytest.raises(ConfigError, match="unknown letter"):
        choose(name, ["a"], "letter")  # type: ignore[arg-type]


def test_what_a_function_of_the_user_exits_with_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave() -> None:
        raise SystemExit("no data today")

    monkeypatch.setattr("secateurs.cli.app", leave)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "no data today" in capsys.readouterr().err
