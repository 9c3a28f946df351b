"""Paired timings: candidates take turns, in alternating order, so that a drift of the machine's speed cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: seconds before a sample and in one, rounds at least and at most, seconds for all rounds.

    ``warm`` is time, not a number of calls: after a pause, and after other work, a core needs milliseconds to come back
    to its pace (a product of 1.3 ms took 2.1, 1.6, 1.3 and 1.25 ms the first four times).
    """

    warm: float
    sample: float
    min_rounds: int
    max_rounds: int
    total: float


FULL = Effort(warm=0.006, sample=0.006, min_rounds=7, max_rounds=31, total=0.8)
QUICK = Effort(warm=0.002, sample=0.002, min_rounds=3, max_rounds=5, total=0.15)
SETTLED = 0.02  # stop once the quartiles of the first candidate lie this close to its median
REST = 0.004  # seconds before a sample: workers of the last candidate's pool stop spinning


def rotate(calls: Sequence[Call]) -> Call:
    """A call that goes through ``calls`` in turn: the same work on other memory every time."""
    if len(calls) == 1:
        return calls[0]
    index = 0

    def next_call() -> object:
        nonlocal index
        index = index + 1 if index + 1 < len(calls) else 0
        return calls[index]()

    return next_call


def repeats(call: Call, sample: float) -> int:
    """How often to call so that a sample lasts about ``sample`` seconds."""
    time.sleep(REST)
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    return max(1, min(100_000, round(sample / max(once, 1e-7))))


def seconds_a_call(call: Call, count: int, warm: float) -> float:
    time.sleep(REST)
    begin = time.perf_counter()
    call()  # wakes the workers and brings back what the others drove out of the caches
    while time.perf_counter() - begin < warm:
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def compare(calls: dict[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Seconds a call of every candidate in every round; equal indices belong to one round."""
    counts = {name: repeats(call, effort.sample) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    first = next(iter(calls))
    start = time.perf_counter()
    for number in range(effort.max_rounds):
        for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
            times[name].append(seconds_a_call(calls[name], counts[name], effort.warm))
        late = time.perf_counter() - start > effort.total
        if number + 1 >= effort.min_rounds and (late or settled(times[first])):
            break
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def settled(values: Sequence[float]) -> bool:
    low, middle, high = quartiles(values)
    return high - low <= 2 * SETTLED * middle


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of their time over ours, round by round: above 1 we are faster."""
    return quartiles([a / b for a, b in zip(theirs, ours, strict=True)])
