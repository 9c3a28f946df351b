"""What every stage shares: the command `lowbit <stage>`, argument parsers, errors, progress, `--json`.

A stage is one module with three parts; `lowbit <stage>` and `python tools/<stage>.py` run the same code::

    def parser() -> argparse.ArgumentParser:
        p = cli.parser("pack", "lowbit pack admm.safetensors --out model.lowbit")
        ...
    def body(args) -> dict | None: ...           # the result, which --json prints; raises LowbitError
    def main(argv=None) -> int: return cli.run(parser(), body, argv)

Importing this module loads neither torch nor rich, so that `lowbit --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
Body = Callable[[argparse.Namespace], "dict[str, Any] | None"]

STAGES = {
    "train": "train a full-precision Transformer language model",
    "sensitivity": "measure how much each matrix suffers at 1, 2, 4 and 8 bits",
    "nas": "search a precision plan by differentiable architecture search",
    "allocate": "choose the best precision plan under a size budget, exactly",
    "admm": "train a model into its precision plan (ADMM, then the hard phase)",
    "pack": "write a checkpoint as a packed low-bit model",
    "show": "print what a packed model holds: matrices, bits, bytes, ratio",
    "evaluate": "measure the perplexity of a model on a text",
    "generate": "continue a text",
    "rescore": "rescore N-best lists of a speech recogniser",
    "wer": "word error rate with significance tests",
    "tune_cpu": "measure which CPU kernel is fastest from how many rows on, for later runs",
    "tune": "measure which GPU kernels and tiles are fastest on this machine",
    "reproduce": "run the experiments whose numbers the documentation reports",
    "reproduce_asr": "the word error rates that the documentation reports, models and all",
    "demo": "the whole pipeline in five minutes on the text of this Python's documentation",
}
OK, BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141


def available_stages() -> dict[str, str]:
    """Stages whose module is installed, with their descriptions; imports none of them."""
    return {s: text for s, text in STAGES.items() if importlib.util.find_spec(f"lowbit.tools.{s}")}


def entry(argv: Sequence[str] | None = None) -> int:
    """The console command `lowbit`: hands the arguments to the stage's `main`, which alone is imported."""
    argv = list(sys.argv[1:] if argv is None else argv)
    stages = available_stages()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: lowbit <stage> [arguments]\n\nLow-bit Transformer language models.\n\nstages:")
        print("\n".join(f"  {command_name(stage):13}  {text}" for stage, text in stages.items()))
        print("\nlowbit <stage> --help explains a stage; lowbit --version prints the version.")
        return OK if argv else BAD_INPUT
    if argv[0] == "--version":
        import lowbit

        print(f"lowbit {lowbit.__version__}")
        return OK
    stage = argv[0].replace("-", "_")
    if stage not in stages:
        names = ", ".join(map(command_name, stages))
        print(f"lowbit: unknown stage {argv[0]!r}; stages: {names}", file=sys.stderr)
        return BAD_INPUT
    return importlib.import_module(f"lowbit.tools.{stage}").main(argv[1:])


def command_name(stage: str) -> str:
    """What a stage is called on the command line: its module's name, with hyphens."""
    return stage.replace("_", "-")


def parser(stage: str, example: str, detail: str = "") -> argparse.ArgumentParser:
    """The argument parser of a stage, with `--json` and a help text that ends with ``example``."""
    text = STAGES[stage]
    p = argparse.ArgumentParser(
        prog=f"lowbit {command_name(stage)}",
        description=f"{text[0].upper()}{text[1:]}." + (f"\n\n{detail}" if detail else ""),
        epilog="example:\n  " + example.replace("\n", "\n  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(p)
    return p


def add_common(p: argparse.ArgumentParser) -> None:
    """Add the options that every stage has."""
    p.add_argument("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")


def run(p: argparse.ArgumentParser, body: Body, argv: Sequence[str] | None) -> int:
    """Parse ``argv`` and run ``body``: the exit code of the stage.

    Returns:
        0 success; 2 bad arguments or bad input (one line on stderr); 130 interrupted; 141 the reader of our
        output has gone. Anything else is a bug and shows its traceback.
    """
    try:
        args = p.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the reason
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    return guard(p.prog, lambda: _finish(args, body(args)))


def _finish(args: argparse.Namespace, result: dict[str, Any] | None) -> None:
    if args.json:
        print(json.dumps(finite(result or {}), indent=1, allow_nan=False))
    sys.stdout.flush()


def guard(prog: str, work: Callable[[], None]) -> int:
    """Run ``work`` and turn the ways it may fail into exit codes (see :func:`run`)."""
    try:
        work()
    except LowbitError as error:
        return _fail(prog, str(error))
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout at exit: let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if not error.filename:
            raise
        return _fail(prog, f"{error.filename}: {error.strerror}")
    return OK


def _fail(prog: str, message: str) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities, which JSON cannot hold, replaced by None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(args: argparse.Namespace) -> Console:
    """Where the human-readable result goes: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    stream = sys.stderr if args.json else sys.stdout
    # A file or pipe has no width: give tables room instead of folding them to 80 columns.
    return Console(file=stream, highlight=False, width=None if stream.isatty() else 120)


def format_bytes(n: float) -> str:
    """Bytes with a decimal unit: 1234567 -> '1.23 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """'7.3 s', '2:05' (minutes) or '1:02:05' (hours)."""
    if seconds < 59.95:  # what %.1f still prints as 59.9
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Progress:
    """Progress on stderr: a bar on a terminal, else a line every ten seconds; nothing for short work.

    Use as a context manager; ``total`` None where the amount is unknown::

        with cli.Progress("train", total=steps, unit="step") as bar:
            bar.advance(note=f"loss {loss:.3f}")
    """

    DELAY, PERIOD = 2.0, 10.0  # seconds

    def __init__(self, label: str, total: float | None = None, unit: str = "", done: float = 0):
        self.label, self.total, self.unit, self.done, self._first = label, total, unit, done, done
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, n: float = 1, note: str = "") -> None:
        """Count ``n`` more units of work; ``note`` is shown beside the bar."""
        self.done += n
        now = time.monotonic()
        if now - self._start < self.DELAY:
            return
        if sys.stderr.isatty():
            self._draw(note)
        elif now - self._last >= self.PERIOD:
            self._last = now
            print(self._line(now - self._start, note), file=sys.stderr, flush=True)

    def _draw(self, note: str) -> None:
        if not self._bar:
            from rich import progress
            from rich.console import Console

            columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(),
                       progress.TimeRemainingColumn(), "{task.fields[note]}")  # fmt: skip
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._first, note=note)
            self._bar.start()
        self._bar.update(self._task, completed=self.done, note=note)

    def _line(self, elapsed: float, note: str) -> str:
        of = f"/{self.total:g} ({self.done / self.total:.0%})" if self.total else ""
        left = ""
        if self.total and self.done > self._first:
            remaining = elapsed / (self.done - self._first) * (self.total - self.done)
            left = f", {format_seconds(remaining)} left"
        parts = f"{self.label}: {self.unit} {self.done:g}{of}, {format_seconds(elapsed)}{left}"
        return " ".join(parts.split()) + (f", {note}" if note else "")


def track(items: Iterable[T], label: str, total: float | None = None, unit: str = "") -> Iterator[T]:
    """Yield ``items`` under a :class:`Progress`."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.advance()


if __name__ == "__main__":
    sys.exit(entry())
