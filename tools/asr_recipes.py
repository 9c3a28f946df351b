"""Speech corpora whose results docs/RESULTS.md reports: what each asks for."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.files import atomic_path
from lowbit.streams import numbered_lines

IRSTLM = "/usr/lib/irstlm/bin"  # where Debian's package puts its programs
# Improved Kneser-Ney: lower perplexity than Witten-Bell on all three validation texts. Singletons stay: without them
# the trigrams of ATIS are worse.
SMOOTHING = ("-lm=ikn", "-ps=no")


@dataclass(frozen=True)
class AsrRecipe:
    """A corpus: DIR/dev.jsonl and DIR/test.jsonl, or DIR/dev.jsonl alone, and the text of its language models.

    Attributes:
        config: of the language model; ``CONFIG-shallow`` names a one-layer model as large in fp32 as this one packed.
        epochs, lr, dropout_scale: of the low-bit training, which starts from the full-precision model.
        average_am: the lists' am scores are averages over the tokens of a hypothesis.
        folds: cross-validate on dev.jsonl in so many parts, speakers kept together; 0 tunes on dev, applies to test.
    """

    config: str
    epochs: float
    lr: float
    dropout_scale: float = 0.7
    average_am: bool = False
    folds: int = 0

    @property
    def shallow(self) -> str:
        return f"{self.config}-shallow"


RECIPES = {
    # 3,000 sentences: what trains on for as long as the first training overfits; a tenth of it does not.
    "atis": AsrRecipe("atis", epochs=6, lr=2e-4, average_am=True),
    "swbd": AsrRecipe("swbd", epochs=6, lr=1e-3),
    "l2": AsrRecipe("l2", epochs=2.5, lr=1e-3, folds=10),
}


def find_irstlm() -> str:
    """IRSTLM's estimator; kenlm's Python package reads n-gram models and makes none.

    Raises:
        LowbitError: it is not installed.
    """
    found = shutil.which("tlm") or shutil.which("tlm", path=IRSTLM)
    if not found:
        raise LowbitError("training the n-gram needs IRSTLM (Debian package irstlm), or give one: --ngram MODEL.arpa")
    return found


def train_ngram(text: str | Path, out: str | Path, order: int = 3) -> dict[str, object]:
    """Estimate an n-gram model of a text, one sentence a line, and write it as ARPA."""
    program = find_irstlm()
    with tempfile.TemporaryDirectory() as folder, atomic_path(out) as temporary:
        marked = Path(folder) / "text"
        with open(marked, "w", encoding="utf-8") as stream:
            stream.writelines(f"<s> {line} </s>\n" for _, line in numbered_lines(text) if line.strip())
        command = [program, f"-tr={marked}", f"-n={order}", *SMOOTHING, f"-oarpa={temporary.resolve()}"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode or not temporary.is_file():
            raise LowbitError(f"{text}: IRSTLM failed: {' '.join(done.stderr.split())[-300:]}")
    return {"order": order, "smoothing": " ".join(SMOOTHING), "bytes": Path(out).stat().st_size}
