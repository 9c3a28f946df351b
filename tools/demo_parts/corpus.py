"""A small English corpus that every machine has: the documentation inside the running Python.

The topics of ``pydoc`` and the docstrings of the standard library, which are parsed from its sources, never imported.
Sentences are written as they would be read aloud: lower-case words only, names split at dots and underscores.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.files import write_text

SHARES = {"valid": 4, "dev": 5, "test": 8}  # percent of the sentences; the rest is for training
MIN_SENTENCES = 2000
MIN_WORDS, MAX_WORDS = 3, 40
_NOT_PROSE = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CODE = re.compile(r">>>|\.\.\. |[{}=<>|\\@#$%^~]|::=|->")
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[\"'(*`]?[A-Z0-9`*])|\n\s*[-*+] ")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of all modules under ``folder``, in the order of their paths; unreadable files are passed over."""
    for path in sorted(folder.rglob("*.py")):
        if _NOT_PROSE & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
                yield text


def documents() -> Iterator[str]:
    """All English text of the running Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name in sorted(topics):
        yield topics[name]
    yield from docstrings(Path(sysconfig.get_paths()["stdlib"]))


def sentences(text: str) -> Iterator[str]:
    """The sentences of one document; code, tables and headings are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        if _CODE.search(paragraph.replace(" <", " ").replace("\n   ", "\n")):
            continue
        for piece in _SENTENCE_END.split(paragraph):
            if sentence := spoken(piece):
                yield sentence


def spoken(piece: str) -> str | None:
    """``piece`` as words read aloud, or None where it is no sentence: too short, too long, or with numbers in it."""
    text = piece.lower().replace("\u2019", "'")
    text = re.sub(r"\b\d\b", lambda m: f" {_DIGITS[int(m[0])]} ", text)
    words = []
    for token in re.split(r"[\s_./,;:!?()\[\]\"`*+-]+", text):
        token = token.strip("'")
        if not token:
            continue
        if not _WORD.fullmatch(token):
            return None
        words.append(token)
    return " ".join(words) if MIN_WORDS <= len(words) <= MAX_WORDS else None


def split_of(sentence: str) -> str:
    """The split of a sentence: a function of its words alone, so that no sentence is both trained on and tested."""
    place = int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "little") % 100
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def write_corpus(folder: Path) -> dict[str, int]:
    """Write {train,valid,dev,test}.txt to ``folder``; returns the words of each.

    Raises:
        LowbitError: this Python has no documentation, as in some minimal installations.
    """
    unique = dict.fromkeys(s for document in documents() for s in sentences(document))
    if len(unique) < MIN_SENTENCES:
        raise LowbitError(
            f"this Python's documentation holds {len(unique)} sentences, the demo needs {MIN_SENTENCES}: install the"
            " full standard library with its sources (Debian: apt install libpython3-stdlib python3-pydoc)"
        )
    splits: dict[str, list[str]] = {name: [] for name in ("train", *SHARES)}
    for sentence in unique:
        splits[split_of(sentence)].append(sentence)
    for name, lines in splits.items():
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    return {name: sum(len(line.split()) for line in lines) for name, lines in splits.items()}
