"""The documentation is run: Python blocks, recipes, links, and the commands it names.

`<!-- not run: reason -->` on the line before a block leaves it out; its Python must still compile.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from secateurs.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MARKER = re.compile(r"<!-- not run: *(.*?) *-->")


@dataclass(frozen=True)
class Block:
    """A fenced code block; `line` is that of its fence, counted from 1."""

    page: Path
    line: int
    language: str
    code: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The fenced blocks of a page in these languages, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for token in _tokens(page):
        language = token.info.split()[0] if token.info.strip() else ""
        if token.type != "fence" or language not in languages:
            continue
        start = token.map[0] if token.map else 0
        marker = MARKER.fullmatch(lines[start - 1].strip()) if start else None
        reason = marker[1] if marker else None
        assert reason != "", f"{page.name}:{start}: say why the block is not run"
        yield Block(page, start + 1, language, token.content, reason)


# --- Python --------------------------------------------------------------------------------------


def run_python(page: Path) -> None:
    """Run the Python blocks of a page in one namespace, as one script would."""
    module = types.ModuleType("__main__")  # what a class or function of a script calls its module
    before, sys.modules["__main__"] = sys.modules["__main__"], module
    try:
        for block in blocks(page, "python"):
            # Line numbers and source of a traceback are those of the page.
            code = compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True)
            if block.not_run is None:
                exec(code, module.__dict__)
    finally:
        sys.modules["__main__"] = before


# --- recipes -------------------------------------------------------------------------------------


def recipe_problems(page: Path) -> list[str]:
    """YAML that does not parse, and recipes that their own check refuses."""
    from secateurs.recipe import parse_recipe

    problems = []
    for block in blocks(page, "yaml", "yml"):
        if block.not_run is not None:
            continue
        try:
            data = yaml.safe_load(block.code)
            if isinstance(data, dict) and {"task", "model"} & set(data):
                parse_recipe(data, where=block.place).all_stages()
        except (yaml.YAMLError, ConfigError) as error:
            problems.append(f"{block.place}: {error}")
    return problems


# --- links ---------------------------------------------------------------------------------------


def link_problems(page: Path) -> list[str]:
    """Relative links and images that point nowhere."""
    found: list[str] = []
    for token in (t for parent in _tokens(page) for t in (parent, *(parent.children or ()))):
        found += [str(token.attrs[k]) for k in ("href", "src") if k in token.attrs]
        if token.type.startswith("html"):
            found += re.findall(r"""(?:href|src)=["'](.+?)["']""", token.content)
    problems = []
    for link in found:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path:  # elsewhere, or inside the page
            continue
        if parts.path.startswith("/") or not (page.parent / unquote(parts.path)).exists():
            problems.append(f"{page.name}: {link} does not exist")
    return problems


# --- commands ------------------------------------------------------------------------------------


@functools.cache
def _help(verb: str | None) -> tuple[int, str]:
    """Exit code and text of `secateurs [verb] --help`."""
    code = "import sys; from secateurs.cli import main; sys.argv[0] = 'secateurs'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *([verb] if verb else []), "--help"],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _command_problem(words: list[str]) -> str | None:
    """What is wrong with one command line, in words; None if it may stand."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        unknown = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"no make target {unknown[0]}" if unknown else None
    if words[0] != "secateurs":
        return None
    verb = words[1] if len(words) > 1 and not words[1].startswith("-") else None
    code, text = _help(verb)
    if code != 0:
        return f"no verb {verb!r}"
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text)) | {"--debug"}
    used = [w.partition("=")[0] for w in words[1:] if re.match(r"--?[A-Za-z]", w)]
    wrong = [option for option in used if option not in known]
    return f"{verb or 'secateurs'} has no option {wrong[0]}" if wrong else None


def command_problems(page: Path) -> list[str]:
    """Commands of console blocks (lines that start with `$`) that do not exist."""
    problems = []
    for block in blocks(page, "console", "bash", "sh", "shell"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if block.not_run is not None or not line.startswith("$ "):
                continue
            lexer = shlex.shlex(line[2:], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:  # each part of a pipe or list by itself
                if not set(word) <= set("|&;<>()"):
                    command.append(word)
                    continue
                problem = _command_problem(command) if command else None
                if problem is not None:
                    problems.append(f"{block.place}: {problem}: {line}")
                command = []
    return problems


# --- the pages -----------------------------------------------------------------------------------


OTHERS = "ignore::Warning"  # Lightning, transformers and Keras warn about themselves
MARKED = [
    pytest.param(page, marks=pytest.mark.filterwarnings(OTHERS))
    if page.name.startswith("where-you-train")
    else page
    for page in PAGES
]


@pytest.fixture(params=MARKED, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(page)


def test_recipes_are_valid(page: Path) -> None:
    assert recipe_problems(page) == []


def test_links_point_to_files(page: Path) -> None:
    assert link_problems(page) == []


def test_commands_exist(page: Path) -> None:
    assert command_problems(page) == []


# --- each check can fail -------------------------------------------------------------------------


def _page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def _fenced(language: str, *codes: str) -> str:
    return "\n\n".join(f"```{language}\n{code}\n```" for code in codes)


def test_python_blocks_share_a_namespace_and_fail_with_their_line(tmp_path: Path) -> None:
    good = "a = 1", "class A: pass\nassert A.__module__ == '__main__'", "assert a == 1"
    run_python(_page(tmp_path, "# Title\n\n" + _fenced("python", *good)))
    with pytest.raises(ZeroDivisionError) as caught:
        run_python(_page(tmp_path, "# Title\n\n" + _fenced("python", "a = 1", "b = 2\na / 0")))
    assert caught.traceback[-1].lineno + 1 == 9
    with pytest.raises(SyntaxError):
        run_python(_page(tmp_path, "<!-- not run: slow -->\n" + _fenced("python", "a =")))


def test_a_block_is_left_out_only_with_a_reason(tmp_path: Path) -> None:
    fail = _fenced("python", "1 / 0")
    run_python(_page(tmp_path, f"<!-- not run: takes an hour -->\n{fail}"))
    with pytest.raises(AssertionError, match="say why"):
        run_python(_page(tmp_path, f"<!-- not run: -->\n{fail}"))
    for text in (f"<!-- not run: far above -->\n\n{fail}", f"<!-- note -->\n{fail}"):
        with pytest.raises(ZeroDivisionError):
            run_python(_page(tmp_path, text))


@pytest.mark.parametrize(
    ("code", "n"),
    [
        ("task: digits-cnn\nbudget: {macs: 0.25}", 0),
        ("task: digits-cnn\nbudget: {macs: 0.25}\nspeed: 3", 1),
        ("task: digits-cnn\nbudget: {macs: 90.0}", 1),
        ("task: digits-cnn", 1),
        ("on: push", 0),
        ("a: [", 1),
    ],
)
def test_a_wrong_recipe_is_found(tmp_path: Path, code: str, n: int) -> None:
    assert len(recipe_problems(_page(tmp_path, _fenced("yaml", code)))) == n
    assert (
        recipe_problems(_page(tmp_path, "<!-- not run: a part -->\n" + _fenced("yml", code))) == []
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[a](page.md) [b](page.md#top) [c](#top) [d](https://example.org/x) ![e](%70age.md)",
            None,
        ),
        ("`[a](gone.md)`", None),
        ("see [a](gone.md#part)", "page.md: gone.md#part does not exist"),
        ("![a](gone.png)", "page.md: gone.png does not exist"),
        ("[a][b]\n\n[b]: gone.md", "page.md: gone.md does not exist"),
        ("|a|\n|-|\n|[x](gone.md)|", "page.md: gone.md does not exist"),
        ('<p align="center"><img src="gone.svg"></p>', "page.md: gone.svg does not exist"),
        ("[a](/page.md)", "page.md: /page.md does not exist"),
    ],
)
def test_a_dead_link_is_found(tmp_path: Path, text: str, problem: str | None) -> None:
    assert link_problems(_page(tmp_path, text)) == ([] if problem is None else [problem])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("$ secateurs --help", None),
        ("$ secateurs run recipe.yaml \\\n    --out out", None),
        ("secateurs prnue   # output, not a command", None),
        ("$ secateurs tasks | head -3", None),
        ("$ ls --colour && make demo PIP_ARGS=-q", None),
        ("$ secateurs prnue", "no verb 'prnue'"),
        ("$ cd x && secateurs prnue", "no verb 'prnue'"),
        ("$ secateurs run recipe.yaml --outt=x", "run has no option --outt"),
        ("$ secateurs --speed", "secateurs has no option --speed"),
        ("$ make dmeo", "no make target dmeo"),
    ],
)
def test_a_wrong_command_is_found(tmp_path: Path, line: str, problem: str | None) -> None:
    found = command_problems(_page(tmp_path, _fenced("console", line)))
    assert [text.split(": ")[1] for text in found] == ([] if problem is None else [problem])
