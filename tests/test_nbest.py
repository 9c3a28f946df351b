from __future__ import annotations

import gzip
import itertools
import json

import pytest

from lowbit.errors import LowbitError
from lowbit.nbest import Hypothesis, NBest, read_nbest, write_nbest

GOOD = (
    '{"id": "a", "spk": "s1", "ref": "x y", '
    '"hyps": [{"text": "x", "am": -1.5, "lm": -2, "rank": 1}, {"text": "", "am": 0}]}'
)


def test_round_trip_keeps_unknown_fields(tmp_path):
    source, copy = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    source.write_text(GOOD + '\n\n{"id": "b", "hyps": [{"text": "é"}]}\n', encoding="utf-8")
    lists = list(read_nbest(source))
    assert lists[0] == NBest("a", [Hypothesis("x", -1.5, -2.0, {"rank": 1}), Hypothesis("", 0.0)], "x y", {"spk": "s1"})
    assert lists[0].has_am and not lists[1].has_am
    assert write_nbest(copy, lists) == 2
    assert list(read_nbest(copy)) == lists
    assert json.loads(gzip.decompress(copy.read_bytes()).splitlines()[0]) == json.loads(GOOD)


BAD = [
    ("{oops", "line 2: not JSON"),
    ("[1]", "line 2: expected an object"),
    ('{"hyps": [{"text": "x"}]}', "line 2: the utterance has no 'id'"),
    ('{"id": "", "hyps": [{"text": "x"}]}', "line 2: the utterance has no 'id'"),
    ('{"id": 7, "hyps": [{"text": "x"}]}', "line 2: the utterance has no 'id'"),
    ('{"id": "b", "hyps": []}', "line 2: utterance 'b': 'hyps' must be a list with at least one"),
    ('{"id": "b"}', "line 2: utterance 'b': 'hyps'"),
    ('{"id": "b", "ref": 3, "hyps": [{"text": "x"}]}', "utterance 'b': 'ref' must be a string"),
    ('{"id": "b", "hyps": ["x"]}', "utterance 'b': hypothesis 1: expected an object with 'text'"),
    ('{"id": "b", "hyps": [{"text": 3}]}', "utterance 'b': hypothesis 1: expected an object with 'text'"),
    ('{"id": "b", "hyps": [{"text": "x", "am": "1"}]}', "utterance 'b': hypothesis 1: 'am' must be a number, not str"),
    ('{"id": "b", "hyps": [{"text": "x", "am": true}]}', "'am' must be a number, not bool"),
    ('{"id": "b", "hyps": [{"text": "x", "am": NaN}]}', "line 2: NaN is not a finite number"),
    ('{"id": "b", "hyps": [{"text": "x", "lm": 1e999}]}', "'lm' must be a finite number"),
    ('{"id": "b", "hyps": [{"text": "x", "am": 1' + "0" * 400 + "}]}", "'am' must be a finite number"),
    ('{"id": "b", "hyps": [{"text": "x", "am": 1}, {"text": "y"}]}', "hypothesis 2 has no 'am' but others have"),
    (GOOD, "line 2: utterance 'a' occurs twice, first on line 1"),
    ("[" * 100_000, "line 2: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_name_file_line_and_utterance(tmp_path, line, message):
    path = tmp_path / "list.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(LowbitError) as error:
        list(read_nbest(path))
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path):
    path = tmp_path / "list.jsonl"
    with pytest.raises(LowbitError, match="cannot read"):
        list(read_nbest(path))
    path.write_text("\n")
    with pytest.raises(LowbitError, match="holds no N-best list"):
        list(read_nbest(path))
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(LowbitError, match="is not UTF-8"):
        list(read_nbest(path))
    packed = tmp_path / "list.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD.encode() * 50)[:-20])
    with pytest.raises(LowbitError, match="cannot read"):
        list(read_nbest(packed))


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text(f"{GOOD}\n{{oops\n")
    assert [u.id for u in itertools.islice(read_nbest(path), 1)] == ["a"]


def test_nothing_is_left_of_a_failed_write(tmp_path):
    def lists():
        yield NBest("a", [Hypothesis("x")])
        raise LowbitError("no more")

    with pytest.raises(LowbitError, match="no more"):
        write_nbest(tmp_path / "out.jsonl", lists())
    with pytest.raises(LowbitError, match="utterance 'a'"):
        write_nbest(tmp_path / "out.jsonl", [NBest("a", [Hypothesis("x", extra={"score": float("nan")})])])
    assert list(tmp_path.iterdir()) == []
