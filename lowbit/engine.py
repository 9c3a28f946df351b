"""The language model that people use: scores, perplexity, text, rescored N-best lists, states for decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch

from lowbit import ops
from lowbit.backend import Backend, TorchBackend
from lowbit.config import ModelConfig
from lowbit.cuda import CudaBackend
from lowbit.errors import LowbitError, check_seed
from lowbit.files import PathLike
from lowbit.forest import Chain, Lists, Paths, chains, check_stride, tries, windows
from lowbit.loading import load_model
from lowbit.native import NativeBackend
from lowbit.state import Decoder, State, sample
from lowbit.vocab import EOS, EOS_ID, UNK_ID, Vocab

# Input tokens of one forest, and utterances whose lists become one: bounds memory, whatever the length of the input.
_FOREST_TOKENS = 2**14
_FOREST_LISTS = 256
_TRIE_NODES = 128  # of lists that are merged: what the native engine takes at a time


@dataclass(frozen=True)
class SentenceScore:
    """Score of one sentence.

    Attributes:
        logprob: natural log P of its words and the end of sentence.
        token_logprobs: one for each of ``tokens``.
        tokens: its words as the model sees them (``<unk>`` where unknown), then ``</s>``.
        oov: out-of-vocabulary words, scored as ``<unk>``.
    """

    logprob: float
    token_logprobs: list[float]
    tokens: list[str]
    oov: int


@dataclass(frozen=True, eq=False)
class NBestScores:
    """Scores of one N-best list.

    Attributes:
        logprobs: fp64 [H], natural log P of words and end of sentence.
        words, oov: int64 [H], words, and those of them out of vocabulary.
        token_logprobs: per hypothesis fp64 [words + 1], whose sum is its log P.
    """

    logprobs: np.ndarray
    words: np.ndarray
    oov: np.ndarray
    token_logprobs: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Perplexity of a text and all that is needed to compare it.

    Attributes:
        ppl: exp(nll / n_tokens).
        nll: negative natural log-likelihood of all tokens.
        n_tokens: words and ends of sentences; out-of-vocabulary words count, as ``<unk>``.
        n_oov: out-of-vocabulary words.
        stride: tokens between windows where a context is longer than the model's (:func:`lowbit.forest.windows`).
        token_nll: fp32 [n_tokens], in the order of the text.
    """

    mode: str
    ppl: float
    nll: float
    n_tokens: int
    n_oov: int
    n_lines: int
    stride: int
    max_len: int
    token_nll: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "token_nll"}


def load(path: PathLike, device: str = "cpu", compute: str = "int8", threads: int | None = None) -> LanguageModel:
    """Load a full-precision checkpoint or a packed ``.lowbit`` file.

    Packed models run on the native engine or the GPU kernels, checkpoints on PyTorch; ``describe()["backend"]`` tells.

    Args:
        compute: for packed files: activations rounded to "int8" on the fly, or "exact" fp32 activations.
        threads: of the CPU kernels and of PyTorch; None leaves them as they are.

    Raises:
        LowbitError, FormatError: see :func:`lowbit.loading.load_model`; never a silent fallback.
    """
    if threads is not None:
        ops.set_threads(threads)
        torch.set_num_threads(threads)
    loaded = load_model(path, device, compute)
    if loaded.description["kind"] != "packed":
        backend = TorchBackend(loaded.model, device)
    else:
        backend = NativeBackend(loaded.model) if device == "cpu" else CudaBackend(loaded.model, device)
    return LanguageModel(backend, loaded.model.config, loaded.vocab, loaded.description | {"backend": backend.name})


