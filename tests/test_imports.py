"""Imports go one way, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateurs

SRC = Path(secateurs.__file__).parent

# A room (a module or a folder of the package) may import itself and rooms of the lines above its
# own, anywhere in its code: neither a later line, nor a neighbour on the same line.
LAYERS = (
    "errors",
    "asked bars filters imports inventory kth targets tensorfiles workers",
    "types distributed",
    "batches masks",
    "graph cost criteria schedules checkpoints",
    "statistics selection scores sharding",
    "scoring watching allocation",
    "finetuning surgery controls testing",
    "macs health carrying boards regrowth penalties posttraining tickets",
    "latency diagnosis sensitivities",
    "measurement",
    "report export",
    "pipeline",
    "during",
    "tasks",
    "recipe",
    "runner",
    "ablation healing",
    "searching",
    "integrations",
    "cli",
    "__main__",
)
LINE = {room: line for line, rooms in enumerate(LAYERS) for room in rooms.split()}


def _imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package in one file; "" is the package itself."""
    folder = ("secateurs", *path.parent.relative_to(package).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "secateurs":
                yield node.lineno, rest.partition(".")[0]  # type: ignore[attr-defined]


def back_edges(package: Path) -> list[str]:
    """One sentence for each import that does not go up the table, and for each unknown room."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        room = place.parts[0].removesuffix(".py")
        if room == "__init__":  # the lazy front door: it names every room
            continue
        if room not in LINE:
            problems.append(f"{place}: the room {room!r} has no line in LAYERS")
            continue
        for line, other in _imported(path, package):
            if other in (room, "__version__"):
                continue
            if other not in LINE:
                problems.append(f"{place}:{line} imports {other or 'secateurs'!r}, not a room")
            elif LINE[other] >= LINE[room]:
                problems.append(f"{place}:{line} imports {other!r}, which is not above {room!r}")
    return problems


def test_imports_go_one_way() -> None:
    assert back_edges(SRC) == []


@pytest.mark.parametrize(
    ("place", "code", "problem"),
    [
        ("masks.py", "import secateurs.pipeline", "imports 'pipeline', which is not above 'masks'"),
        ("masks.py", "from secateurs import cli", "imports 'cli', which is not above 'masks'"),
        (
            "masks.py",
            "def f():\n    from secateurs.report.data import Report",
            ":2 imports 'report'",
        ),
        ("graph/rules.py", "from ..scoring import score", "imports 'scoring'"),
        ("graph/rules.py", "from .. import cost", "imports 'cost', which is not above 'graph'"),
        ("masks.py", "from secateurs import hold_masks", "imports 'hold_masks', not a room"),
        ("masks.py", "import secateurs", "imports 'secateurs', not a room"),
        ("attic.py", "", "the room 'attic' has no line"),
    ],
)
def test_a_planted_back_edge_is_found(tmp_path: Path, place: str, code: str, problem: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    (found,) = back_edges(tmp_path)
    assert problem in found


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("masks.py", "from secateurs.types import Plan\nimport secateurs.errors, torch"),
        ("graph/rules.py", "from .labels import Labels\nfrom ..types import Plan"),
        ("cli/run.py", "from secateurs import __version__, report"),
    ],
)
def test_imports_upwards_and_inside_a_room_are_allowed(
    tmp_path: Path, place: str, code: str
) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    assert back_edges(tmp_path) == []


# --- what an import costs, and what it gives -----------------------------------------------------


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


HEAVY = "import sys; print([m for m in ('torch', 'sklearn', 'matplotlib') if m in sys.modules])"
CLI = """
import sys
from secateurs.cli import main
sys.argv = ["secateurs", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import secateurs; secateurs.__version__; dir(secateurs)",
        CLI.format(arguments=["--help"]),
        CLI.format(arguments=["--version"]),
        CLI.format(arguments=["run", "--help"]),
    ],
    ids=["import", "help", "version", "run-help"],
)
def test_nothing_heavy_is_imported_early(code: str) -> None:
    done = _run(f"{code}\n{HEAVY}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert _run(f"import torch\n{HEAVY}").stdout == "['torch']\n"


ROOMS_FIRST = """
import importlib, types
import secateurs
for room in set(secateurs._ROOMS.values()):
    importlib.import_module(f"secateurs.{room}")
"""


@pytest.mark.parametrize("first", ["import types, secateurs", ROOMS_FIRST], ids=["lazy", "loaded"])
def test_every_public_name_resolves_to_what_it_names(first: str) -> None:
    """Also when a room was imported before the verb of the same name was asked for."""
    code = """
values = {name: getattr(secateurs, name) for name in secateurs.__all__}
print(sorted(name for name, value in values.items() if isinstance(value, types.ModuleType)))
"""
    done = _run(first + code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = secateurs.prunes
