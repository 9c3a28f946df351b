from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lowbit.backend import TorchBackend
from lowbit.config import ModelConfig
from lowbit.engine import LanguageModel
from lowbit.errors import LowbitError
from lowbit.model import TransformerLM
from lowbit.nbest import Hypothesis, NBest
from lowbit.rescore import RescoringReport, Weights, rescore_stream, tune_weights
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=6, d_model=32, n_layers=2, n_heads=2, d_ffn=48, max_len=12)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(TorchBackend(TransformerLM(CONFIG)), CONFIG, Vocab(["</s>", "<unk>", *"abcd"]))


def make_lists(count: int = 60, with_am: bool = True, with_ref: bool = True) -> list[NBest]:
    """Noisy copies of a random sentence, with scores that know a little about their errors."""
    rng = np.random.default_rng(0)
    lists = []
    for i in range(count):
        words = rng.choice(list("abcd"), rng.integers(2, 7))
        hyps = []
        for _ in range(4):
            noisy = [w if rng.random() > 0.3 else rng.choice([*"abcd", "zz"]) for w in words]
            am = -sum(a != b for a, b in zip(words, noisy)) + 2 * rng.standard_normal()
            hyps.append(Hypothesis(" ".join(noisy), am if with_am else None))
        if with_am:
            hyps.sort(key=lambda h: -h.am)
        lists.append(NBest(f"u{i}", hyps, " ".join(words) if with_ref else None))
    return lists


def test_weights_round_trip(tmp_path):
    weights = Weights(0.25, -1.5, "am", {"list": "dev.jsonl", "utterances": 3})
    weights.save(tmp_path / "w.json")
    assert Weights.load(tmp_path / "w.json") == weights


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "not a weights file of version 1"),
        ({"version": 2}, "not a weights file of version 1"),
        ({"version": 1, "length_bonus": 0}, "'lm_weight' must be a finite number, not None"),
        ({"version": 1, "lm_weight": True, "length_bonus": 0}, "'lm_weight' must be a finite number"),
        ({"version": 1, "lm_weight": 1, "length_bonus": "x"}, "'length_bonus' must be a finite number"),
        ({"version": 1, "lm_weight": 1e999, "length_bonus": 0}, "'lm_weight' must be a finite number"),
        ({"version": 1, "lm_weight": 1, "length_bonus": 0, "first_pass": "lm"}, "'first_pass' must be"),
    ],
)
def test_bad_weights(tmp_path, values, message):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(values))
    with pytest.raises(LowbitError, match=message) as error:
        Weights.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("with_am", [True, False])
def test_tuned_weights_give_what_the_tuning_promises(lm, with_am):
    lists = make_lists(with_am=with_am)
    weights = tune_weights(lm, lists, "dev.jsonl")
    assert weights == tune_weights(lm, lists, "dev.jsonl")
    assert weights.lm_weight >= 0 and weights.first_pass == ("am" if with_am else "rank")
    assert weights.tuned_on["utterances"] == 60 and weights.tuned_on["list"] == "dev.jsonl"
    report = RescoringReport()
    done = list(rescore_stream(lm, iter(lists), weights, report))
    found = report.to_dict()
    assert [u.id for u in done] == [u.id for u in lists]
    assert found["first_pass_wer"] == pytest.approx(weights.tuned_on["first_pass_wer"])
    assert found["rescored_wer"] == pytest.approx(weights.tuned_on["rescored_wer"])
    assert found["oracle_wer"] <= found["rescored_wer"] < found["first_pass_wer"]
    assert found["oov"] == sum(h.text.split().count("zz") for u in lists for h in u.hyps)
    assert found["hypotheses"] == 240 and found["utterances"] == 60


def test_lists_without_references_are_rescored_but_not_tuned_on(lm):
    lists = make_lists(5, with_ref=False)
    report = RescoringReport()
    assert len(list(rescore_stream(lm, lists, Weights(0.5), report))) == 5
    assert "rescored_wer" not in report.to_dict() and report.utterances == 5
    with pytest.raises(LowbitError, match=r"dev: utterance 'u0' has no 'ref'"):
        tune_weights(lm, lists, "dev")


def test_mixtures_are_refused(lm):
    scored, ranked, bare = make_lists(2), make_lists(2, with_am=False), make_lists(2, with_ref=False)
    for lists, weights, message in [
        ([scored[0], ranked[1]], Weights(0.5), "utterance 'u1': 'am' scores in some"),
        ([scored[0], bare[1]], Weights(0.5), "utterance 'u1': 'ref' in some"),
        (ranked, Weights(0.5, first_pass="am"), "gives rank, the weights were tuned on am"),
    ]:
        with pytest.raises(LowbitError, match=message):
            list(rescore_stream(lm, lists, weights, RescoringReport()))
    with pytest.raises(LowbitError, match="'am' scores in some"):
        tune_weights(lm, [scored[0], ranked[1]])


def test_references_without_words_cannot_be_tuned_on(lm):
    with pytest.raises(LowbitError, match="hold no word"):
        tune_weights(lm, [NBest("a", [Hypothesis("a", 0.0), Hypothesis("b", 0.0)], "")])


def test_the_stream_holds_a_few_lists_only(lm):
    taken = 0

    def source():
        nonlocal taken
        for utterance in make_lists(300):
            taken += 1
            yield utterance

    next(rescore_stream(lm, source(), Weights(0.5), RescoringReport()))
    assert taken < 300
