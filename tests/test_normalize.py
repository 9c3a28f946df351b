from __future__ import annotations

import pytest

from lowbit.errors import LowbitError
from lowbit.normalize import Normalizer, read_mapping


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "It's,  OK.", "It's, OK."),
        ({"lower": True}, "It's ÖK", "it's ök"),
        ({"punctuation": True}, "\"It's,\" 'OK'. -- twenty-one; a.m.!", "It's OK twenty-one a.m"),
        ({"punctuation": True}, "$5 ... ?", "5"),
        ({"hyphens": True}, "twenty-one", "twenty one"),
        ({"unicode": "NFKC"}, "ﬁve e\u0301", "five é"),
        ({"mapping": {"uh": "", "gonna": "going to"}}, "uh i'm gonna uh", "i'm going to"),
        ({"lower": True, "mapping": {"uh": ""}}, "Uh yes", "yes"),
    ],
)
def test_normalization(options, text, expected):
    normalize = Normalizer(**options)
    assert normalize(text) == expected
    assert normalize.active == bool(options)


def test_mapping_file(tmp_path):
    path = tmp_path / "map.txt"
    path.write_text("uh\n\ngonna going to\n")
    assert read_mapping(path) == {"uh": "", "gonna": "going to"}
    path.write_text("uh\nuh um\n")
    with pytest.raises(LowbitError, match="line 2: 'uh' is mapped twice"):
        read_mapping(path)


def test_what_was_done_is_recorded():
    assert Normalizer(lower=True, mapping={"a": "b"}).to_dict() == {"lower": True, "mapping": 1}
