"""The stages evaluate, generate, rescore and wer as commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel, write_packed
from lowbit.model import TransformerLM
from lowbit.nbest import Hypothesis, NBest, read_nbest, write_nbest
from lowbit.quantize import quantize
from lowbit.tools import evaluate, generate, rescore, wer
from lowbit.vocab import Vocab

CONFIG = ModelConfig(vocab_size=6, d_model=32, n_layers=2, n_heads=2, d_ffn=48, max_len=12)
VOCAB = Vocab(["</s>", "<unk>", *"abcd"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The same tiny model as a checkpoint and packed to 8 bits."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    checkpoint = Checkpoint.of_model(TransformerLM(CONFIG), VOCAB)
    checkpoint.save(folder / "m.safetensors")
    tensors = checkpoint.tensors
    matrices = {m: PackedMatrix.from_quant_tensor(quantize(tensors[f"{m}.weight"], 8)) for m in CONFIG.matrix_shapes()}
    vectors = {name: tensors[name] for name in CONFIG.vector_shapes()}
    write_packed(folder / "m.lowbit", PackedModel(CONFIG, VOCAB, matrices, vectors, checkpoint.fp32_nbytes))
    return {"fp32": str(folder / "m.safetensors"), "packed": str(folder / "m.lowbit")}


@pytest.fixture
def lists(tmp_path) -> Path:
    path = tmp_path / "list.jsonl"
    rows = [
        NBest("u1", [Hypothesis("a b x", -1.0), Hypothesis("a b c", -1.1), Hypothesis("a b x", -1.2)], "a b c"),
        NBest("u2", [Hypothesis("d d", -0.5), Hypothesis("d c", -0.9)], "d d", {"spk": "s1"}),
    ]
    write_nbest(path, rows)
    return path


def as_json(capsys, stage, *arguments) -> dict:
    assert stage.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["fp32", "packed"])
def test_evaluate(models, kind, tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("a b c\n\nd nothing a\n")
    result = as_json(capsys, evaluate, models[kind], "--text", text, "--mode", "stream", "--stride", 3)
    assert result["n_tokens"] == 8 and result["n_oov"] == 1 and result["n_lines"] == 2 and result["stride"] == 3
    assert result["ppl"] == pytest.approx(math.exp(result["nll"] / 8))
    assert result["engine"]["kind"] == {"fp32": "checkpoint", "packed": "packed"}[kind]
    assert evaluate.main([models[kind], "--text", str(text), "--mode", "sentence"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "1 words" in out and "stride 6" in out


def test_generate(models, capsys):
    options = ("--prompt", "a b", "--max-new-tokens", 5, "--seed", 3)
    first = as_json(capsys, generate, models["packed"], *options)
    assert first["text"].startswith("a b") and len(first["text"].split()) <= 7
    assert generate.main([models["packed"], *map(str, options)]) == 0
    assert capsys.readouterr() == (first["text"] + "\n", "")


def test_generate_reports_unknown_words_of_the_prompt(models, capsys):
    assert generate.main([models["packed"], "--prompt", "a never b", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("a never b")
    assert captured.err == "lowbit generate: 1 of 3 words of the prompt unknown, read as <unk>\n"
    assert as_json(capsys, generate, models["packed"], "--prompt", "a never b", "--seed", 3)["n_oov"] == 1


def test_rescore_tunes_applies_and_reports(models, lists, tmp_path, capsys):
    out, weights = tmp_path / "out.jsonl", tmp_path / "w.json"
    shared = (models["packed"], "--nbest", lists, "--out", out, "--weights", weights)
    tuned = as_json(capsys, rescore, *shared, "--tune")
    assert tuned["first_pass_wer"] == 20.0 and tuned["oracle_wer"] == 0.0 and tuned["first_pass"] == "am"
    assert tuned["oracle_wer"] <= tuned["rescored_wer"] <= tuned["first_pass_wer"]
    assert json.loads(weights.read_text())["tuned_on"]["list"] == str(lists)
    done = list(read_nbest(out))
    assert [u.id for u in done] == ["u1", "u2"] and done[1].extra["spk"] == "s1"
    assert all("logprob" in h.extra and "score" in h.extra for u in done for h in u.hyps)
    applied = as_json(capsys, rescore, *shared)
    assert applied["rescored_wer"] == tuned["rescored_wer"]
    assert applied["weights"] == tuned["weights"]
    assert list(read_nbest(out)) == done
    by_hand = ("--nbest", str(lists), "--out", str(out), "--lm-weight", "0")
    assert rescore.main([models["fp32"], *by_hand]) == 0
    printed = capsys.readouterr().out
    assert "first pass 20.00, rescored 20.00, oracle 0.00" in printed and "utterances/s" in printed


def test_rescore_says_that_it_falls_back_to_ranks(models, tmp_path, capsys):
    path, out = tmp_path / "rank.jsonl", tmp_path / "out.jsonl"
    write_nbest(path, [NBest("u1", [Hypothesis("a"), Hypothesis("b")])])
    assert rescore.main([models["fp32"], "--nbest", str(path), "--out", str(out), "--lm-weight", "0.1", "--json"]) == 0
    captured = capsys.readouterr()
    assert "has no am scores: minus the rank stands for them" in captured.err
    assert json.loads(captured.out)["first_pass"] == "rank"
    assert next(read_nbest(out)).extra["first_pass"] == "rank"


def test_wer_of_texts(tmp_path, capsys):
    (tmp_path / "ref.txt").write_text("a b c\na b\n")
    (tmp_path / "one.txt").write_text("a x c\na\n")
    (tmp_path / "two.txt").write_text("a b c\na b\n")
    result = as_json(capsys, wer, *(tmp_path / f"{n}.txt" for n in ("ref", "one", "two")))
    assert [s["wer"] for s in result["systems"]] == [pytest.approx(40.0), 0.0]
    assert (result["systems"][0]["substitutions"], result["systems"][0]["deletions"]) == (1, 1)
    assert result["difference"]["wer"] == pytest.approx(40.0) and result["mapsswe"]["segments"] == 2
    assert wer.main([str(tmp_path / f"{n}.txt") for n in ("ref", "one", "two")]) == 0
    out = capsys.readouterr().out
    assert "40.00" in out and "MAPSSWE: 2 segments" in out


def test_wer_of_lists(lists, tmp_path, capsys):
    result = as_json(capsys, wer, lists)
    assert result["systems"][0]["wer"] == pytest.approx(20.0) and result["oracle_wer"] == 0.0
    # Another order, matched by id; and a text beside a list, matched by line.
    reordered = [u for u in read_nbest(lists)][::-1]
    write_nbest(tmp_path / "other.jsonl", [NBest(u.id, u.hyps[1:]) for u in reordered])
    (tmp_path / "hyp.txt").write_text("a b c\nd d\n")
    result = as_json(capsys, wer, lists, tmp_path / "other.jsonl", tmp_path / "hyp.txt")
    assert [s["errors"] for s in result["systems"]] == [1, 0]


def test_wer_of_transcripts(tmp_path, capsys):
    """Names match whatever the order; normalisation is for both sides; the table says what went wrong where."""
    (tmp_path / "ref.trn").write_text("It's a TEST. (u1)\nno  (u2)\n")
    (tmp_path / "hyp.txt").write_text("u2 no uh\nu1 it's the test\n")
    (tmp_path / "map.txt").write_text("uh\n")
    files = (tmp_path / "ref.trn", tmp_path / "hyp.txt", "--hyp-format", "text")
    assert [s["errors"] for s in as_json(capsys, wer, *files)["systems"]] == [4]
    options = ("--lower", "--no-punctuation", "--map", tmp_path / "map.txt", "--per-utterance", tmp_path / "out.tsv")
    result = as_json(capsys, wer, *files, *options)
    assert result["systems"][0]["errors"] == 1 and result["normalization"]["mapping"] == 1
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert rows[1][1:] == ["u1", "3", "1", "0", "0", "CSC", "it's a test", "it's the test"]
    assert rows[2][1:] == ["u2", "1", "0", "0", "0", "C", "no", "no"]


def test_wer_by_sclite_and_by_levenshtein(tmp_path, capsys):
    (tmp_path / "ref.txt").write_text("c c c b a\n")
    (tmp_path / "hyp.txt").write_text("b a a b\n")
    for alignment, errors in (("sclite", 5), ("levenshtein", 4)):
        result = as_json(capsys, wer, tmp_path / "ref.txt", tmp_path / "hyp.txt", "--alignment", alignment)
        assert result["systems"][0]["errors"] == errors and result["alignment"] == alignment


def test_rescore_reads_kaldi_and_writes_transcripts_and_lists(models, lists, tmp_path, capsys):
    write_nbest(tmp_path / "kaldi", read_nbest(lists), "kaldi")
    (tmp_path / "kaldi" / "utt2dur").write_text("u1 2\nu2 3\n")
    options = ("--lm-weight", 0.1, "--n-best-out", tmp_path / "full.jsonl", "--keep", 1, "--out", tmp_path / "best.trn")
    result = as_json(capsys, rescore, models["packed"], "--nbest", tmp_path / "kaldi", *options)
    assert result["duration"] == 5.0 and result["real_time_factor"] == pytest.approx(result["seconds"] / 5)
    done = list(read_nbest(tmp_path / "full.jsonl"))
    assert [len(u.hyps) for u in done] == [1, 1]
    best = [f"{u.hyps[0].text} ({u.id})" for u in done]
    assert (tmp_path / "best.trn").read_text().splitlines() == best
    assert as_json(capsys, wer, lists, tmp_path / "best.trn")["systems"][0]["wer"] == result["rescored_wer"]


def test_rescore_reads_lattices_with_references(models, tmp_path, capsys):
    (tmp_path / "lat.txt").write_text("u1\n0 1 a 1,20,\n0 1 b 2,5,\n1 2 c 0.5,1,\n2\n\n")
    (tmp_path / "refs").write_text("u1 b c\n")
    arguments = ("--nbest", tmp_path / "lat.txt", "--format", "lattice", "--paths", 2, "--refs", tmp_path / "refs")
    result = as_json(capsys, rescore, models["packed"], *arguments, "--out", tmp_path / "o.jsonl", "--tune")
    assert (result["hypotheses"], result["ref_words"], result["oracle_wer"]) == (2, 2, 0.0)
    hyps = next(read_nbest(tmp_path / "o.jsonl")).hyps
    assert {(h.text, h.am, h.lm) for h in hyps} == {("a c", -21.0, -1.5), ("b c", -6.0, -2.5)}


def test_rescore_to_standard_output(models, lists, capsys):
    assert rescore.main([models["packed"], "--nbest", str(lists), "--out", "-", "--lm-weight", "0.1"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == ["u1", "u2"]
    assert "utterances/s" in captured.err


def test_rescore_cross_validates(models, tmp_path, capsys):
    rows = [
        NBest(f"u{i}", [Hypothesis("a b", -1.0), Hypothesis("b", -1.2)], "a b", {"spk": f"s{i % 3}"}) for i in range(9)
    ]
    write_nbest(tmp_path / "l.jsonl", rows)
    arguments = ("--nbest", tmp_path / "l.jsonl", "--out", tmp_path / "o.jsonl", "--tune", "--folds", 3)
    result = as_json(capsys, rescore, models["fp32"], *arguments)
    assert len(result["fold_weights"]) == 3 and result["rescored_wer"] == 0.0
    assert [u.id for u in read_nbest(tmp_path / "o.jsonl")] == [u.id for u in rows]


def test_weights_hold_for_the_models_they_were_tuned_with(models, lists, tmp_path, capsys):
    weights = tmp_path / "w.json"
    weights.write_text('{"version": 2, "lm_weight": 1, "length_bonus": 0, "tuned_on": {"ngram": "3.arpa"}}')
    arguments = ("--nbest", str(lists), "--out", str(tmp_path / "o.jsonl"), "--weights", str(weights))
    assert rescore.main([models["fp32"], *arguments]) == 2
    assert "were tuned with a ngram; tune again" in capsys.readouterr().err


GOOD = '{"id": "a", "ref": "x", "hyps": [{"text": "x", "am": 1}]}\n'
BAD_LISTS = {
    "not JSON": (GOOD + "{oops\n", "line 2: not JSON"),
    "no id": (GOOD + '{"hyps": [{"text": "x"}]}\n', "line 2: the utterance has no 'id'"),
    "empty list": (GOOD + '{"id": "b", "hyps": []}\n', "line 2: utterance 'b': 'hyps' must be"),
    "id twice": (GOOD + GOOD, "line 2: utterance 'a' occurs twice"),
    "part of the scores": (GOOD + '{"id": "b", "ref": "x", "hyps": [{"text": "x"}]}\n', "utterance 'b': 'am' scores"),
    "part of the references": (GOOD + '{"id": "b", "hyps": [{"text": "x", "am": 1}]}\n', "utterance 'b'"),
    "empty file": ("", "holds no N-best list"),
}


@pytest.mark.parametrize("tune", [True, False])
@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_leave_nothing_behind(models, tmp_path, capsys, case, tune):
    content, message = BAD_LISTS[case]
    source, out, weights = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "w.json"
    source.write_text(content)
    how = ("--tune", "--weights", str(weights)) if tune else ("--lm-weight", "0.5")
    assert rescore.main([models["fp32"], "--nbest", str(source), "--out", str(out), *how]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and str(source) in error and "\n" not in error
    assert list(tmp_path.iterdir()) == [source]


def test_bad_commands(models, lists, tmp_path, capsys):
    empty, text, none = tmp_path / "empty.txt", tmp_path / "t.txt", tmp_path / "none"
    empty.write_text("\n \n")
    text.write_text("a\n")
    cut = tmp_path / "cut.lowbit"
    cut.write_bytes(Path(models["packed"]).read_bytes()[:-7])
    bare = tmp_path / "bare.jsonl"
    write_nbest(bare, [NBest("u1", [Hypothesis("a", 0.0)])])
    bare_text, bad_trn = tmp_path / "bare.trn", tmp_path / "bad.trn"
    bare_text.write_text("u1 a (u1)\n")
    bad_trn.write_text("a b c\n")
    fp32, out = models["fp32"], tmp_path / "out.jsonl"
    nbest = ("--nbest", lists, "--out", out)
    before = set(tmp_path.iterdir())
    for stage, arguments, message in [
        (evaluate, (fp32, "--text", none), "cannot read"),
        (evaluate, (fp32, "--text", empty), "holds no text"),
        (evaluate, (none, "--text", text), "no such model file"),
        (evaluate, (cut, "--text", text), "cut.lowbit"),
        (evaluate, (fp32, "--text", text, "--stride", 99), "stride must lie between 1 and"),
        (generate, (fp32, "--top-k", 0), "top_k must be at least 1"),
        (generate, (fp32, "--seed", -1), "seed must be an integer from 0, not -1"),
        (rescore, (fp32, *nbest, "--tune", "--seed", -1), "seed must be an integer from 0"),
        (wer, (lists, "--seed", -1), "seed must be an integer from 0"),
        (rescore, (fp32, *nbest), "give the weights once"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--weights", none), "give the weights once"),
        (rescore, (fp32, *nbest, "--tune", "--lm-weight", 1), "leave --lm-weight out"),
        (rescore, (fp32, *nbest, "--weights", none), "cannot read"),
        (rescore, (fp32, *nbest, "--weights", text), "not JSON"),
        (rescore, (fp32, *nbest, "--lm-weight", "nan"), "must be finite"),
        (rescore, (fp32, "--nbest", bare, "--out", out, "--tune"), "utterance 'u1' has no 'ref'"),
        (rescore, (fp32, "--nbest", lists, "--out", none / "x", "--lm-weight", 1), "does not exist"),
        (rescore, (fp32, *nbest, "--tune", "--weights", none / "w.json"), "does not exist"),
        (rescore, (fp32, *nbest, "--tune", "--weights", tmp_path), "not a regular file"),
        (rescore, (fp32, "--nbest", lists, "--out", tmp_path, "--lm-weight", 1), "not a regular file"),
        (wer, (text,), "needs hypotheses"),
        (wer, (bare,), "utterance 'u1' has no 'ref'"),
        (wer, (text, lists), "more utterances than the 1 of"),
        (wer, (lists, bare), "no utterance 'u2'"),
        (wer, (bare_text, lists), "utterance 'u2' is not in"),
        (wer, (lists, text), "1 utterances, but"),
        (wer, (bad_trn, lists), "line 1: expected words and then a name"),
        (wer, (lists, lists, "--map", text, "--per-utterance", none / "x"), "does not exist"),
        (wer, (lists, lists, "--hyp-format", "xml"), "cannot read the format 'xml'"),
        (wer, ("-", "-"), "only one file can be standard input"),
        (rescore, ("--nbest", lists, "--out", out, "--lm-weight", 1), "give MODEL, --ngram or both"),
        (rescore, (fp32, "--nbest", lists, "--lm-weight", 1), "say where the result goes"),
        (rescore, (fp32, *nbest, "--weights", none, "--length-bonus", 1), "--length-bonus goes with --lm-weight"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--folds", 2), "--folds goes with --tune"),
        (rescore, (fp32, *nbest, "--tune", "--folds", 2, "--weights", none), "every fold has its own"),
        (rescore, (fp32, *nbest, "--tune", "--folds", 2), "utterance 'u1' has no 'spk'"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--keep", 0), "--keep must be at least 1"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--context", 1), "utterance 'u1' has no 'conv'"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--out-format", "xml"), "--out-format must be one of"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--format", "xml"), "cannot read the format 'xml'"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--refs", bare_text), "utterance 'u2' is absent"),
        (rescore, (fp32, "--nbest", lists, "--out", "-", "--lm-weight", 1, "--json"), "let --out be a file"),
        (rescore, (fp32, *nbest, "--lm-weight", 1, "--ngram", text), "t.txt: "),
        (wer, (lists, lists, lists, lists), "at most two systems"),
        (wer, (text, none), "cannot read"),
        (wer, (lists, lists, "--level", 2), "--level between 0 and 1"),
    ]:
        assert stage.main(list(map(str, arguments))) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.strip().splitlines()) == 1, captured.err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("stage", ["evaluate", "generate", "rescore", "wer"])
def test_help_has_an_example(stage):
    path = Path(__file__).resolve().parents[1] / "tools" / f"{stage}.py"
    run = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True)
    assert f"example:\n  lowbit {stage}" in run.stdout and "--json" in run.stdout
