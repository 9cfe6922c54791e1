"""The page that puts our callbacks beside other tools: its lines are counted, not claimed.

A fenced block of that page says after its language what it is for: ```` ```python keras ours ````.
The roles are `plain` (without pruning), `ours` and `peer`; `both` and `check` are for the one tool
that needs an environment of its own. That the blocks run is the business of `test_docs.py`.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide"
PAGE = (GUIDE / "where-you-train-peers.md").read_text(encoding="utf-8")
TABLE = (GUIDE / "where-you-train.md").read_text(encoding="utf-8")
LIBRARIES = ("lightning", "trainer", "accelerate", "keras")
ROW = re.compile(r"^\| *(\w+) *\|[^|]*\| *(\d+) / (\d+) *\| *(\d+) / (\d+) *\|", re.MULTILINE)


@dataclass(frozen=True)
class Length:
    """What pruning adds to a training."""

    lines: int
    characters: int


def tagged(page: str, library: str, role: str) -> list[str]:
    """The blocks of a page that carry this name, in their order."""
    tokens = MarkdownIt("commonmark").parse(page)
    return [t.content for t in tokens if t.info.split() == ["python", library, role]]


def written(code: str) -> list[str]:
    """The lines of a block that are neither blank nor a comment."""
    stripped = [line.strip() for line in code.splitlines()]
    return [line for line in stripped if line and not line.startswith("#")]


@functools.cache
def formatted(code: str) -> list[str]:
    """The lines as the formatter lays them out, however they were written."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=100", "-"],
        input=ast.unparse(ast.parse(code)),
        capture_output=True,
        text=True,
        check=True,
    )
    return written(done.stdout)


def length(code: str, plain: str) -> Length:
    """Of the lines that the same training without pruning does not have."""
    added = list((Counter(formatted(code)) - Counter(formatted(plain))).elements())
    return Length(len(added), sum(len(re.sub(r"\s", "", line)) for line in added))


def compared(page: str) -> Iterator[tuple[str, Length, Length]]:
    """(library, ours, the other tool's), one for each tool on the page."""
    for library in LIBRARIES:
        (plain,), (ours,) = (tagged(page, library, role) for role in ("plain", "ours"))
        for peer in tagged(page, library, "peer"):
            yield library, length(ours, plain), length(peer, plain)


def told(guide: str) -> list[tuple[str, Length, Length]]:
    """The same, as the table of the guide has it."""
    return [
        (name.lower(), Length(int(a), int(c)), Length(int(b), int(d)))
        for name, a, b, c, d in ROW.findall(guide)
    ]


def problems(page: str, guide: str) -> list[str]:
    """What is not true of the page and the table."""
    found = list(compared(page))
    missing = set(LIBRARIES) - {library for library, _, _ in found}
    wrong = [f"{library}: no other tool" for library in sorted(missing)]
    wrong += [
        f"{library}: ours is not shorter, {ours} against {peer}"
        for library, ours, peer in found
        if ours.lines >= peer.lines or ours.characters >= peer.characters
    ]
    if told(guide) != found:
        wrong.append(f"the table says {told(guide)}, counted were {found}")
    for library in LIBRARIES:
        for role in ("plain", "ours", "peer"):
            wrong += [
                f"{library}: a block of {role} is not laid out as the formatter does"
                for code in tagged(page, library, role)
                if written(code) != formatted(code)
            ]
    return wrong


def test_ours_is_shorter_and_the_table_says_by_how_much() -> None:
    assert problems(PAGE, TABLE) == []
    assert len(told(TABLE)) == 5  # Accelerate has two


def test_what_runs_is_what_is_counted() -> None:
    """Only the block that needs TensorFlow, and its check, may stay out of `test_docs.py`."""
    left_out = re.findall(r"<!-- not run:.*-->\n```python *(.*)", PAGE)
    assert left_out == ["keras peer", "keras check"]
    assert re.findall(r"<!-- not run", TABLE) == []


