"""First-pass decoding: a lowbit model as the language model of pyctcdecode's beam search (shallow fusion).

    decoder = pyctcdecode.BeamSearchDecoderCTC(pyctcdecode.Alphabet.build_alphabet(labels), CTCLanguageModel(lm))
    text = decoder.decode(logits)

The class has the methods of ``pyctcdecode.AbstractLanguageModel`` and its conventions (weights alpha and beta, an
offset for unknown words), so pyctcdecode itself is imported by whoever decodes: ``pip install lowbit[ctc]``.
"""

from __future__ import annotations

import math
from bisect import bisect_left

from lowbit.engine import LanguageModel
from lowbit.errors import LowbitError
from lowbit.state import State
from lowbit.vocab import EOS, UNK

# pyctcdecode's: an unknown word longer than this many characters is penalised in proportion.
_TYPICAL_LENGTH = 6


class CTCLanguageModel:
    """Scores words as the beam search completes them: alpha · log P + beta a word.

    Args:
        lm: from :func:`lowbit.load`.
        alpha: weight of the language model's natural log P.
        beta: score of every word.
        unk_score_offset: added to log P of a word outside the vocabulary, and to a partial word that no word of the
            vocabulary begins with.
        score_boundary: whether the last word is followed by the end of the sentence.

    Raises:
        LowbitError: a parameter that is not a finite number.
    """

    def __init__(
        self,
        lm: LanguageModel,
        alpha: float = 0.5,
        beta: float = 1.5,
        unk_score_offset: float = -10.0,
        score_boundary: bool = True,
    ):
        self.lm = lm
        self.score_boundary = score_boundary
        self._words = sorted(set(lm.vocab.tokens) - {EOS, UNK})
        self.reset_params(alpha=alpha, beta=beta, unk_score_offset=unk_score_offset)

    @property
    def order(self) -> int:
        """Words that a score may depend on, the word included: the decoder merges beams that agree in the others."""
        return self.lm.config.max_len

    def reset_params(self, **params: float | bool) -> None:
        """Change alpha, beta, unk_score_offset or score_boundary; None leaves one as it is."""
        for name, value in params.items():
            if value is None:
                continue
            if name not in ("alpha", "beta", "unk_score_offset", "score_boundary"):
                raise LowbitError(f"the language model has no parameter {name!r}")
            if not math.isfinite(value):
                raise LowbitError(f"{name} must be a finite number, not {value!r}")
            setattr(self, name, value)

    def get_start_state(self) -> State:
        return self.lm.begin()

    def score(self, prev_state: State, word: str, is_last_word: bool = False) -> tuple[float, State]:
        """Weighted score of ``word`` after ``prev_state``, and the state after it.

        A last word's score includes the end of the sentence; the state does not, so that it can be extended. The
        decoder asks for an empty last word where the sentence already ended with a space: then for its end alone.
        """
        state, logprob, bonus = prev_state, 0.0, 0.0
        if word:
            logprob, state = self.lm.advance(prev_state, word)
            bonus = self.beta
            if word not in self.lm.vocab:
                logprob += self.unk_score_offset
        if is_last_word and self.score_boundary:
            logprob += self.lm.advance(state, EOS)[0]
        return self.alpha * logprob + bonus, state

    def score_partial_token(self, partial_token: str) -> float:
        """0 for the beginning of a known word, else a penalty, larger for long pieces."""
        at = bisect_left(self._words, partial_token)
        if at < len(self._words) and self._words[at].startswith(partial_token):
            return 0.0
        return self.unk_score_offset * max(1.0, len(partial_token) / _TYPICAL_LENGTH)

    def save_to_dir(self, filepath: str) -> None:
        """The decoder's own file format has no place for a neural model."""
        raise LowbitError(f"{filepath}: save the .lowbit file instead, and make the decoder anew from it")
