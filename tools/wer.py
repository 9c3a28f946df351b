"""`lowbit wer`: word error rates with bootstrap intervals, and the MAPSSWE test between two systems."""

from __future__ import annotations

import argparse
import contextlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lowbit.tools import cli

HEADER = ("system", "id", "words", "sub", "del", "ins", "alignment", "ref", "hyp")


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "wer",
        "lowbit wer test.jsonl first.out.jsonl second.out.jsonl\n"
        "lowbit wer ref.trn hyp.trn --per-utterance errors.tsv\n"
        "lowbit wer ref.txt hyp.txt --lower --no-punctuation\nlowbit wer test.jsonl",
        "Files are texts of one utterance a line, Kaldi's or sclite's transcripts, or N-best lists, whose first\n"
        "hypothesis is scored; utterances are matched by name where both files have names, else by line. A list with\n"
        "references alone is scored against itself, with its oracle. Counts are those of NIST sclite.",
    )
    p.add_argument("ref", metavar="REF_OR_LIST", help="references: a text, or a list whose utterances have 'ref'")
    p.add_argument("hyp", nargs="*", metavar="HYP", help="one or two systems: texts or lists")
    p.add_argument("--ref-format", metavar="F", help="lines, text (name first), trn, jsonl, json, kaldi, espnet or tsv "
                   "(default: by the file's name, lines else)")  # fmt: skip
    p.add_argument("--hyp-format", metavar="F", help="the same, of the systems")
    p.add_argument("--alignment", choices=("sclite", "levenshtein"), default="sclite",
                   help="sclite's weights (4 a substitution, 3 else) or the fewest errors")  # fmt: skip
    p.add_argument("--lower", action="store_true", help="fold case")
    p.add_argument("--no-punctuation", action="store_true", help="drop it, but inside words like it's and twenty-one")
    p.add_argument("--split-hyphens", action="store_true", help="read hyphens as spaces")
    p.add_argument("--unicode", choices=("NFC", "NFKC"), help="normal form")
    p.add_argument("--map", metavar="FILE", help="words to replace: a word, then what it becomes (nothing: dropped)")
    p.add_argument("--per-utterance", metavar="OUT.tsv", help="counts and alignment of every utterance")
    p.add_argument("--no-oracle", action="store_true", help="do not search the list's best hypotheses")
    p.add_argument("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (default 1000)")
    p.add_argument("--level", type=float, default=0.95, metavar="P", help="confidence level (default 0.95)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap")
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.normalize import Normalizer, read_mapping

    check_arguments(args)
    mapping = read_mapping(args.map) if args.map else {}
    normalize = Normalizer(args.unicode, args.lower, args.no_punctuation, args.split_hyphens, mapping)
    counts = Counts(args, normalize)
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(per_utterance(args))
        for row, systems in cli.track(utterances(args), "wer", unit="utterance"):
            counts.add(row, systems, table)
    result = counts.result()
    if normalize.active:
        result["normalization"] = normalize.to_dict()
    show(args, result)
    return result


def check_arguments(args: argparse.Namespace) -> None:
    from lowbit.errors import LowbitError, check_seed
    from lowbit.files import check_writable

    if len(args.hyp) > 2:
        raise LowbitError("at most two systems can be compared")
    if args.resamples < 1 or not 0 < args.level < 1:
        raise LowbitError("--resamples must be at least 1 and --level between 0 and 1")
    check_seed(args.seed)
    if args.per_utterance:
        check_writable(args.per_utterance)
    if [args.ref, *args.hyp].count("-") > 1:
        raise LowbitError("only one file can be standard input")


def utterances(args: argparse.Namespace) -> Iterator[tuple[Any, list[str]]]:
    """Every reference with the systems' texts; a list alone is its own system."""
    from lowbit.errors import LowbitError
    from lowbit.transcripts import Matched, read_rows

    systems = [Matched(path, args.ref, args.hyp_format) for path in args.hyp]
    for row in read_rows(args.ref, True, args.ref_format):
        if not systems and row.hyps is None:
            raise LowbitError(f"{args.ref}: a text of references needs hypotheses: lowbit wer REF HYP")
        yield row, [s.get(row.id).text for s in systems] or [row.hyps[0]]
    for system in systems:
        system.end()


@contextlib.contextmanager
def per_utterance(args: argparse.Namespace) -> Iterator[Any]:
    """The table of --per-utterance, or None."""
    from lowbit.streams import text_output

    if not args.per_utterance:
        yield None
        return
    with text_output(args.per_utterance) as stream:
        stream.write("\t".join(HEADER) + "\n")
        yield stream


class Counts:
    """Errors of one or two systems, counted utterance by utterance; the texts are not kept."""

    def __init__(self, args: argparse.Namespace, normalize: Any):
        from lowbit.wer import ErrorCounter

        self.args, self.normalize = args, normalize
        self.names = args.hyp or [args.ref]
        self.counters = [ErrorCounter(args.alignment) for _ in self.names]
        self.differences = array("i")  # errors of the first minus the second system, segment by segment
        self.oracle: int | None = None

    def add(self, row: Any, systems: list[str], table: Any) -> None:
        from lowbit.significance import segment_errors
        from lowbit.wer import oracle_errors

        ref = self.normalize(row.text)
        texts = [self.normalize(t) for t in systems]
        for name, counter, text in zip(self.names, self.counters, texts):
            edits = counter.add(ref, text)
            if table is not None:
                self._write(table, name, row.id, ref, text, edits)
        if len(texts) == 2:
            self.differences.extend(x - y for x, y in segment_errors(ref, *texts, self.args.alignment))
        if row.hyps is not None and not self.args.no_oracle:
            best = oracle_errors(ref, [self.normalize(h) for h in dict.fromkeys(row.hyps)], self.args.alignment)
            self.oracle = (self.oracle or 0) + best

    def _write(self, table: Any, system: str, name: str | None, ref: str, hyp: str, edits: tuple[int, ...]) -> None:
        from lowbit.align import align

        alignment = align(ref.split(), hyp.split(), self.args.alignment)
        row = (system, name or "", len(ref.split()), *edits, alignment, ref, hyp)
        table.write("\t".join(str(cell).replace("\t", " ") for cell in row) + "\n")

    def result(self) -> dict[str, Any]:
        """WERs in percent, with intervals; of two systems their difference and MAPSSWE."""
        from lowbit.significance import bootstrap, mapsswe_of_segments

        options = {"resamples": self.args.resamples, "level": self.args.level, "seed": self.args.seed}
        scored = [counter.result() for counter in self.counters]
        systems = []
        for name, errors in zip(self.names, scored):
            interval = bootstrap(errors.errors, errors.ref_words, **options)
            systems.append({"system": name, "wer": 100 * errors.wer} | errors.totals() | _percent(interval))
        result = {"references": self.args.ref, "alignment": self.args.alignment, "systems": systems}
        if self.oracle is not None:
            result["oracle_wer"] = 100 * self.oracle / systems[0]["ref_words"]
        if len(scored) == 2:
            a, b = scored
            interval = bootstrap(a.errors, a.ref_words, b.errors, **options)
            difference = {"wer": 100 * (a.wer - b.wer)} | _percent(interval) | {"below_zero": interval.below_zero}
            result |= {"difference": difference, "mapsswe": asdict(mapsswe_of_segments(self.differences))}
        return result


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
        shown = f"{m['segments']} segments, z {m['z']:.3f}, p {m['p']:.4g} (sc_stats: {m['p_sctk']:.3f})"
        console.print(f"MAPSSWE: {shown}: they {verdict} (p < 0.05)")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
