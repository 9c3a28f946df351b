"""Kaldi lattices in text form, expanded into the N-best list of their best distinct word sequences.

A lattice is read arc by arc (``lattice-copy ark:- ark,t:-``), compact or not: a line with the utterance's name, then
``FROM TO WORD GRAPH,ACOUSTIC[,ALIGNMENT]`` (compact) or ``FROM TO INPUT WORD GRAPH,ACOUSTIC``, and ``STATE
[GRAPH,ACOUSTIC[,ALIGNMENT]]`` for final states; an empty line ends it. The first state is the start. 0 and <eps> are
no word.

Expansion is a best-first search over the prefix tree of the lattice's word sequences, which is the token forest that
the language model reads. A node of the tree is a set of lattice states with the best cost of reaching each by the
node's words (determinisation on the way), so that every word sequence comes out once, with its best alignment; the
exact cost of the best way to the end guides the search, so that no more nodes are opened than the listed sequences
have, but for ties.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.nbest_record import NBest
from lowbit.streams import numbered_lines

EPSILON = ("0", "<eps>")
Costs = tuple[float, float]  # graph and acoustic, negated log-probabilities
Reached = dict[int, tuple[float, float, float]]  # lattice state -> scaled total, graph and acoustic cost


@dataclass
class Lattice:
    """Arcs of every state, and the final states' costs; acyclic once :func:`topological` has passed.

    Attributes:
        arcs: state -> (next state, word or None, graph cost, acoustic cost).
    """

    start: int = 0
    arcs: dict[int, list[tuple[int, str | None, float, float]]] = field(default_factory=dict)
    finals: dict[int, Costs] = field(default_factory=dict)


def read_lattices(path: PathLike, paths: int = 100, acoustic_scale: float = 0.1) -> Iterator[tuple[str, NBest]]:
    """Place in the file, and the best distinct word sequences of every lattice of a text archive.

    Hypotheses have ``am`` and ``lm``, minus the acoustic and the graph cost, both unscaled.

    Args:
        paths: most hypotheses of a list; bounds its memory.
        acoustic_scale: of the acoustic cost, where the best sequences are found.

    Raises:
        LowbitError: names file, line and utterance: no lattice, a cycle, no path to a final state.
    """
    if paths < 1 or not (0 < acoustic_scale < math.inf):
        raise LowbitError(f"lattice: paths {paths} must be at least 1, acoustic scale {acoustic_scale} positive")
    for line, name, lattice in _blocks(path):
        where = f"{path}: line {line}"
        found = best_sequences(lattice, paths, acoustic_scale, f"{where}: utterance {name!r}")
        hyps = [{"text": " ".join(text), "am": -acoustic, "lm": -graph} for text, graph, acoustic in found]
        yield f"line {line}", NBest.from_dict({"id": name, "hyps": hyps}, where)


def _blocks(path: PathLike) -> Iterator[tuple[int, str, Lattice]]:
    """Line, utterance and lattice of every block of an archive."""
    lattice: Lattice | None = None
    name, first = "", 0
    for number, line in numbered_lines(path):
        parts = line.split()
        where = f"{path}: line {number}: utterance {name!r}"
        if lattice is None:
            if not parts:
                continue
            if len(parts) != 1:
                raise LowbitError(f"{path}: line {number}: expected the name of an utterance alone, found {line!r}")
            lattice, name, first = Lattice(-1), parts[0], number
        elif parts:
            _add_line(lattice, parts, where)
        else:
            yield first, name, lattice
            lattice = None
    if lattice is not None:
        yield first, name, lattice


def _add_line(lattice: Lattice, parts: list[str], where: str) -> None:
    """An arc (3 to 5 fields) or a final state (1 or 2); a weight may be left out where it is 0,0."""
    if len(parts) > 5:
        raise LowbitError(f"{where}: {len(parts)} fields are no arc and no final state")
    weighted = len(parts) in (2, 5) or (len(parts) == 4 and "," in parts[3])
    costs = _costs(parts.pop(), where) if weighted else (0.0, 0.0)
    state = _state(parts[0], where)
    if lattice.start < 0:
        lattice.start = state
    if len(parts) == 1:
        lattice.finals[state] = costs
        return
    # The last label is the word: an arc of a compact lattice has one, of another an input label before it.
    word = None if parts[-1] in EPSILON else parts[-1]
    lattice.arcs.setdefault(state, []).append((_state(parts[1], where), word, *costs))


def _state(text: str, where: str) -> int:
    if not text.isdecimal():
        raise LowbitError(f"{where}: {text!r} is not the number of a state")
    return int(text)


def _costs(text: str, where: str) -> Costs:
    try:
        graph, acoustic = map(float, text.split(",")[:2])
    except ValueError:
        raise LowbitError(f"{where}: {text!r} is not a weight, GRAPH,ACOUSTIC[,ALIGNMENT]") from None
    if not (math.isfinite(graph) and math.isfinite(acoustic)):
        raise LowbitError(f"{where}: the weight {text!r} is not finite")
    return graph, acoustic


def topological(lattice: Lattice, where: str) -> list[int]:
    """The states that the start reaches, each before those its arcs lead to.

    Raises:
        LowbitError: the lattice has a cycle.
    """
    order: list[int] = []
    done: dict[int, bool] = {}  # False while a state's successors are being visited
    stack: list[tuple[int, Iterator[tuple]]] = [(lattice.start, iter(lattice.arcs.get(lattice.start, ())))]
    done[lattice.start] = False
    while stack:
        state, arcs = stack[-1]
        arc = next(arcs, None)
        if arc is None:
            stack.pop()
            done[state] = True
            order.append(state)
        elif arc[0] not in done:
            done[arc[0]] = False
            stack.append((arc[0], iter(lattice.arcs.get(arc[0], ()))))
        elif not done[arc[0]]:
            raise LowbitError(f"{where}: the lattice has a cycle through state {arc[0]}")
    return order[::-1]


def best_sequences(
    lattice: Lattice, count: int, acoustic_scale: float, where: str = "lattice"
) -> list[tuple[tuple[str, ...], float, float]]:
    """Words, graph and acoustic cost of the ``count`` cheapest distinct word sequences, cheapest first.

    Raises:
        LowbitError: a cycle, or no path to a final state.
    """
    search = _Search(lattice, acoustic_scale, where)
    return list(itertools.islice(search.sequences(), count))


class _Search:
    def __init__(self, lattice: Lattice, scale: float, where: str):
        self.lattice, self.scale = lattice, scale
        order = topological(lattice, where)
        self.rank = {state: i for i, state in enumerate(order)}
        # Least cost from a state to the end; states from where there is no way are left out.
        self.ahead: dict[int, float] = {}
        for state in reversed(order):
            ends = [self._total(*lattice.finals[state])] if state in lattice.finals else []
            ends += [self._total(g, a) + self.ahead[to] for to, _, g, a in self._arcs(state) if to in self.ahead]
            if ends:
                self.ahead[state] = min(ends)
        if lattice.start not in self.ahead:
            raise LowbitError(f"{where}: no path leads to a final state")

    def _arcs(self, state: int) -> list[tuple[int, str | None, float, float]]:
        return self.lattice.arcs.get(state, [])

    def _total(self, graph: float, acoustic: float) -> float:
        return graph + self.scale * acoustic

    def _close(self, reached: Reached) -> Reached:
        """Follow arcs without a word, states in topological order, so that each is final when it is visited."""
        queue = [(self.rank[state], state) for state in reached]
        heapq.heapify(queue)
        seen = set()
        while queue:
            _, state = heapq.heappop(queue)
            if state in seen:
                continue
            seen.add(state)
            for to, word, graph, acoustic in self._arcs(state):
                if word is None and to in self.ahead and self._relax(reached, reached[state], to, graph, acoustic):
                    heapq.heappush(queue, (self.rank[to], to))
        return reached

    def _relax(self, reached: Reached, at: tuple[float, float, float], to: int, graph: float, acoustic: float) -> bool:
        """Note a way to ``to`` if it is the best so far."""
        total = at[0] + self._total(graph, acoustic)
        better = to not in reached or total < reached[to][0]
        if better:
            reached[to] = (total, at[1] + graph, at[2] + acoustic)
        return better

    def sequences(self) -> Iterator[tuple[tuple[str, ...], float, float]]:
        """Word sequences by rising cost."""
        number = itertools.count()  # of equally cheap nodes the earlier one first
        start = self._close({self.lattice.start: (0.0, 0.0, 0.0)})
        # Cost of the best completion, number, words, and the node's states or, at an end, its costs.
        queue: list[tuple[float, int, tuple[str, ...], Reached | None, Costs]] = []
        heapq.heappush(queue, (self.ahead[self.lattice.start], next(number), (), start, (0.0, 0.0)))
        while queue:
            _, _, words, reached, costs = heapq.heappop(queue)
            if reached is None:
                yield words, *costs
                continue
            for child in self._children(words, reached):
                heapq.heappush(queue, (child[0], next(number), *child[1:]))

    def _children(
        self, words: tuple[str, ...], reached: Reached
    ) -> Iterator[tuple[float, tuple[str, ...], Reached | None, Costs]]:
        """The end of the sequence, where a state is final, and its continuations by one word."""
        finals = self.lattice.finals
        ends = [
            (at[0] + self._total(*finals[s]), at[1] + finals[s][0], at[2] + finals[s][1])
            for s, at in reached.items()
            if s in finals
        ]
        if ends:
            total, graph, acoustic = min(ends)
            yield total, words, None, (graph, acoustic)
        by_word: dict[str, Reached] = {}
        for state, at in reached.items():
            for to, word, graph, acoustic in self._arcs(state):
                if word is not None and to in self.ahead:
                    self._relax(by_word.setdefault(word, {}), at, to, graph, acoustic)
        for word, states in by_word.items():
            closed = self._close(states)
            yield min(at[0] + self.ahead[s] for s, at in closed.items()), (*words, word), closed, (0.0, 0.0)
