"""`lowbit wer`: word error rates with bootstrap intervals, and the MAPSSWE test between two systems."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowbit.tools import cli


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "wer",
        "lowbit wer test.jsonl first.out.jsonl second.out.jsonl\nlowbit wer ref.txt hyp.txt\nlowbit wer test.jsonl",
        "Texts hold one utterance a line. Of an N-best list (.jsonl) the first hypothesis is scored, and utterances\n"
        "are matched by their id; a list with references alone is scored against itself, with its oracle.",
    )
    p.add_argument("ref", metavar="REF_OR_LIST", help="references: a text, or a list whose utterances have 'ref'")
    p.add_argument("hyp", nargs="*", metavar="HYP", help="one or two systems: texts or lists")
    p.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default 1000)")
    p.add_argument("--level", type=float, default=0.95, metavar="P", help="confidence level (default 0.95)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap")
    return p


@dataclass
class Side:
    """A file of references or hypotheses: ``ids`` None for a text; ``lists`` all hypotheses of an N-best list."""

    path: str
    texts: list[str]
    ids: list[str] | None = None
    lists: list[list[str]] | None = None


def read_side(path: str, references: bool) -> Side:
    from lowbit.errors import LowbitError
    from lowbit.files import read_lines
    from lowbit.nbest import read_nbest

    if not path.removesuffix(".gz").endswith((".jsonl", ".json")):
        lines = read_lines(path)
        if not lines:
            raise LowbitError(f"{path}: the file is empty")
        return Side(path, lines)
    ids, texts, lists = [], [], []
    for utterance in read_nbest(path):
        if references and utterance.ref is None:
            raise LowbitError(f"{path}: utterance {utterance.id!r} has no 'ref'")
        ids.append(utterance.id)
        lists.append([h.text for h in utterance.hyps])
        texts.append(utterance.ref if references else lists[-1][0])
    return Side(path, texts, ids, lists)


def matched(ref: Side, hyp: Side) -> list[str]:
    """The texts of ``hyp`` in the order of ``ref``: by id where both have them, else by line."""
    from lowbit.errors import LowbitError

    if ref.ids is None or hyp.ids is None:
        if len(ref.texts) != len(hyp.texts):
            raise LowbitError(f"{hyp.path}: {len(hyp.texts)} utterances, but {ref.path} has {len(ref.texts)}")
        return hyp.texts
    found = dict(zip(hyp.ids, hyp.texts))
    if missing := [i for i in ref.ids if i not in found]:
        raise LowbitError(f"{hyp.path}: no utterance {missing[0]!r}, which {ref.path} has ({len(missing)} missing)")
    if unknown := set(hyp.ids) - set(ref.ids):
        raise LowbitError(f"{hyp.path}: utterance {min(unknown)!r} is not in {ref.path} ({len(unknown)} unknown)")
    return [found[i] for i in ref.ids]


def body(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.errors import LowbitError
    from lowbit.significance import bootstrap
    from lowbit.wer import oracle_errors, score_corpus

    if len(args.hyp) > 2:
        raise LowbitError("at most two systems can be compared")
    if args.resamples < 1 or not 0 < args.level < 1:
        raise LowbitError("--resamples must be at least 1 and --level between 0 and 1")
    ref = read_side(args.ref, references=True)
    if not args.hyp and ref.lists is None:
        raise LowbitError(f"{args.ref}: a text of references needs hypotheses: lowbit wer REF HYP")
    names = args.hyp or [args.ref]
    texts = [matched(ref, read_side(path, references=False)) for path in names]
    scored = [score_corpus(ref.texts, t) for t in texts]
    options = {"resamples": args.resamples, "level": args.level, "seed": args.seed}
    systems = []
    for name, errors in zip(names, scored):
        interval = bootstrap(errors.errors, errors.ref_words, **options)
        systems.append({"system": name, "wer": 100 * errors.wer} | errors.totals() | _percent(interval))
    result: dict[str, Any] = {"references": args.ref, "systems": systems}
    if ref.lists is not None:
        best = sum(oracle_errors(r, hyps) for r, hyps in zip(ref.texts, ref.lists))
        result["oracle_wer"] = 100 * best / systems[0]["ref_words"]
    if len(scored) == 2:
        result |= compare(ref.texts, texts, scored, options)
    show(args, result)
    return result


def compare(refs: list[str], texts: list[list[str]], scored: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Paired bootstrap of the difference, first minus second, and MAPSSWE."""
    from lowbit.significance import bootstrap, mapsswe

    a, b = scored
    interval = bootstrap(a.errors, a.ref_words, b.errors, **options)
    difference = {"wer": 100 * (a.wer - b.wer)} | _percent(interval) | {"below_zero": interval.below_zero}
    return {"difference": difference, "mapsswe": asdict(mapsswe(refs, *texts))}


def _percent(interval: Any) -> dict[str, float]:
    return {"low": 100 * interval.low, "high": 100 * interval.high, "level": interval.level}


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    console = cli.console(args)
    level = f"{args.level:.0%} interval"
    table = Table("system", box=box.SIMPLE)
    for name in ("WER %", level, "errors", "sub", "del", "ins", "words", "utterances"):
        table.add_column(name, justify="right", no_wrap=True)
    for s in result["systems"]:
        counts = (s[k] for k in ("errors", "substitutions", "deletions", "insertions", "ref_words", "utterances"))
        table.add_row(s["system"], f"{s['wer']:.2f}", f"{s['low']:.2f} – {s['high']:.2f}", *(f"{c:,}" for c in counts))
    console.print(table)
    if "oracle_wer" in result:
        console.print(f"oracle of {result['references']}: {result['oracle_wer']:.2f} %")
    if "mapsswe" in result:
        d, m = result["difference"], result["mapsswe"]
        console.print(f"first minus second: {d['wer']:+.2f} % ({level} {d['low']:+.2f} – {d['high']:+.2f})")
        verdict = "differ significantly" if m["p"] < 0.05 else "do not differ significantly"
        console.print(f"MAPSSWE: {m['segments']} segments, z {m['z']:.3f}, p {m['p']:.4g}: they {verdict} (p < 0.05)")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
