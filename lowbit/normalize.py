"""Text normalisation before word errors are counted: the same for references and hypotheses."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike, read_lines

# Kept inside a word: "it's", "twenty-one", "a.m."; at its ends they are punctuation like any other.
_INNER = "'’-."


@dataclass(frozen=True)
class Normalizer:
    """What is done to a text, in this order.

    Attributes:
        unicode: normal form ("NFC", "NFKC" ...) or None.
        lower: case-fold.
        punctuation: remove it, but for apostrophes, hyphens and full stops inside a word.
        hyphens: read hyphens as spaces.
        mapping: words to replace, each by any number of words (none removes it).
    """

    unicode: str | None = None
    lower: bool = False
    punctuation: bool = False
    hyphens: bool = False
    mapping: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        if self.unicode:
            text = unicodedata.normalize(self.unicode, text)
        if self.lower:
            text = text.lower()
        if self.hyphens:
            text = text.replace("-", " ")
        words = text.split()
        if self.punctuation:
            words = [w for w in map(_bare, words) if w]
        if self.mapping:
            words = [w for word in words for w in self.mapping.get(word, word).split()]
        return " ".join(words)

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return bool(self.unicode or self.lower or self.punctuation or self.hyphens or self.mapping)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if v and k != "mapping"} | (
            {"mapping": len(self.mapping)} if self.mapping else {}
        )


def _bare(word: str) -> str:
    """``word`` without punctuation and symbols, inner apostrophes and hyphens apart."""
    kept = "".join(c for c in word if c in _INNER or unicodedata.category(c)[0] not in "PS")
    return re.sub(rf"^[{re.escape(_INNER)}]+|[{re.escape(_INNER)}]+$", "", kept)


def read_mapping(path: PathLike) -> dict[str, str]:
    """A file with one replacement a line: a word, then what it becomes (nothing: it is removed).

    Raises:
        LowbitError: a word that is mapped twice.
    """
    mapping: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        word, *rest = line.split() or [None]
        if word is None:
            continue
        if word in mapping:
            raise LowbitError(f"{path}: line {number}: {word!r} is mapped twice")
        mapping[word] = " ".join(rest)
    return mapping
