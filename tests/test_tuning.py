"""lowbit/tuning.py and `lowbit tune-cpu`: the file of crossovers, who may write it, and what a damaged one says."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest

from lowbit import _C, tuning
from lowbit.errors import LowbitError
from lowbit.files import locked
from lowbit.ops import available_isas
from lowbit.tools import tune_cpu as tune


class Native:
    """An extension that only remembers."""

    def __init__(self):
        self.rows = {}

    def available_isas(self):
        return ["scalar", "avx2"]

    def set_crossover(self, isa, bits, rows):
        self.rows[isa, bits] = rows


@pytest.fixture
def native(monkeypatch, tmp_path) -> Native:
    monkeypatch.setattr(tuning, "_applied", False)
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Native()


@pytest.fixture
def keep_crossovers():
    before = {(isa, bits): _C.crossover(isa, bits) for isa in available_isas() for bits in tuning.BITS}
    yield before
    for (isa, bits), rows in before.items():
        _C.set_crossover(isa, bits, rows)


def test_written_and_read_back(tmp_path):
    path = tmp_path / "new" / "x.json"
    tuning.write(path, {"amx": {1: 5, 8: 17}}, threads=2)
    assert tuning.read(path) == {"amx": {1: 5, 8: 17}}


def test_the_cache_file_is_read_once_and_only_for_what_this_machine_has(native):
    path = tuning.default_path()
    assert "cache" in path.parts
    tuning.write(path, {"avx2": {4: 9}, "amx": {4: 3}}, threads=1)
    tuning.apply_once(native)
    assert native.rows == {("avx2", 4): 9}
    tuning.write(path, {"avx2": {4: 99}}, threads=1)
    tuning.apply_once(native)
    assert native.rows == {("avx2", 4): 9}


def test_without_a_file_the_defaults_stay(native):
    tuning.apply_once(native)
    assert native.rows == {}


def test_the_variable_names_a_file_or_switches_off(native, monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    tuning.write(path, {"scalar": {2: 7}}, threads=1)
    tuning.write(tuning.default_path(), {"scalar": {2: 70}}, threads=1)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.apply_once(native)
    assert native.rows == {("scalar", 2): 7}
    monkeypatch.setattr(tuning, "_applied", False)
    monkeypatch.setenv(tuning.VARIABLE, "off")
    other = Native()
    tuning.apply_once(other)
    assert other.rows == {}


def test_a_named_file_that_is_missing_is_an_error_every_time(native, monkeypatch, tmp_path):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "no.json"))
    for _ in range(2):
        with pytest.raises(LowbitError, match=r"no\.json: cannot read: .*LOWBIT_TUNING=off ignores it"):
            tuning.apply_once(native)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"version": 2, "crossovers": {}}', '{"version": 1}', '{"version": 1, "crossovers": []}',
        '{"version": 1, "crossovers": {"mmx": {}}}', '{"version": 1, "crossovers": {"amx": {"3": 4}}}',
        '{"version": 1, "crossovers": {"amx": {"4": 0}}}', '{"version": 1, "crossovers": {"amx": {"4": 1.5}}}',
        '{"version": 1, "crossovers": {"amx": {"4": true}}}', '{"version": 1, "crossovers": {"amx": [8]}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(native, text):
    path = tuning.default_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(LowbitError) as error:
        tuning.apply_once(native)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert native.rows == {}


def hold(path, started):
    with locked(path):
        started.set()
        time.sleep(0.3)
        with open(f"{path}.log", "a") as log:
            log.write("first ")


def test_one_process_measures_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, path = context.Event(), tmp_path / "x.json"
    other = context.Process(target=hold, args=(path, started))
    other.start()
    assert started.wait(60)
    with locked(path), open(f"{path}.log", "a") as log:
        log.write("second")
    other.join()
    assert (tmp_path / "x.json.log").read_text() == "first second"


def test_crossover_of_least_time():
    rows = [1, 2, 4, 8]
    assert tune.best_crossover(rows, [1, 2, 4, 8], [3, 3, 3, 3]) == 4
    assert tune.best_crossover(rows, [1, 1, 1, 1], [2, 2, 2, 2]) == tuning.MAX_ROWS
    assert tune.best_crossover(rows, [2, 2, 2, 2], [1, 1, 1, 1]) == 1
    # One slow outlier at 2 rows does not move the crossover down to it.
    assert tune.best_crossover(rows, [1, 2.1, 2, 8], [3, 2.0, 3, 3]) == 8


def test_measures_keeps_and_does_not_measure_twice(monkeypatch, tmp_path, capsys, keep_crossovers):
    monkeypatch.setattr(tune, "ROWS", (1, 4))
    monkeypatch.setattr(tune, "SHAPES", ((64, 64),))
    monkeypatch.setattr(tune, "EFFORT", tune.Effort(warm=0, sample=1e-5, min_rounds=1, max_rounds=1, total=0))
    isa, path = available_isas()[-1], tmp_path / "x.json"
    assert tune.main(["--isa", isa, "--out", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["crossovers"].keys() == {isa} and len(result["measured"]) == 4 * 2
    assert set(tuning.read(path)[isa]) == {1, 2, 4, 8}
    assert {key: _C.crossover(*key) for key in keep_crossovers} == keep_crossovers  # this process goes on as before
    assert tune.main(["--isa", isa, "--out", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"] == []


def test_an_instruction_set_that_is_not_here(capsys, tmp_path):
    assert tune.main(["--isa", "mmx", "--out", str(tmp_path / "x.json")]) == 2
    assert "this machine lacks mmx" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
