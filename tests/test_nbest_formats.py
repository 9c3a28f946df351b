"""Kaldi directories, mlm-scoring and ESPnet JSON, TSV, transcripts: read, written, refused."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tracemalloc
from dataclasses import replace

import pytest

from lowbit import nbest, nbest_json
from lowbit.errors import LowbitError
from lowbit.nbest import FORMATS, Hypothesis, NBest, find_format, read_nbest, write_nbest
from lowbit.nbest_tables import with_symbols

LISTS = [
    NBest("u-1", [Hypothesis("a b", -1.5, -2.25), Hypothesis("a", -2.0, -1.0)], "a b", {"spk": "s", "duration": 1.5}),
    NBest("u-2", [Hypothesis("é", -0.5, -3.0), Hypothesis("", -0.75, -0.5)], "é", {"spk": "t", "duration": 2.0}),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.tsv", "x.tsv.gz"])
def test_round_trip(tmp_path, name):
    assert write_nbest(tmp_path / name, LISTS) == 2
    assert list(read_nbest(tmp_path / name)) == LISTS
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_kaldi_round_trip(tmp_path):
    folder = tmp_path / "nbest"
    assert write_nbest(folder, LISTS, "kaldi") == 2
    assert (folder / "words").read_text(encoding="utf-8") == "u-1-1 a b\nu-1-2 a\nu-2-1 é\nu-2-2\n"
    assert (folder / "ac_cost").read_text() == "u-1-1 1.5\nu-1-2 2\nu-2-1 0.5\nu-2-2 0.75\n"
    assert (folder / "text").read_text(encoding="utf-8") == "u-1 a b\nu-2 é\n"
    (folder / "utt2dur").write_text("u-0 9\nu-1 1.5\nu-2 2\n")
    (folder / "utt2spk").write_text("u-1 s\nu-2 t\n")
    assert [u.to_dict() for u in read_nbest(folder)] == [numbered(u, (1, 2)) for u in LISTS]
    with pytest.raises(LowbitError, match="exists already"):
        write_nbest(folder, LISTS, "kaldi")
    # Another order: "n" tells the numbers of before, there as here.
    swapped = [replace(u, hyps=u.hyps[::-1]) for u in read_nbest(folder)]
    write_nbest(tmp_path / "swapped", swapped, "kaldi")
    assert (tmp_path / "swapped" / "n").read_text() == "u-1-1 2\nu-1-2 1\nu-2-1 2\nu-2-2 1\n"
    assert (tmp_path / "swapped" / "ac_cost").read_text() == "u-1-1 2\nu-1-2 1.5\nu-2-1 0.75\nu-2-2 0.5\n"


def numbered(utterance: NBest, numbers: tuple[int, ...]) -> dict:
    hyps = [replace(h, extra=h.extra | {"n": n}) for h, n in zip(utterance.hyps, numbers)]
    return replace(utterance, hyps=hyps).to_dict()


def test_kaldi_orders_hypotheses_by_number(tmp_path):
    # The order of `sort`: 1, 10, 2.
    (tmp_path / "words_text").write_text("u-1 one\nu-10 ten\nu-2 two\n")
    assert [h.text for h in next(read_nbest(tmp_path)).hyps] == ["one", "two", "ten"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ac_cost": "u-1 1\n"}, "no file 'words' or 'words_text'"),
        ({"words": "u a\n"}, "words: line 1: 'u' is not the name of a hypothesis"),
        ({"words": "u-1 a\n\n"}, "words: line 2 is empty"),
        ({"words": "u-1 a\nu-1 b\n"}, "words: line 1: utterance 'u': a hypothesis occurs twice"),
        ({"words": "u-1 a\nu-2 b\n", "ac_cost": "u-1 1\nu-3 1\n"}, "ac_cost: line 2: u-3, where"),
        ({"words": "u-1 a\nu-2 b\n", "ac_cost": "u-1 1\n"}, "the end, where"),
        ({"words": "u-1 a\n", "ac_cost": "u-1 1\nu-2 2\n"}, "ac_cost: line 2: u-2 is not in"),
        ({"words": "u-1 a\n", "lm_cost": "u-1 x\n"}, "lm_cost: line 1: 'x' is not a number"),
        ({"words": "u-1 a\n", "lm_cost": "u-1 inf\n"}, "utterance 'u': hypothesis 1: 'lm' must be a finite number"),
        ({"words": "u-1 a\n", "text": "v a\n"}, "text: utterance 'u' is absent"),
        ({"words": "u-1 a\nv-1 b\nu-2 a\n"}, "line 3: utterance 'u' occurs twice, first on line 1"),
    ],
)
def test_bad_kaldi_directories(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(LowbitError) as error:
        list(read_nbest(tmp_path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_kaldi_archives_as_its_rescoring_scripts_leave_them(tmp_path):
    """Their names, columns apart by tabs, a gzipped table; words of another table than the text are not looked at."""
    (tmp_path / "words").write_text("u-1 7\nu-2 8\n")
    (tmp_path / "words_text").write_text("u-1\tone\nu-2\ttwo words\n")
    (tmp_path / "acwt").write_text("u-1 1.5\nu-2 2.5\n")
    with gzip.open(tmp_path / "lmwt.withlm.gz", "wt") as stream:
        stream.write("u-1 3\nu-2 4\n")
    (tmp_path / "lmwt.nolm").write_text("u-1 1\nu-2 1\n")
    (utterance,) = read_nbest(tmp_path)
    assert [(h.text, h.am, h.lm, h.extra) for h in utterance.hyps] == [
        ("one", -1.5, -3.0, {"n": 1}), ("two words", -2.5, -4.0, {"n": 2}),
    ]  # fmt: skip


def espnet2(folder, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def test_espnet2_directory(tmp_path):
    """Scores as ESPnet2 prints them; the second utterance has one hypothesis only."""
    espnet2(tmp_path, {
        "1best_recog/text": "u1 a b\nu2\nu3 c\n", "1best_recog/score": "u1 tensor(-1.5)\nu2 -2\nu3 -1e-3\n",
        "2best_recog/text": "u1 a\nu3 d\n", "2best_recog/score": "u1 tensor(-2.5, device='cuda:0')\nu3 -3.0\n",
        "1best_recog/token": "u1 x\n",
    })  # fmt: skip
    assert list(read_nbest(tmp_path)) == [
        NBest("u1", [Hypothesis("a b", -1.5), Hypothesis("a", -2.5)]), NBest("u2", [Hypothesis("", -2.0)]),
        NBest("u3", [Hypothesis("c", -0.001), Hypothesis("d", -3.0)]),
    ]  # fmt: skip
    for path in tmp_path.glob("*/score"):
        path.unlink()
    assert [u.has_am for u in read_nbest(tmp_path)] == [False] * 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"2best_recog/text": "u a\n"}, "it has no folder '1best_recog'"),
        ({"1best_recog/text": "u a\n", "2best_recog/text": "u b\nv c\n"}, "line 2: utterance 'v' is not in"),
        ({"1best_recog/text": "u a\nv b\n", "2best_recog/text": "v b\nu a\n"}, "line 2: utterance 'u' is not in"),
        ({"1best_recog/text": "u a\n", "1best_recog/score": "v 1\n"}, "score: utterance 'u' is absent"),
        ({"1best_recog/text": "u a\n", "1best_recog/score": "u x\n"}, "score: utterance 'u': 'x' is not a number"),
        ({"1best_recog/text": "u a\nu b\n"}, "line 2: utterance 'u' occurs twice"),
    ],
)
def test_bad_espnet2_directories(tmp_path, files, message):
    espnet2(tmp_path, files)
    with pytest.raises(LowbitError) as error:
        list(read_nbest(tmp_path, "espnet"))
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_symbol_table(tmp_path):
    (tmp_path / "words.txt").write_text("<eps> 0\nhello 7\nworld 8\n")
    lists = [NBest("u", [Hypothesis("7 8", -1.0), Hypothesis("8", -2.0)])]
    (named,) = with_symbols(lists, tmp_path / "words.txt")
    assert [(h.text, h.am) for h in named.hyps] == [("hello world", -1.0), ("world", -2.0)]
    with pytest.raises(LowbitError, match=r"words\.txt: no number '9', which utterance 'u' holds"):
        list(with_symbols([NBest("u", [Hypothesis("7 9")])], tmp_path / "words.txt"))
    (tmp_path / "words.txt").write_text("hello\n")
    with pytest.raises(LowbitError, match="line 1: expected a word and its number"):
        list(with_symbols(lists, tmp_path / "words.txt"))


def test_mlm_scoring_as_published(tmp_path):
    path = tmp_path / "am.json"
    path.write_text(
        '{"1272-0": {"hyp_1": {"score": -1.2, "text": "best"}, "hyp_10": {"score": -3, "text": "worst"},'
        ' "hyp_2": {"score": -2, "text": "next"}, "ref": "the best"}}'
    )
    (utterance,) = read_nbest(path)
    assert [(h.text, h.am) for h in utterance.hyps] == [("best", -1.2), ("next", -2.0), ("worst", -3.0)]
    assert utterance.ref == "the best" and utterance.extra == {}


def test_mlm_scoring_keeps_both_scores_of_a_rescored_list(tmp_path):
    path = tmp_path / "out.json"
    lists = [NBest("u", [Hypothesis("a", -1.0, extra={"score": -5.0})])]
    write_nbest(path, lists)
    assert json.loads(path.read_text())["u"]["hyp_1"] == {"text": "a", "am": -1.0, "score": -5.0}
    assert list(read_nbest(path)) == lists


def test_espnet_decoding_result(tmp_path):
    path = tmp_path / "data.json"
    output = [{"name": f"target1[{i}]", "rec_text": f"w {i}<eos>", "score": -i, "text": "w 1"} for i in (1, 2)]
    path.write_text(json.dumps({"utts": {"u1": {"input": [], "output": output}, "u2": {"output": output}}}))
    lists = list(read_nbest(path))
    assert lists[0] == NBest("u1", [Hypothesis("w 1", -1.0), Hypothesis("w 2", -2.0)], "w 1")
    assert [u.id for u in lists] == ["u1", "u2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "line 1: not JSON: expected {, found ["),
        ("", "line 1: not JSON: expected {, found the end"),
        ("{}", "holds no N-best list"),
        ('{"a": {"hyp_1": {"text": "x"}}\n\n', "line 3: not JSON: expected ,, found the end"),
        ('{"a": {"hyp_1": {"text": "x"}}}\n{}', "line 2: not JSON: more text after the object; name it .jsonl"),
        ('{"a" 1}', "line 1: not JSON: expected :, found 1"),
        ("{\n1: 2}", 'line 2: not JSON: expected ", found 1'),
        ('{"a": {"hyp_1": {"text": "x"', "value from line 1 on: not JSON"),
        ('{"a": 3}', "line 1: utterance 'a': expected 'hyp_1'"),
        ('{\n\n"a":\n{"ref": "x"}}', "line 3: utterance 'a': expected 'hyp_1'"),
        ('{"a": {"output": [{"text": "x"}]}}', "line 1: utterance 'a': expected"),
        ('{"a": {"hyp_1": {"text": "x", "score": NaN}}}', "NaN is not a finite number"),
        ('{"a": {"hyp_1": {"text": "x", "score": "1"}}}', "utterance 'a': hypothesis 1: 'am' must be a number"),
        (
            '{"a": {"hyp_1": {"text": "x"}},\n"a": {"hyp_1": {"text": "x"}}}',
            "line 2: utterance 'a' occurs twice, first on line 1",
        ),
        ('{"a": {"x": ' + "[" * 100_000, "not JSON"),
    ],
)
def test_bad_json(refuse, content, message):
    refuse(read_nbest, "list.json", content, message)


def test_json_is_read_in_pieces(tmp_path, monkeypatch):
    """Whatever the size of the pieces: inside a character, a string, a number."""
    path = tmp_path / "list.json"
    write_nbest(path, LISTS)
    for size in (1, 2, 7):
        monkeypatch.setattr(nbest_json, "_CHUNK", size)
        assert list(read_nbest(path)) == LISTS
        assert [place for place, _ in nbest_json.read_json(path)] == ["line 2", "line 3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected the names of the columns"),
        ("id\tam\n", "line 1: expected the names"),
        ("id\ttext\tid\n", "line 1: expected the names"),
        ("id\ttext\n", "holds no N-best list"),
        ("id\ttext\na\n", "line 2: 1 columns, but the header has 2"),
        ("id\ttext\n\tx\n", "line 2: the utterance has no 'id'"),
        ("id\ttext\tam\na\tx\t1\na\ty\tz\n", "line 3: 'am': 'z' is not a number"),
        ("id\ttext\tam\na\tx\t1\na\ty\t\n", "utterance 'a': hypothesis 2 has no 'am'"),
        ("id\ttext\tref\na\tx\tr\na\ty\ts\n", "line 3: utterance 'a': another 'ref' than on line 2"),
        ("id\ttext\na\tx\nb\tx\na\tx\n", "line 4: utterance 'a' occurs twice, first on line 2"),
    ],
)
def test_bad_tsv(refuse, content, message):
    refuse(read_nbest, "list.tsv", content, message)


def test_tsv_cannot_hold_tabs(tmp_path):
    with pytest.raises(LowbitError, match="utterance 'u': a field that the header lacks, or a tab"):
        write_nbest(tmp_path / "x.tsv", [NBest("u", [Hypothesis("a\tb")])])
    assert list(tmp_path.iterdir()) == []


def test_transcripts(tmp_path):
    write_nbest(tmp_path / "x.trn", LISTS)
    assert (tmp_path / "x.trn").read_text(encoding="utf-8") == "a b (u-1)\né (u-2)\n"
    write_nbest(tmp_path / "x", [*LISTS, NBest("e", [Hypothesis("")])], "text")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "u-1 a b\nu-2 é\ne\n"


def test_standard_input_and_output(monkeypatch, capsys):
    write_nbest("-", LISTS)
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(printed.encode())))
    assert list(read_nbest("-")) == LISTS
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(printed.encode() * 2)))
    with pytest.raises(LowbitError, match="-: line 3: utterance 'u-1' occurs twice"):
        list(read_nbest("-"))


def test_formats_by_name(tmp_path):
    names = {"a.jsonl": "jsonl", "a.json.gz": "json", "a.tsv": "tsv", "a.trn": "trn", "-": "jsonl", "a.txt": "jsonl"}
    assert {n: find_format(n) for n in names} == names
    assert find_format(tmp_path) == "kaldi"
    with pytest.raises(LowbitError, match="cannot read the format 'trn'; one of jsonl, json, kaldi, espnet, tsv"):
        next(read_nbest("a.trn"))


@pytest.mark.parametrize("name", ["big.jsonl.gz", "big.json", "big.tsv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """5 times the utterances, the same peak: less than one reading buffer more."""
    peaks = []
    for count in (200, 1000):
        path = tmp_path / name
        text = " ".join(["word"] * 20)
        write_nbest(path, (NBest(f"u{i}", [Hypothesis(text, -float(n)) for n in range(5)], text) for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in read_nbest(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A hash in a set takes 100 bytes or so until 65,536 of them are sorted into 8 bytes each.
    assert peaks[1] - peaks[0] < 150 * 800 + 2**16


def test_names_are_found_in_buffer_and_in_the_sorted_part(monkeypatch):
    monkeypatch.setattr(nbest._Names, "BUFFER", 4)
    names = nbest._Names()
    assert all(names.add(f"n{i}") for i in range(30)) and len(names) == 30
    assert not any(names.add(f"n{i}") for i in range(30))


def test_equal_hashes_are_not_taken_for_equal_names(tmp_path, monkeypatch):
    monkeypatch.setattr(nbest.xxhash, "xxh3_64_intdigest", lambda data: 7)
    write_nbest(tmp_path / "x.jsonl", LISTS)
    assert [u.id for u in read_nbest(tmp_path / "x.jsonl")] == ["u-1", "u-2"]


def test_cut_gzip(tmp_path):
    for form in FORMATS:
        if form in ("kaldi", "espnet"):
            continue
        path = tmp_path / f"x.{form}.gz"
        write_nbest(path, [NBest(f"u{i}", LISTS[0].hyps) for i in range(300)])
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(LowbitError, match="cannot read"):
            list(read_nbest(path))
        path.write_bytes(gzip.compress(b"\xff\xfe"))
        with pytest.raises(LowbitError, match="UTF-8"):
            list(read_nbest(path))
