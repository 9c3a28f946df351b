"""The demo: its text, its simulated recogniser, its proofs, and the whole of it at a size of seconds."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.files import read_lines
from lowbit.nbest import read_nbest
from lowbit.tools import demo
from lowbit.tools.demo_parts import channel, checks, corpus
from lowbit.tools.training import config as training_config
from lowbit.vocab import Vocab
from lowbit.wer import distances

TINY = {
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ffn": 64, "max_len": 32},
    "mode": "sentence", "min_count": 2, "seq_len": 32, "batch_size": 16, "epochs": 1, "lr": 0.01, "warmup": 5,
    "evals": 1, "seed": 1,
}  # fmt: skip
SUBJECTS = ("the file", "a socket", "the parser", "this module")
VERBS = ("reads", "writes", "closes", "returns")
OBJECTS = ("data", "lines", "a name")
ENDS = ("", " again", " on error", " by default", " for the user", " in the order of the list")


def small_corpus(folder: Path) -> dict[str, int]:
    """Every sentence of a small grammar, in the demo's splits."""
    lines = [f"{s} {v} {o}{e}" for s, v, o, e in itertools.product(SUBJECTS, VERBS, OBJECTS, ENDS)]
    splits = {"train": lines * 3, "valid": lines[::7], "dev": lines[::5], "test": lines[::3]}
    for name, text in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(text) + "\n")
    return {name: sum(len(t.split()) for t in text) for name, text in splits.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One small demo: (its folder, result)."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "demo.json").write_text(json.dumps(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_config, "_FOLDER", folder)
        patch.setattr(demo, "write_corpus", small_corpus)
        patch.setattr(demo, "LISTS", {"dev": 20, "test": 20})
        assert demo.main(["--out", str(folder / "out")]) == 0
        stamps = (folder / "out" / "stages.json").stat().st_mtime_ns
        assert demo.main(["--out", str(folder / "out")]) == 0
        assert (folder / "out" / "stages.json").stat().st_mtime_ns == stamps, "the second run repeated a stage"
    return folder / "out", json.loads((folder / "out" / "results.json").read_text())


def test_demo_ends_with_table_picture_and_json(ran):
    out, result = ran
    titles = [row["title"] for row in result["rows"]]
    assert "full precision" in titles[0] and "ADMM" in titles[-1] and any("2 bits" in t for t in titles)
    for row in result["rows"]:
        assert row["test_ppl"] > 1 and row["sentences_per_second"] > 0 and 0 <= row["test_rescored_wer"] <= 100
    assert result["rows"][0]["bytes"] > result["rows"][-1]["bytes"]
    assert "SIMULATED" in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_demo_proves_that_packed_is_trained(ran):
    out, result = ran
    plan = Checkpoint.load(out / "admm.safetensors").plan
    assert result["checks"]["identical"]["matrices"] == len(plan)
    assert result["checks"]["largest_logprob_difference"] <= checks.LOGPROB_TOLERANCE


def test_a_weight_that_differs_is_found(ran, tmp_path):
    out, _ = ran
    checkpoint = Checkpoint.load(out / "admm.safetensors")
    weight = checkpoint.tensors["layers.0.mlp.fc2.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    checkpoint.save(tmp_path / "other.safetensors")
    with pytest.raises(LowbitError, match=r"1 of 2,048 values of 'layers.0.mlp.fc2' differ"):
        checks.same_codes(tmp_path / "other.safetensors", out / "admm.lowbit")


def test_demo_refuses_a_folder_that_cannot_be(tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "no" / "such" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert demo.main(["--out", str(tmp_path / "out"), "--threads", "0"]) == 2
    assert "positive integer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("piece", "words"),
    [
        ("Return the file's os.path, or None.", "return the file's os path or none"),
        ("Read 3 lines (at most)", "read three lines at most"),
        ("Use UTF-8 or 1024 bytes", None),  # numbers of several digits have no one reading
        ("Two words", None),
        ("x " * (corpus.MAX_WORDS + 1), None),
    ],
)
def test_spoken(piece, words):
    assert corpus.spoken(piece) == words


def test_sentences_leave_code_out():
    text = "The first sentence of prose. Another one follows here.\n\n>>> import os\n>>> os.getcwd()\n\n  x = y + 1\n"
    assert list(corpus.sentences(text)) == ["the first sentence of prose", "another one follows here"]


def test_split_is_a_function_of_the_sentence():
    sentences = [f"sentence number {i} of many" for i in range(4000)]
    counts = Counter(map(corpus.split_of, sentences))
    assert [corpus.split_of(s) for s in sentences[:50]] == [corpus.split_of(s) for s in sentences[:50]]
    for split, share in corpus.SHARES.items():
        # Binomial(4000, p): five standard deviations.
        assert abs(counts[split] - 40 * share) < 5 * (40 * share) ** 0.5


def test_python_without_documentation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "documents", lambda: iter(["A single sentence stands here."]))
    with pytest.raises(LowbitError, match="holds 1 sentences"):
        corpus.write_corpus(tmp_path)
    assert not list(tmp_path.iterdir())


def test_docstrings_are_parsed_not_imported(tmp_path):
    (tmp_path / "bad.py").write_text("def broken(:\n")
    (tmp_path / "good.py").write_text('"""Module text."""\nraise SystemExit\ndef f():\n    """Function text."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""Not wanted."""\n')
    assert list(corpus.docstrings(tmp_path)) == ["Module text.", "Function text."]


@pytest.mark.parametrize(("a", "b"), [("write", "right"), ("their", "there"), ("files", "fylez"), ("know", "no")])
def test_words_that_sound_alike(a, b):
    assert channel.sounds(a) == channel.sounds(b)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channel")
    small_corpus(folder)
    lines = read_lines(folder / "train.txt")
    return channel.Channel(Vocab.build(lines), Counter(w for line in lines for w in line.split())), lines


def test_channel_lists_are_sorted_distinct_and_reproducible(recogniser):
    heard, lines = recogniser
    lists = channel.simulate(heard, lines[:30], "x")
    assert lists == channel.simulate(heard, lines[:30], "x")
    assert len({u.id for u in lists}) == 30
    for u in lists:
        assert [h.am for h in u.hyps] == sorted((h.am for h in u.hyps), reverse=True)
        assert len({h.text for h in u.hyps}) == len(u.hyps) <= channel.N_BEST
    assert any(distances(u.ref, [u.hyps[0].text])[0] for u in lists), "a channel without errors shows nothing"


def test_channel_without_noise_hears_the_truth(recogniser):
    _, lines = recogniser
    quiet = channel.ChannelOptions(noise=0.0)
    clean = channel.Channel(Vocab.build(lines), Counter(), quiet)
    for u in channel.simulate(clean, lines[:20], "x"):
        assert u.hyps[0].text == u.ref and u.hyps[0].am == 0.0


def test_channel_hears_unknown_words_as_known_ones(recogniser):
    heard, _ = recogniser
    (u,) = channel.simulate(heard, ["the filer reads dater"], "x")
    vocabulary = set(heard.words)
    assert all(set(h.text.split()) <= vocabulary for h in u.hyps)


def test_lists_survive_the_file(ran):
    out, _ = ran
    assert len(list(read_nbest(out / "data" / "test.jsonl"))) == 20
