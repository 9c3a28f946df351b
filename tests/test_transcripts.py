from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.nbest import Hypothesis, NBest, write_nbest
from lowbit.transcripts import Matched, Row, read_rows


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_format(tmp_path):
    write_nbest(tmp_path / "x.jsonl", [NBest("u", [Hypothesis("b"), Hypothesis("c")], "a")])
    assert list(read_rows(tmp_path / "x.jsonl", True)) == [Row("u", "a", ["b", "c"])]
    assert list(read_rows(tmp_path / "x.jsonl", False)) == [Row("u", "b", ["b", "c"])]
    assert list(read_rows(write(tmp_path / "x.trn", "a (b) c (spk_1)\n(spk_2)\n\n"), True)) == [
        Row("spk_1", "a (b) c"), Row("spk_2", ""),
    ]  # fmt: skip
    assert list(read_rows(write(tmp_path / "text", "u a b\nv\n"), True, "text")) == [Row("u", "a b"), Row("v", "")]
    assert list(read_rows(tmp_path / "text", True)) == [Row(None, "u a b"), Row(None, "v")]


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("x.txt", "", None, "the file is empty"),
        ("x.txt", "a\n", "xml", "cannot read the format 'xml'"),
        ("x.trn", "a (u)\na b\n", None, "line 2: expected words and then a name"),
        ("x", "u a\n\n", "text", "line 2 is empty"),
        ("x.jsonl", '{"id": "u", "hyps": [{"text": "a"}]}\n', None, "utterance 'u' has no 'ref'"),
    ],
)
def test_bad_files(tmp_path, name, content, format, message):
    path = write(tmp_path / name, content)
    with pytest.raises(LowbitError, match=message):
        list(read_rows(path, True, format))


def test_matching_by_name_holds_what_comes_early(tmp_path):
    matched = Matched(write(tmp_path / "h.trn", "c (3)\na (1)\nb (2)\n"), "ref")
    assert [matched.get(name).text for name in ("1", "2", "3")] == ["a", "b", "c"]
    matched.end()


def test_matching_by_line(tmp_path):
    matched = Matched(write(tmp_path / "h.txt", "a\nb\n"), "ref")
    assert [matched.get(name).text for name in ("1", None)] == ["a", "b"]
    matched.end()
    with pytest.raises(LowbitError, match="2 utterances, but ref has more"):
        matched.get(None)


@pytest.mark.parametrize(
    ("content", "wanted", "message"),
    [
        ("a (1)\n", ["1", "2"], "no utterance '2', which ref has"),
        ("a (1)\nb (2)\n", ["1"], "utterance '2' is not in ref"),
        ("b (2)\na (1)\n", ["1"], "utterance '2' is not in ref"),
        ("b (2)\nb (2)\na (1)\n", ["1"], "utterance '2' occurs twice"),
        ("a (1)\nb (2)\n", [None], "more utterances than the 1 of ref"),
    ],
)
def test_what_does_not_match(tmp_path, content, wanted, message):
    matched = Matched(write(tmp_path / "h.trn", content), "ref")

    def all_of_them():
        for name in wanted:
            matched.get(name)
        matched.end()

    with pytest.raises(LowbitError, match=message):
        all_of_them()
