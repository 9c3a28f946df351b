from __future__ import annotations

import json
import math

import pytest

from lowbit.errors import LowbitError
from lowbit.weights import Weights


def test_round_trip(tmp_path):
    weights = Weights(0.25, -1.5, 0.75, "linear", 2.0, 0.5, -3.0, True, "am", {"list": "dev.jsonl", "utterances": 3})
    weights.save(tmp_path / "w.json")
    assert Weights.load(tmp_path / "w.json") == weights


def test_version_1_knew_two_weights(tmp_path):
    path = tmp_path / "w.json"
    path.write_text('{"version": 1, "lm_weight": 1, "length_bonus": 2, "first_pass": "rank", "tuned_on": {}}')
    assert Weights.load(path) == Weights(1.0, 2.0, first_pass="rank")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "not a weights file of version 2"),
        ({"version": 3}, "not a weights file of version 2"),
        ({"version": 1, "length_bonus": 0}, "'lm_weight' must be a finite number, not None"),
        ({"version": 1, "lm_weight": True, "length_bonus": 0}, "'lm_weight' must be a finite number"),
        ({"version": 2, "lm_weight": 1, "length_bonus": "x"}, "'length_bonus' must be a finite number"),
        ({"version": 2, "lm_weight": 1e999, "length_bonus": 0}, "'lm_weight' must be a finite number"),
        ({"version": 2, "lm_weight": 1, "length_bonus": 0, "first_pass": "lm"}, "'first_pass' must be"),
        ({"version": 2, "lm_weight": 1, "length_bonus": 0, "first_lm_weight": None}, "'first_lm_weight' must be"),
        ({"version": 2, "lm_weight": 1, "length_bonus": 0, "interpolation_weight": 2}, r"must lie in \[0, 1\], not 2"),
        ({"version": 2, "lm_weight": 1, "length_bonus": 0, "average_am": 1}, "must be true or false, not 1"),
        ({"version": 2, "lm_weight": 1, "length_bonus": 0, "interpolation": "cubic"}, "must be log or linear"),
    ],
)
def test_bad_files(tmp_path, values, message):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(values))
    with pytest.raises(LowbitError, match=message) as error:
        Weights.load(path)
    assert str(path) in str(error.value)


def test_weights_are_finite():
    with pytest.raises(LowbitError, match="the weight acoustic_weight must be finite, not nan"):
        Weights(1.0, acoustic_weight=math.nan)
