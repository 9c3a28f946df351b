"""Word-level vocabulary. Id 0 is ``</s>`` (the context before a sentence and its end), id 1 is ``<unk>``."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from lowbit.errors import LowbitError

EOS, UNK = "</s>", "<unk>"
EOS_ID, UNK_ID = 0, 1


class Vocab:
    """Maps words to ids and back; immutable."""

    def __init__(self, tokens: Iterable[str]):
        self.tokens = list(tokens)
        if self.tokens[:2] != [EOS, UNK]:
            raise LowbitError(f"a vocabulary starts with {EOS} and {UNK}, this one with {self.tokens[:2]}")
        self._ids = {t: i for i, t in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            twice = next(t for t, n in Counter(self.tokens).items() if n > 1)
            raise LowbitError(f"the vocabulary holds {twice!r} twice")
        for token in self.tokens:
            # Lone surrogates (JSON can spell them) are no text: they could not be written to a model file.
            if token.split() != [token] or any("\ud800" <= c <= "\udfff" for c in token):
                raise LowbitError(f"the vocabulary holds {token!r}, which is not one word")

    @classmethod
    def build(cls, lines: Iterable[str], min_count: int = 1, max_size: int | None = None) -> Vocab:
        """The words of ``lines`` by falling count (ties by spelling), those below ``min_count`` left to ``<unk>``."""
        if max_size is not None and max_size < 2:
            raise LowbitError(f"a vocabulary holds {EOS} and {UNK}: max_size must be at least 2, not {max_size}")
        counts = Counter(w for line in lines for w in line.split())
        for special in (EOS, UNK):
            counts.pop(special, None)
        words = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        return cls([EOS, UNK, *words[: None if max_size is None else max_size - 2]])

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def id(self, word: str) -> int:
        """The word's id, ``UNK_ID`` where it is unknown."""
        return self._ids.get(word, UNK_ID)

    def find(self, word: str) -> int | None:
        """The word's id, None where it is unknown."""
        return self._ids.get(word)

    def encode(self, line: str) -> tuple[list[int], int]:
        """Ids of the words of ``line`` (no ``</s>`` added) and how many of them are out of vocabulary.

        A literal ``<unk>`` in the text is a word of the corpus (as in PTB), not an out-of-vocabulary word.
        """
        words = line.split()
        ids = [self._ids.get(w, UNK_ID) for w in words]
        return ids, sum(w not in self._ids for w in words) if UNK_ID in ids else 0

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.tokens[i] for i in ids)

    @property
    def hash(self) -> str:
        """SHA-256 of the tokens, one a line: what ties a model file to its vocabulary."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()
