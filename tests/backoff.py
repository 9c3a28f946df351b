"""kenlm's interface in plain Python, for machines without kenlm: slow, and the very definition of a back-off model."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from pathlib import Path

Grams = dict[tuple[str, ...], tuple[float, float]]  # log10 P, and log10 of the back-off weight


def log10_prob(grams: Grams, context: tuple[str, ...], word: str) -> float:
    """log10 P of a word after its context, a recursion over ever shorter contexts."""
    if (*context, word) in grams:
        return grams[(*context, word)][0]
    return grams.get(context, (0.0, 0.0))[1] + log10_prob(grams, context[1:], word)


class ARPALoadComplain(enum.Enum):
    NONE = 0


class Config:
    show_progress = True
    arpa_complain = None


class Model:
    def __init__(self, path: str, config: Config):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"Cannot read model '{path}' (threw ErrnoException. {error.strerror})") from None
        if not text.rstrip().endswith("\\end\\"):
            raise OSError(f"Cannot read model '{path}' (threw FormatLoadException. no end)")
        rows = [line.split("\t") for line in text.splitlines() if "\t" in line]
        self.grams: Grams = {tuple(gram.split()): (float(p), float(*b or [0])) for p, gram, *b in rows}
        self.order = max(map(len, self.grams))

    def full_scores(self, sentence: str) -> Iterator[tuple[float, int, bool]]:
        """log10 P, an n-gram length that nobody reads, and whether the word is unknown; the end of sentence is last."""
        words = [*sentence.split(), "</s>"]
        known = ["<s>", *(w if (w,) in self.grams else "<unk>" for w in words)]
        for i, word in enumerate(words, 1):
            context = tuple(known[max(0, i - self.order + 1) : i])
            yield log10_prob(self.grams, context, known[i]), 0, known[i] != word
