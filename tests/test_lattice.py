from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import LowbitError
from lowbit.lattice import Lattice, best_sequences, read_lattices

COMPACT = """u1 
0 1 a 1.5,10.0,3_4
0 1 b 0.5,30,
1 2 c 0.25,5.0,7
1 3 <eps> 0,0,
2 0.125,1.0,9
3

u2
0 1 0 x 1.0,2.0
1 0,0
"""


def everything(lattice: Lattice, scale: float) -> list[tuple[tuple[str, ...], float, float]]:
    """Every path, one by one; of each word sequence the cheapest."""
    best: dict[tuple[str, ...], tuple[float, float, float]] = {}

    def walk(state: int, words: tuple[str, ...], graph: float, acoustic: float) -> None:
        if state in lattice.finals:
            g, a = graph + lattice.finals[state][0], acoustic + lattice.finals[state][1]
            best[words] = min(best.get(words, (math.inf, 0, 0)), (g + scale * a, g, a))
        for to, word, g, a in lattice.arcs.get(state, ()):
            walk(to, words if word is None else (*words, word), graph + g, acoustic + a)

    walk(lattice.start, (), 0.0, 0.0)
    return sorted(((w, g, a) for w, (_, g, a) in best.items()), key=lambda row: row[1] + scale * row[2])


@st.composite
def lattices(draw) -> Lattice:
    """Up to 7 states; several arcs with the same word, arcs without a word, dead ends."""
    size = draw(st.integers(2, 7))
    # Eighths: sums are exact, whatever their order.
    cost = st.integers(0, 40).map(lambda n: n / 8)
    lattice = Lattice()
    for state, to in itertools.combinations(range(size), 2):
        for word in draw(st.lists(st.sampled_from(["a", "b", None]), max_size=2)):
            lattice.arcs.setdefault(state, []).append((to, word, draw(cost), draw(cost)))
    for state in draw(st.sets(st.integers(0, size - 1), max_size=3)) | {size - 1}:
        lattice.finals[state] = (draw(cost), draw(cost))
    return lattice


@given(lattices(), st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 30))
def test_sequences_are_the_best_of_all(lattice, scale, count):
    expected = everything(lattice, scale)
    if not expected:
        with pytest.raises(LowbitError, match="no path leads to a final state"):
            best_sequences(lattice, count, scale)
        return
    found = best_sequences(lattice, count, scale)
    cost = [g + scale * a for _, g, a in found]
    assert cost == [g + scale * a for _, g, a in expected[:count]]
    # Ties may come in any order, and of equally cheap alignments any may be taken.
    allowed = {words: g + scale * a for words, g, a in expected}
    assert all(allowed[words] == c for (words, _, _), c in zip(found, cost))
    assert len({words for words, _, _ in found}) == len(found)


def test_both_forms_of_the_text(tmp_path):
    path = tmp_path / "lat.txt"
    path.write_text(COMPACT)
    (place1, first), (place2, second) = read_lattices(path, acoustic_scale=1.0)
    assert (place1, place2) == ("line 1", "line 9")
    assert [(h.text, h.lm, h.am) for h in first.hyps] == [
        ("a", -1.5, -10.0), ("a c", -1.875, -16.0), ("b", -0.5, -30.0), ("b c", -0.875, -36.0),
    ]  # fmt: skip
    assert [(h.text, h.lm, h.am) for h in second.hyps] == [("x", -1.0, -2.0)]
    (_, cheap), _ = read_lattices(path, paths=2, acoustic_scale=0.01)
    # The scale decides which come first: 0.5 + 0.3 against 1.5 + 0.1.
    assert [h.text for h in cheap.hyps] == ["b", "b c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("u1 x\n", "line 1: expected the name of an utterance alone"),
        ("u\n0 1 2 a 1\n1\n", "line 2: utterance 'u': '1' is not a weight"),
        ("u\n0 1 a 1,x\n1\n", "'1,x' is not a weight"),
        ("u\n0 1 a 1,nan\n1\n", "the weight '1,nan' is not finite"),
        ("u\n0 b a 1,2\n1\n", "'b' is not the number of a state"),
        ("u\n0 1 2 3 4,5 6\n", "6 fields are no arc"),
        ("u\n0 1 a 1,2\n", "line 1: utterance 'u': no path leads to a final state"),
        ("u\n0 1 a 1,2\n1 0 b 1,2\n1\n", "the lattice has a cycle through state 0"),
        ("u\n\n", "no path leads to a final state"),
    ],
)
def test_bad_lattices(refuse, text, message):
    refuse(read_lattices, "lat.txt", text, message)


@pytest.mark.parametrize("arc", ["0 1 x", "0 1 7 x", "0 1 x 0,0,", "0 1 7 x 0,0"])
def test_weights_of_zero_may_be_left_out(tmp_path, arc):
    (tmp_path / "lat.txt").write_text(f"u\n{arc}\n1\n")
    ((_, utterance),) = read_lattices(tmp_path / "lat.txt")
    assert utterance.hyps[0].text == "x" and utterance.hyps[0].am == 0


def test_a_lattice_of_many_paths_stays_small():
    """2 ** 60 word sequences; the search opens prefixes of the 50 best only."""
    lattice = Lattice(finals={60: (0.0, 0.0)})
    for state in range(60):
        lattice.arcs[state] = [(state + 1, "a", 0.0, 0.0), (state + 1, "b", 1.0 + state / 64, 0.0)]
    found = best_sequences(lattice, 50, 1.0)
    assert found[0][0] == ("a",) * 60 and len(found) == 50
    assert [f[1] for f in found] == sorted(f[1] for f in found)


@pytest.mark.parametrize("seed", range(5))
def test_kaldis_lattice_to_nbest_finds_the_same(tmp_path, seed):
    """A lattice that Kaldi's classes print, and the paths that Kaldi's program finds in it; of equal words the best."""
    kaldifst = pytest.importorskip("kaldifst", reason="kaldifst is not installed (pip install kaldifst)")
    rng = random.Random(seed)
    lattice, states, scale = kaldifst.Lattice(), 8, 0.25
    for _ in range(states):
        lattice.add_state()
    lattice.start = 0
    for state in range(states - 1):
        for _ in range(3):
            to, word = rng.randint(state + 1, min(state + 3, states - 1)), rng.randint(0, 3)
            weight = kaldifst.LatticeWeight(rng.randint(0, 64) / 8, rng.randint(0, 64) / 8)
            lattice.add_arc(state, kaldifst.LatticeArc(rng.randint(1, 9), word, weight, to))
    lattice.set_final(states - 1, kaldifst.LatticeWeight(0.5, 0.25))
    best: dict[str, float] = {}
    # Every path there is: at most 3 arcs from each of 7 states. Their acoustic costs come scaled.
    for path in kaldifst.lattice_to_nbest(lattice, acoustic_scale=scale, n=3**7):
        _, _, words, weight = kaldifst.get_linear_symbol_sequence(path)
        text, total = " ".join(map(str, words)), weight.value1 + weight.value2
        best[text] = min(total, best.get(text, total))
    (tmp_path / "lat.txt").write_text(f"u\n{lattice.to_str()}\n")
    ((_, found),) = read_lattices(tmp_path / "lat.txt", paths=20, acoustic_scale=scale)
    totals = [-h.lm - scale * h.am for h in found.hyps]
    assert totals == sorted(best.values())[:20]
    assert all(best[h.text] == total for h, total in zip(found.hyps, totals))
