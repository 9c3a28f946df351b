"""N-gram language models in ARPA or kenlm's binary form, through kenlm: ``pip install lowbit[ngram]``.

kenlm's logarithms are to base 10; everything here is natural, like the rest of lowbit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.engine import NBestScores
from lowbit.errors import LowbitError
from lowbit.files import PathLike

LN_10 = math.log(10)


class NGram:
    """An n-gram model of words, read after ``<s>`` and ended by ``</s>``.

    Args:
        path: an ARPA file (kenlm decompresses ``.gz``) or a file of kenlm's build_binary.

    Raises:
        LowbitError: kenlm is not installed, or it cannot read the file.
    """

    def __init__(self, path: PathLike):
        try:
            import kenlm
        except ImportError:
            raise LowbitError(f"{path}: n-gram models need kenlm: pip install lowbit[ngram]") from None
        config = kenlm.Config()
        config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
        try:
            self._model = kenlm.Model(str(path), config)
        except OSError as error:
            # "Cannot read model 'x' (lm/read_arpa.cc:65 in ... threw ... because `...'. The reason)"
            reason = str(error).rstrip(")").rpartition("threw ")[2] or str(error)
            raise LowbitError(f"{path}: not a model that kenlm can read: {reason}") from None
        self.path = str(path)

    @property
    def order(self) -> int:
        return self._model.order

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "order": self.order}

    def score(self, sentence: str) -> tuple[np.ndarray, int]:
        """Natural log P, fp64 [words + 1], of the words and the end of sentence, and how many words are unknown."""
        # kenlm splits at ASCII white space only; words are those of str.split() everywhere else.
        rows = list(self._model.full_scores(" ".join(sentence.split())))
        return LN_10 * np.array([row[0] for row in rows]), sum(row[2] for row in rows)

    def score_nbest(self, lists: Sequence[Sequence[str]]) -> list[NBestScores]:
        """Scores of every hypothesis of N-best lists; duplicates are scored once."""
        out = []
        for hyps in lists:
            found = {text: self.score(text) for text in dict.fromkeys(hyps)}
            tokens = [found[text][0] for text in hyps]
            words = np.array([len(t) - 1 for t in tokens], np.int64)
            oov = np.array([found[text][1] for text in hyps], np.int64)
            out.append(NBestScores(np.array([t.sum() for t in tokens]), words, oov, tokens))
        return out
