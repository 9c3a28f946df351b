"""A simulated speech recogniser: N-best lists with channel scores, made from text by a noisy channel.

Every word is heard as itself or as one of the vocabulary's words that sound like it; short words get lost or turn up
from nowhere. A slot's scores are a distance in sounds plus noise, slots are independent, and the list is the exact N
best of their sums. This models confusable words, not speech: its error rates say nothing of a real recogniser.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from lowbit.nbest import Hypothesis, NBest
from lowbit.vocab import EOS, UNK, Vocab

N_BEST = 20
NEIGHBOURS = 8
FILLERS = 12  # the most frequent short words: those that get lost and turn up
# Spelling to rough sounds, in order: silent letters, letters that share a sound, one vowel for all, doubled letters.
_RULES = (
    (r"^kn|^gn", "n"), (r"^wr", "r"), (r"^ps", "s"), (r"igh", "i"), (r"mb$", "m"), (r"ph", "f"), (r"tio|sio", "xa"),
    (r"sch|sh|ch", "x"), (r"ck|c(?=[^eiy]|$)|q", "k"), (r"c|z", "s"), (r"x$", "ks"), (r"dg|g(?=[eiy])", "j"),
    (r"^wh", "w"), (r"v", "f"), (r"(?<=[aeiouy][^aeiouy])e(?=s?$)", ""), (r"[aeiouy]+w?(?![aeiouy])", "a"),
    (r"(.)\1+", r"\1"),
)  # fmt: skip
_SOUNDS = [(re.compile(pattern), sound) for pattern, sound in _RULES]


def sounds(word: str) -> str:
    """A rough phonetic spelling: words that sound alike are close in it."""
    for pattern, sound in _SOUNDS:
        word = pattern.sub(sound, word)
    return word


@dataclass(frozen=True)
class ChannelOptions:
    """Strength of the channel.

    Attributes:
        sharpness: loss of score for every sound that differs; noise: standard deviation of a slot's scores.
        lost, inserted: loss of score of a missing and of an additional short word.
    """

    sharpness: float = 6.0
    noise: float = 1.4
    lost: float = 3.5
    inserted: float = 5.0


class Channel:
    """The recogniser of one vocabulary; what it hears of a sentence is a function of the sentence and ``seed``."""

    def __init__(self, vocab: Vocab, counts: Counter[str], options: ChannelOptions | None = None, seed: int = 1):
        self.options, self.seed = options or ChannelOptions(), seed
        self.words = [w for w in vocab.tokens if w not in (EOS, UNK)]
        self.spoken = [sounds(w) for w in self.words]
        self.fillers = sorted((w for w in self.words if len(w) <= 3), key=lambda w: -counts[w])[:FILLERS]
        self._near: dict[str, list[tuple[str, float]]] = {}

    def hear(self, words: Iterable[str]) -> None:
        """Find what each of ``words`` may be taken for: the nearest words by sound, then by spelling."""
        new = sorted(set(words) - self._near.keys())
        for start in range(0, len(new), 512):
            block = new[start : start + 512]
            by_sound = cdist([sounds(w) for w in block], self.spoken, scorer=Levenshtein.distance, score_cutoff=12)
            by_letter = cdist(block, self.words, scorer=Levenshtein.distance, score_cutoff=12)
            distance = by_sound + 0.25 * by_letter
            nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEIGHBOURS]
            for row, word in enumerate(block):
                self._near[word] = [(self.words[i], float(distance[row, i])) for i in nearest[row]]

    def nbest(self, name: str, sentence: str) -> NBest:
        """The list of one sentence, best first by ``am``, a log-score; ``ref`` is the sentence."""
        digest = hashlib.blake2b(f"{self.seed} {sentence}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        beam: dict[tuple[str, ...], float] = {(): 0.0}
        for word in sentence.split():
            beam = _extend(beam, self._slot(word, rng))
        hyps = [Hypothesis(" ".join(words), am=round(score, 3)) for words, score in beam.items()]
        return NBest(name, hyps, ref=sentence)

    def _slot(self, word: str, rng: np.random.Generator) -> list[tuple[tuple[str, ...], float]]:
        """What may have been said where ``word`` was: (words, score)."""
        o = self.options
        slot = [((near,), -o.sharpness * distance) for near, distance in self._near[word]]
        filler = self.fillers[int(rng.integers(len(self.fillers)))]
        slot.append(((slot[0][0][0], filler), slot[0][1] - o.inserted))
        if word in self.fillers:
            slot.append(((), -o.lost))
        noise = rng.normal(0.0, o.noise, len(slot))
        return [(words, score + float(n)) for (words, score), n in zip(slot, noise, strict=True)]


def _extend(
    beam: dict[tuple[str, ...], float], slot: Sequence[tuple[tuple[str, ...], float]]
) -> dict[tuple[str, ...], float]:
    """The N best of all sums, best first; two ways to the same words keep the better score."""
    sums: dict[tuple[str, ...], float] = {}
    for before, score in beam.items():
        for words, more in slot:
            text = before + words
            sums[text] = max(score + more, sums.get(text, -np.inf))
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:N_BEST])


def simulate(channel: Channel, sentences: Sequence[str], prefix: str) -> list[NBest]:
    """An N-best list for every sentence."""
    channel.hear(word for sentence in sentences for word in sentence.split())
    return [channel.nbest(f"{prefix}-{i:04}", sentence) for i, sentence in enumerate(sentences)]
