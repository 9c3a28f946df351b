"""Alignment of a hypothesis with its reference, as NIST sclite makes it.

sclite minimises 4 · substitutions + 3 · deletions + 3 · insertions, and of equally cheap alignments takes the one whose
last difference is a substitution, else an insertion, else a deletion (sctk, ``net_dp.c``). Its counts can therefore
differ from those of a unit-cost (Levenshtein) alignment: on long, bad hypotheses even the number of errors can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rapidfuzz.distance import Levenshtein

from lowbit.errors import LowbitError

ALIGNMENTS = ("sclite", "levenshtein")
CORRECT, SUBSTITUTION, DELETION, INSERTION = "CSDI"
_GAP, _SUBSTITUTION = 3, 4
_WEIGHTS = (_GAP, _GAP, _SUBSTITUTION)  # rapidfuzz: insertion, deletion, substitution
# 3 substitutions cost as much as 4 gaps: from this cost beyond the unavoidable gaps on, a cost may have several
# decompositions (12 = 3·4 = 4·3), and only the alignment itself tells which; 14 has one.
_AMBIGUOUS = 12


def check_alignment(name: str) -> None:
    if name not in ALIGNMENTS:
        raise LowbitError(f"alignment must be one of {', '.join(ALIGNMENTS)}, not {name!r}")


def letters(sentences: Iterable[Sequence[str]]) -> list[str]:
    """Every word as one character, equal words the same: rapidfuzz is fastest on strings."""
    ids: dict[str, int] = {}
    return ["".join([chr(ids.setdefault(w, len(ids))) for w in s]) for s in sentences]


def align(ref: Sequence[str], hyp: Sequence[str], alignment: str = "sclite") -> str:
    """The alignment as one letter an edit, left to right: C correct, S substitution, D deletion, I insertion.

    Args:
        ref, hyp: words (or the letters of :func:`letters`).
    """
    if alignment == "sclite":
        return _sclite(ref, hyp)
    check_alignment(alignment)
    out, at = [], 0
    for op, i, _ in Levenshtein.editops(*letters((ref, hyp))).as_list():
        out.append(CORRECT * (i - at))
        out.append({"replace": SUBSTITUTION, "delete": DELETION, "insert": INSERTION}[op])
        at = i + (op != "insert")
    return "".join(out) + CORRECT * (len(ref) - at)


def _sclite(ref: Sequence[str], hyp: Sequence[str]) -> str:
    n, m, tail = len(ref), len(hyp), 0
    # Equal last words are always aligned with each other: a match is free, and preferred where costs are equal.
    while n and m and ref[n - 1] == hyp[m - 1]:
        n, m, tail = n - 1, m - 1, tail + 1
    cost = [_GAP * j for j in range(m + 1)]
    back = [bytearray(m + 1)]  # 0 diagonal, 1 deletion, 2 insertion
    for i in range(n):
        word, diagonal, left = ref[i], cost[0], _GAP * (i + 1)
        cost[0], row = left, bytearray(m + 1)
        for j in range(1, m + 1):
            above = cost[j]
            if word != hyp[j - 1]:
                diagonal += _SUBSTITUTION
            deletion, insertion = above + _GAP, left + _GAP
            if diagonal <= deletion and diagonal <= insertion:
                left = diagonal
            elif deletion < insertion:
                left, row[j] = deletion, 1
            else:
                left, row[j] = insertion, 2
            diagonal, cost[j] = above, left
        back.append(row)
    out = []
    while n and m:
        step = back[n][m]
        out.append(DELETION if step == 1 else INSERTION if step else "CS"[ref[n - 1] != hyp[m - 1]])
        n, m = n - (step != 2), m - (step != 1)
    out.append(DELETION * n + INSERTION * m)
    return "".join(out)[::-1] + CORRECT * tail


def count_edits(ref: str, hyp: str, alignment: str = "sclite") -> tuple[int, int, int]:
    """Substitutions, deletions and insertions of :func:`align`, without the alignment where the cost alone tells them.

    Args:
        ref, hyp: letters (:func:`letters`).
    """
    if alignment == "sclite":
        longer = len(ref) - len(hyp)
        rest = Levenshtein.distance(ref, hyp, weights=_WEIGHTS) - _GAP * abs(longer)
        if rest < _AMBIGUOUS or rest == _AMBIGUOUS + 2:
            # rest = 4 · substitutions + 6 · pairs of a deletion and an insertion
            pairs = rest % _SUBSTITUTION // 2
            substitutions = (rest - 2 * _GAP * pairs) // _SUBSTITUTION
            return substitutions, pairs + max(longer, 0), pairs + max(-longer, 0)
    edits = align(ref, hyp, alignment)
    return edits.count(SUBSTITUTION), edits.count(DELETION), edits.count(INSERTION)
