"""N-best lists as JSON: one list a line, or one object for all of them as ESPnet and mlm-scoring write it.

JSON lines: ``{"id", "ref"?, "hyps": [{"text", "am"?, "lm"?}]}``, best first (DESIGN section 8).
mlm-scoring: ``{ID: {"hyp_1": {"score", "text"}, ..., "ref"?}}``.
ESPnet (data.json of a decoding): ``{"utts": {ID: {"output": [{"rec_text", "score", "text"}]}}}``; its text is the
reference. Both are read utterance by utterance, however large the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lowbit.errors import LowbitError
from lowbit.files import PathLike
from lowbit.nbest_record import NBest
from lowbit.streams import numbered_lines, open_bytes, text_output

Place = tuple[str, NBest]  # where in the file ("line 3"), and what is there
_CHUNK = 1 << 16
_LARGEST = 1 << 26  # characters of one utterance: a file that is no such object is not read into memory whole
_SPACE = re.compile(r"\s*")
_ESPNET_END = "<eos>"


def _reject(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


_DECODER = json.JSONDecoder(parse_constant=_reject)


def read_jsonl(path: PathLike) -> Iterator[Place]:
    """One utterance a line; blank lines are skipped."""
    for number, line in numbered_lines(path):
        if line.strip():
            where = f"{path}: line {number}"
            yield f"line {number}", NBest.from_dict(_parse(line, where), where)


def _parse(line: str, where: str) -> Any:
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).removesuffix(": line 1 column 1 (char 0)")
        if reason.endswith("finite number"):
            raise LowbitError(f"{where}: {reason}") from None
        raise LowbitError(f"{where}: not JSON: {reason}") from None


def write_jsonl(path: PathLike, utterances: Iterable[NBest]) -> int:
    count = 0
    with text_output(path) as stream:
        for utterance in utterances:
            stream.write(dump_list(utterance, path) + "\n")
            count += 1
    return count


def dump_list(utterance: NBest, path: PathLike) -> str:
    """The line that :func:`write_jsonl` writes; ``path`` is for the error."""
    return _dump(utterance.to_dict(), path, utterance.id)


def _dump(value: Any, path: PathLike, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise LowbitError(f"{path}: utterance {name!r}: {error}") from None


class _Scanner:
    """Reads a JSON text piece by piece; ``text[at:]`` is what has been read and not used."""

    def __init__(self, path: PathLike, stream: Any):
        self.path, self.stream, self.decoder = path, stream, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.ended = "", 0, False
        self._line, self._counted = 1, 0  # the line of text[_counted]

    def line(self) -> str:
        """Where ``text[at]`` stands, as errors name it."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return f"line {self._line}"

    def _more(self) -> None:
        self.line()
        self._counted = 0
        block = self.stream.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not block
        try:
            self.text, self.at = self.text[self.at :] + self.decoder.decode(block, self.ended), 0
        except UnicodeDecodeError:
            raise LowbitError(f"{self.path}: not UTF-8 text") from None

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def take(self, wanted: str) -> None:
        """Pass over one character of ``wanted``."""
        found = self.peek()
        if not found or found not in wanted:
            expected = " or ".join(wanted)
            raise LowbitError(f"{self.path}: {self.line()}: not JSON: expected {expected}, found {found or 'the end'}")
        self.at += 1

    def value(self) -> Any:
        """A whole string or object."""
        self.peek()
        while True:
            try:
                value, self.at = _DECODER.raw_decode(self.text, self.at)
                return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or self.ended or len(self.text) - self.at > _LARGEST:
                    # Python's own line and column count from the piece that is in memory.
                    reason = getattr(error, "msg", error)
                    raise LowbitError(f"{self.path}: value from {self.line()} on: not JSON: {reason}") from None
                self._more()

    def items(self, inside: str = "") -> Iterator[tuple[str, str, Any]]:
        """Place, key and value of an object's members, one at a time; of "utts", the members of its value."""
        self.take("{")
        first = True
        while self.peek() != "}":
            if not first:
                self.take(",")
            if self.peek() != '"':
                self.take('"')
            first, place, key = False, self.line(), self.value()
            self.take(":")
            if key == "utts" and not inside:
                yield from self.items(key)
            else:
                yield place, key, self.value()
        self.take("}")


def read_json(path: PathLike) -> Iterator[Place]:
    """One object for all utterances, of mlm-scoring or of ESPnet."""
    with open_bytes(path) as stream:
        scanner = _Scanner(path, stream)
        for place, name, entry in scanner.items():
            where = f"{path}: {place}"
            record = _espnet(entry) if isinstance(entry, dict) and "output" in entry else _mlm_scoring(entry)
            if record is None:
                raise LowbitError(f"{where}: utterance {name!r}: expected 'hyp_1', 'hyp_2' ... or ESPnet's 'output'")
            yield place, NBest.from_dict({"id": name} | record, where)
        if scanner.peek():
            raise LowbitError(
                f"{path}: {scanner.line()}: not JSON: more text after the object; name it .jsonl if it holds JSON lines"
            )


def _mlm_scoring(entry: Any) -> dict[str, Any] | None:
    if not isinstance(entry, dict):
        return None
    names = sorted((int(k[4:]), k) for k in entry if k.startswith("hyp_") and k[4:].isdecimal())
    hyps = [_with_am(entry[k]) for _, k in names]
    rest = {k: v for k, v in entry.items() if k not in {k for _, k in names}}
    return rest | {"hyps": hyps} if hyps else None


def _with_am(hyp: Any) -> Any:
    """mlm-scoring's score is the recogniser's, unless "am" stands beside it, as in what :func:`write_json` writes."""
    if not isinstance(hyp, dict) or "score" not in hyp or "am" in hyp:
        return hyp
    return {"am" if k == "score" else k: v for k, v in hyp.items()}


def _espnet(entry: dict[str, Any]) -> dict[str, Any] | None:
    outputs = entry["output"]
    if not isinstance(outputs, list) or not all(isinstance(o, dict) and "rec_text" in o for o in outputs):
        return None
    hyps = [
        {"text": " ".join(str(o["rec_text"]).replace(_ESPNET_END, " ").split())}
        | ({"am": o["score"]} if "score" in o else {})
        for o in outputs
    ]
    ref = outputs[0].get("text") if outputs else None
    return {"hyps": hyps} | ({} if ref is None else {"ref": ref})


def write_json(path: PathLike, utterances: Iterable[NBest]) -> int:
    """One object in mlm-scoring's form; a rescored hypothesis' "score" is its new one, with "am" beside it."""
    count = 0
    with text_output(path) as stream:
        stream.write("{")
        for utterance in utterances:
            hyps = {f"hyp_{i}": _hyp_entry(h.to_dict()) for i, h in enumerate(utterance.hyps, 1)}
            ref = {} if utterance.ref is None else {"ref": utterance.ref}
            entry = _dump(utterance.extra | hyps | ref, path, utterance.id)
            stream.write((",\n" if count else "\n") + f"{json.dumps(utterance.id, ensure_ascii=False)}: {entry}")
            count += 1
        stream.write("\n}\n")
    return count


def _hyp_entry(hyp: dict[str, Any]) -> dict[str, Any]:
    if "score" not in hyp and "am" in hyp:
        return {"score" if k == "am" else k: v for k, v in hyp.items()}
    return hyp