class LanguageModel:
    """A language model on a backend. Sentences are split at white space and read after ``</s>``.

    Args:
        stride: how far the context slides where a text is longer than the model's; half of it by default.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        vocab: Vocab,
        description: dict[str, Any] | None = None,
        stride: int | None = None,
    ):
        self.backend, self.config, self.vocab = backend, config, vocab
        self.stride = self._stride(stride)
        self._description = description or {}
        self._words = ops.word_index(vocab.tokens, UNK_ID)
        self._decoder = Decoder(backend, config.max_len, self.stride)

    def describe(self) -> dict[str, Any]:
        """What runs: backend, kernel, instruction set, device, precision, file and its bytes."""
        return dict(self._description)

    def score(self, sentences: Sequence[str]) -> list[SentenceScore]:
        """Log P of every sentence; an empty one is the end of sentence alone."""
        if isinstance(sentences, str):
            raise LowbitError("score() takes a list of sentences, not one string")
        encoded = [self.vocab.encode(s) for s in sentences]
        rows = [[EOS_ID, *ids, EOS_ID] for ids, _ in encoded]
        log_probs = self._chain_log_probs(rows, self.stride)
        ends = np.cumsum([len(row) - 1 for row in rows])
        scores = []
        for row, (_, oov), end in zip(rows, encoded, ends):
            tokens = [self.vocab.tokens[i] for i in row[1:]]
            values = log_probs[end - len(tokens) : end].astype(np.float64)
            scores.append(SentenceScore(float(values.sum()), values.tolist(), tokens, oov))
        return scores

    def score_nbest(self, lists: Sequence[Sequence[str]], contexts: Sequence[str] | None = None) -> list[NBestScores]:
        """Log P of the hypotheses of N-best lists, read as tries: a prefix that hypotheses share is computed once.

        Args:
            lists: texts. Hundreds of lists at a time are fastest: without contexts they share prefixes too.
            contexts: the text before every list, sentences separated by ``</s>``; what fits of its end is read.
        """
        out: list[NBestScores] = []
        for start in range(0, len(lists), _FOREST_LISTS):
            part = slice(start, start + _FOREST_LISTS)
            words, ends, oov = self._words.encode([text for hyps in lists[part] for text in hyps])
            hyps = Lists(words, ends, np.array([len(hyps) for hyps in lists[part]], np.int64))
            if contexts is None:
                query, paths = tries(hyps, self.config.max_len, self.stride, _TRIE_NODES, merge=True)
            else:
                before = [self.vocab.encode(text)[0] for text in contexts[part]]
                query, paths = tries(hyps, self.config.max_len, self.stride, contexts=before)
            out += _sum_paths(self.backend.log_probs(query).astype(np.float64), paths, oov)
        return out

    def perplexity(self, lines: Iterable[str], mode: str = "stream", stride: int | None = None) -> float:
        """Perplexity of a text: see :meth:`evaluate`."""
        return self.evaluate(lines, mode, stride).ppl

    def evaluate(
        self,
        lines: Iterable[str],
        mode: str = "stream",
        stride: int | None = None,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> Evaluation:
        """Perplexity with its parts. Blank lines are dropped, as they are in training.

        Args:
            mode: "stream": all lines joined by ``</s>``, read with a sliding context; "sentence": each line by itself.
            stride: of the sliding context; half of the model's context by default.
            progress: called with the number of tokens that were just scored.

        Raises:
            LowbitError: no text, an unknown mode, or a stride outside the model's context.
        """
        if mode not in ("stream", "sentence"):
            raise LowbitError(f"mode must be stream or sentence, not {mode!r}")
        if isinstance(lines, str):
            raise LowbitError("a text is a list of lines, not one string")
        stride = self._stride(stride)
        rows, n_oov = [], 0
        for line in lines:
            ids, oov = self.vocab.encode(line)
            if ids:
                rows.append([EOS_ID, *ids, EOS_ID])
                n_oov += oov
        if not rows:
            raise LowbitError("the text holds no words: a perplexity is not defined")
        n_lines = len(rows)
        if mode == "stream":
            rows = [np.concatenate([[EOS_ID], *(row[1:] for row in rows)])]
        token_nll = -self._chain_log_probs(rows, stride, progress)
        nll = float(token_nll.sum(dtype=np.float64))
        with np.errstate(over="ignore"):
            ppl = float(np.exp(nll / len(token_nll)))
        return Evaluation(mode, ppl, nll, len(token_nll), n_oov, n_lines, stride, self.config.max_len, token_nll)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> str:
        """The prompt continued to the end of its sentence, or by ``max_new_tokens`` words.

        Args:
            temperature: 0 takes the most probable word each time.
            top_k: sample among the k most probable words.
            seed: the same seed gives the same text; None draws a new one.
        """
        if max_new_tokens < 0 or temperature < 0 or not math.isfinite(temperature):
            raise LowbitError(
                f"generate: max_new_tokens {max_new_tokens}, temperature {temperature}: must be at least 0"
            )
        if top_k is not None and top_k < 1:
            raise LowbitError(f"generate: top_k must be at least 1, not {top_k}")
        check_seed(seed)
        rng = np.random.default_rng(seed)
        ids, _ = self.vocab.encode(prompt)
        state, words = self._decoder.begin(ids), prompt.split()
        for _ in range(max_new_tokens):
            token = sample(self._decoder.log_probs(state), temperature, top_k, rng)
            if token == EOS_ID:
                break
            words.append(self.vocab.tokens[token])
            state = self._decoder.append(state, token)
        return " ".join(words)

    def begin(self) -> State:
        """The state before the first word of a sentence."""
        return self._decoder.begin()

    def advance(self, state: State, word: str) -> tuple[float, State]:
        """Natural log P(word | state) and the state after it; states are immutable and may be advanced many times.

        ``</s>`` ends the sentence: its log P completes the sentence's, and the state after it goes on with the text so
        far as context. An unknown word is scored as ``<unk>`` and counted in ``state.oov``.
        """
        token, oov = self.vocab.find(word), 0
        if token is None:
            if word.split() != [word]:
                raise LowbitError(f"advance() takes one word, not {word!r}; {EOS} ends a sentence")
            token, oov = UNK_ID, 1
        return self._decoder.log_probs(state).item(token), self._decoder.append(state, token, oov)

    def rescore(self, nbest: Iterable[Any], lm_weight: float, length_bonus: float = 0.0) -> list[Any]:
        """Every list sorted by am + lm_weight * log P + length_bonus * words, best first; ties keep their order.

        Args:
            nbest: :class:`~lowbit.nbest.NBest` lists. Where a list has no ``am`` scores, minus the rank (0, -1, -2 ...)
                stands for them.

        Returns:
            new lists, whose hypotheses have ``logprob`` and ``score``, and whose ``first_pass`` says "am" or "rank", in
            their ``extra`` fields.
        """
        return list(self.iter_rescored(nbest, lm_weight, length_bonus))

    def iter_rescored(self, nbest: Iterable[Any], lm_weight: float, length_bonus: float = 0.0) -> Iterator[Any]:
        """:meth:`rescore` as a stream that holds a few lists at a time."""
        if not math.isfinite(lm_weight) or not math.isfinite(length_bonus):
            raise LowbitError(f"rescore: weights {lm_weight} and {length_bonus} must be finite")
        source = iter(nbest)
        while batch := list(islice(source, _FOREST_LISTS)):
            scored = self.score_nbest([[h.text for h in u.hyps] for u in batch])
            for utterance, scores in zip(batch, scored):
                combined = first_pass_scores(utterance) + lm_weight * scores.logprobs + length_bonus * scores.words
                yield reorder(utterance, combined, {"logprob": scores.logprobs}, int(scores.oov.sum()))

    def _stride(self, stride: int | None) -> int:
        stride = max(1, self.config.max_len // 2) if stride is None else stride
        check_stride(stride, self.config.max_len)
        return stride

    def _chain_log_probs(
        self, rows: Sequence[Sequence[int]], stride: int, progress: Callable[[int], None] = lambda tokens: None
    ) -> np.ndarray:
        """fp32: log P of every token but the first of every row, row after row."""
        out: list[np.ndarray] = []

        def run(batch: list[Chain]) -> None:
            out.append(self.backend.log_probs(chains(batch)))
            progress(len(out[-1]))

        batch: list[Chain] = []
        size = 0
        for row in rows:
            for chain in windows(row, self.config.max_len, stride):
                batch.append(chain)
                size += len(chain.inputs)
                if size >= _FOREST_TOKENS:
                    run(batch)
                    batch, size = [], 0
        run(batch)
        return np.concatenate(out)


def reorder(utterance: Any, combined: np.ndarray, columns: dict[str, np.ndarray], oov: int) -> Any:
    """The list sorted by ``combined`` fp64 [H], best first; ties keep their order.

    Args:
        columns: fields of the hypotheses, fp64 [H] each, to be kept beside their ``score``.
        oov: out-of-vocabulary words of the list, kept beside the kind of its first pass.
    """
    columns = columns | {"score": combined}
    rows = [{name: float(column[i]) for name, column in columns.items()} for i in range(len(combined))]
    hyps = [replace(h, extra=h.extra | row) for h, row in zip(utterance.hyps, rows)]
    extra = utterance.extra | {"first_pass": first_pass_kind(utterance), "oov": oov}
    return replace(utterance, hyps=[hyps[i] for i in np.argsort(-combined, kind="stable")], extra=extra)


def _sum_paths(log_probs: np.ndarray, paths: Paths, oov: np.ndarray) -> list[NBestScores]:
    """The scores of every list from those of the requests, fp64 [R]; distinct hypotheses are summed once.

    Args:
        oov: int64 [H], unknown words of every hypothesis.
    """
    values, ends, which = log_probs[paths.requests], paths.ends, paths.which
    starts = ends - np.diff(ends, prepend=0)
    sums = (np.add.reduceat(values, starts) if len(ends) else np.empty(0))[which]
    words = (ends - starts - 1)[which]
    tokens = [values[a:b] for a, b in zip(starts[which].tolist(), ends[which].tolist())]
    bounds = [0, *paths.sizes.cumsum().tolist()]
    return [NBestScores(sums[a:b], words[a:b], oov[a:b], tokens[a:b]) for a, b in pairwise(bounds)]


def first_pass_kind(utterance: Any) -> str:
    """ "am", or "rank" for a list without scores."""
    return "rank" if utterance.hyps[0].am is None else "am"


def first_pass_scores(utterance: Any) -> np.ndarray:
    """fp64 [H]: the recogniser's scores, or minus the rank where there are none."""
    if first_pass_kind(utterance) == "rank":
        return -np.arange(len(utterance.hyps), dtype=np.float64)
    return np.array([h.am for h in utterance.hyps], dtype=np.float64)