@pytest.mark.filterwarnings("ignore::Warning")  # of Lightning
@pytest.mark.parametrize("options", [{}, {"use_lottery_ticket_hypothesis": False}])
def test_model_pruning_rewinds_unless_it_is_told_not_to(options: dict[str, bool]) -> None:
    """The page says so, and that is why its code has that line."""
    lightning = pytest.importorskip("lightning", reason="pip install 'secateurs[lightning]'")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss: Tensor = self.layer(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    before = module.layer.weight.detach().clone()
    pruning = callbacks.ModelPruning(
        "ln_structured", [(module.layer, "weight")], use_global_unstructured=False,
        amount=0.5, pruning_dim=0, pruning_norm=2, **options,
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    left = module.layer.weight.any(dim=1)
    assert left.sum() == 4
    assert torch.equal(module.layer.weight[left], before[left]) is not bool(options)


# --- the count can fail ---------------------------------------------------------------------------


def _page(ours: str = "a = 1\ncut(a)", peer: str = "a = 1\ncut(a, 0.5)\nclean(a)") -> str:
    blocks = {"plain": "a = 1", "ours": ours, "peer": peer}
    return "\n\n".join(
        f"```python {library} {role}\n{code}\n```"
        for library in LIBRARIES
        for role, code in blocks.items()
    )


def _table(lines: str = "1 / 2", characters: str = "6 / 18") -> str:
    return "\n".join(f"| {name.title()} | tool | {lines} | {characters} |" for name in LIBRARIES)


def test_a_page_that_is_right_passes() -> None:
    assert problems(_page(), _table()) == []


@pytest.mark.parametrize(
    ("page", "table", "problem"),
    [
        (_page(), _table(lines="1 / 3"), "the table says"),
        (_page(), _table(characters="5 / 18"), "the table says"),
        (_page(), "", "the table says"),
        (_page(ours="a = 1\ncut(a)\nb = 2"), _table("2 / 2", "9 / 18"), "ours is not shorter"),
        (
            _page(ours="a = 1\ncut(a, very_long=True)"),
            _table("1 / 2", "21 / 18"),
            "ours is not shorter",
        ),
        (_page().replace("keras peer", "keras pear"), _table(), "keras: no other tool"),
        # One statement drawn out, or two on one line.
        (_page(peer="a = 1\ncut(\n    a,\n    0.5,\n)\nclean(a)"), _table(), "a block of peer is"),
        (_page(ours="a = 1; cut(a)"), _table(), "a block of ours is"),
    ],
)
def test_a_page_that_is_wrong_is_noticed(page: str, table: str, problem: str) -> None:
    assert any(problem in text for text in problems(page, table))


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("a = 1\n\n# why\ncut(a)  # how", ["a = 1", "cut(a)"]),
        ("cut(\n    a,\n    b,\n)", ["cut(a, b)"]),
        ("a = 1; b = 2", ["a = 1", "b = 2"]),
        (f"cut({'a' * 60}, {'b' * 60})", ["cut(", "a" * 60 + ",", "b" * 60 + ",", ")"]),
    ],
)
def test_the_formatter_decides_what_a_line_is(code: str, lines: list[str]) -> None:
    assert formatted(code) == lines


# --- the tool that needs an environment of its own ------------------------------------------------


def test_the_code_for_tensorflow_does_what_the_page_says(tmp_path: Path) -> None:
    python = os.environ.get("TFMOT_PYTHON", sys.executable)
    look = "from importlib.util import find_spec as f; raise SystemExit(not f('{}'))"
    tool = look.format("tensorflow_model_optimization")
    if subprocess.run([python, "-c", tool], check=False).returncode:
        pytest.skip(
            "in an environment of its own: pip install tensorflow-model-optimization "
            "tensorflow-cpu tf-keras; then TFMOT_PYTHON=its python"
        )
    data = 'import numpy as np\nX = np.random.randn(256, 8).astype("float32")\nY = X[:, 0] > 0\n'
    blocks = [*(tagged(PAGE, "keras", role)[0] for role in ("both", "peer", "check"))]
    done = subprocess.run(
        [python, "-c", "\n".join([data, *blocks])],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
