"""Fixtures and builders that several test modules share."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from lowbit.backend import Backend
from lowbit.config import ModelConfig
from lowbit.container import PackedMatrix, PackedModel, read_packed, write_packed
from lowbit.container_checks import checksum, seal
from lowbit.errors import FormatError, LowbitError
from lowbit.forest import Forest, Query
from lowbit.quantize import quantize
from lowbit.vocab import Vocab

# The tests' tensors are tiny: more threads only wait for each other.
torch.set_num_threads(1)

LENGTH = struct.Struct("<Q")  # of the header, in front of a safetensors file
ROOT = Path(__file__).resolve().parents[1]

# A deadline in milliseconds would fail on a busy machine, not on a defect; the same examples in every run, so
# that a failure in CI is the failure that a developer sees.
settings.register_profile(
    "lowbit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("lowbit")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The corpora: LOWBIT_DATA, or ../shared/data beside the repository; skips where there are none."""
    path = Path(os.environ.get("LOWBIT_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no corpora: {path} does not exist; set LOWBIT_DATA")
    return path


@pytest.fixture(scope="session")
def kenlm() -> Iterator[ModuleType]:
    """kenlm, which takes a minute to compile and so may be absent: then its interface in plain Python."""
    module = importlib.import_module("kenlm" if importlib.util.find_spec("kenlm") else "backoff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kenlm", module)
        yield module


@pytest.fixture
def refuse(tmp_path) -> Callable[..., None]:
    """Asserts that ``read(path)`` of a file with this content is refused with one line of the file and ``message``."""

    def check(read: Callable[[Path], Iterable], name: str, content: str, message: str) -> None:
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(LowbitError) as error:
            list(read(path))
        assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)

    return check


@pytest.fixture(scope="session")
def refuses_bad_queries() -> Callable[..., None]:
    """Asserts that a backend refuses tokens and targets outside its vocabulary, and paths that are too long."""

    def check(backend: Backend, vocab_size: int, max_len: int) -> None:
        for tokens, targets, message in [
            ([0, vocab_size], [1], f"token {vocab_size} is outside the vocabulary of {vocab_size}"),
            ([0, 1], [vocab_size + 1], f"token {vocab_size + 1} is outside"),
            ([0] * (max_len + 1), [1], f"a path of {max_len + 1} tokens is longer than the model's context"),
        ]:
            forest = Forest(np.array(tokens), np.arange(-1, len(tokens) - 1))
            with pytest.raises(LowbitError, match=message):
                backend.log_probs(Query(forest, np.arange(len(targets)), np.array(targets)))

    return check


@pytest.fixture
def small_config() -> ModelConfig:
    """Every kind of tensor, ragged sizes: K = 36 is no multiple of 5, 8 or 64."""
    return ModelConfig(
        vocab_size=11, d_model=36, n_layers=2, n_heads=4, d_ffn=132, max_len=8, position="learned", tied=False
    )


def make_vocab(size: int) -> Vocab:
    return Vocab(["</s>", "<unk>", *(f"w{i}" for i in range(size - 3)), "naïve"])


def make_packed(config: ModelConfig, seed: int = 0) -> PackedModel:
    """A packed model that cycles through every table, free levels and groups included."""
    gen = torch.Generator().manual_seed(seed)
    kinds = [
        (1, None, None), (2, "ternary", None), (2, None, 64), (4, None, None), (8, None, 64),
        (2, (-9, -2, 3, 11), None), (4, "pow2", None), (1, None, 64),
    ]  # fmt: skip
    matrices = {}
    for i, (name, shape) in enumerate(config.matrix_shapes().items()):
        bits, table, group = kinds[i % len(kinds)]
        matrices[name] = PackedMatrix.from_quant_tensor(quantize(torch.randn(shape, generator=gen), bits, table, group))
    shapes = config.vector_shapes().items()
    vectors = {name: torch.randn(shape, generator=gen).half().float() for name, shape in shapes}
    fp32_nbytes = 4 * config.n_parameters() + 1000
    return PackedModel(config, make_vocab(config.vocab_size), matrices, vectors, fp32_nbytes, {"by": "test"})


@pytest.fixture
def packed_model(small_config: ModelConfig) -> PackedModel:
    return make_packed(small_config)


@pytest.fixture(scope="session")
def pack_random() -> Callable[[ModelConfig], PackedModel]:
    """Builds a packed model of any configuration with random weights."""
    return make_packed


class Forge:
    """A packed file taken apart, to be put together with a lie in it and every checksum right."""

    def __init__(self, data: bytes):
        (length,) = LENGTH.unpack(data[:8])
        header = json.loads(data[8 : 8 + length])
        self.metadata = json.loads(header.pop("__metadata__")["lowbit"])
        self.metadata.pop("checksum")
        self.tensors = {
            name: [t["dtype"], t["shape"], bytearray(data[8 + length :][slice(*t["data_offsets"])])]
            for name, t in header.items()
        }
        # A tensor that the attacks move needs another in front of it.
        self.tensors["embed.scale"] = self.tensors.pop("embed.scale")
        self.tensors["vocab"] = self.tensors.pop("vocab")

    def header(self) -> dict:
        """The header of the tensors as they are now; their checksums enter the metadata."""
        entries, end = {}, 0
        for name, (dtype, shape, data) in self.tensors.items():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            end += len(data)
            if isinstance(self.metadata.get("xxh3"), dict) and name in self.metadata["xxh3"]:
                self.metadata["xxh3"][name] = checksum(data)
        return {"__metadata__": {"lowbit": seal(self.metadata)}, **entries}

    def build(self, header: dict | bytes | None = None) -> bytes:
        raw = header if isinstance(header, bytes) else json.dumps(header or self.header()).encode()
        return LENGTH.pack(len(raw)) + raw + b"".join(bytes(data) for _, _, data in self.tensors.values())


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> bytes:
    """A small valid packed file."""
    config = ModelConfig(vocab_size=7, d_model=12, n_layers=1, n_heads=2, d_ffn=68, max_len=4, position="learned")
    path = tmp_path_factory.mktemp("good") / "m.lowbit"
    write_packed(path, make_packed(config))
    return path.read_bytes()


@pytest.fixture
def forge(good) -> Forge:
    return Forge(good)


@pytest.fixture(scope="session")
def packed_path(tmp_path_factory) -> Path:
    """Where attacks write their files."""
    return tmp_path_factory.mktemp("bad") / "m.lowbit"


@pytest.fixture(scope="session")
def reject(packed_path) -> Callable[..., str]:
    """Asserts that a file of these bytes is refused with one short line, which must match ``reason``."""

    def check(data: bytes, reason: str | None = None) -> str:
        packed_path.write_bytes(data)
        with pytest.raises(FormatError, match=reason) as error:
            read_packed(packed_path)
        message = str(error.value)
        assert message.startswith(f"{packed_path}: ") and "\n" not in message and len(message) < 1000
        return message

    return check
