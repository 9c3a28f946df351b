"""tools/timing.py: candidates in turns, rotation, quartiles."""

from __future__ import annotations

from lowbit.tools import timing


def test_candidates_take_turns_in_alternating_order():
    calls = []
    effort = timing.Effort(warm=0, sample=0, min_rounds=3, max_rounds=3, total=10)
    times = timing.compare({name: lambda name=name: calls.append(name) for name in "ab"}, effort)
    assert "".join(calls) == "aabb" + "aabb" + "bbaa" + "aabb"  # two calls to count with; a warm one before each sample
    assert [len(t) for t in times.values()] == [3, 3]


def test_rotation_returns_to_the_first():
    seen = []
    call = timing.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        call()
    assert seen == [1, 2, 0, 1, 2, 0, 1]
    assert timing.ratios([2.0, 4.0], [1.0, 1.0])[1] == 3.0
