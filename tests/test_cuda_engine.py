"""The GPU engine on a CPU: its modules and decoding step in Triton's interpreter and on the CUDA kernels' emulator,
against the packed CPU model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cuda_host import emulate
from test_triton_linear import interpreter_switch  # noqa: F401  the kernels read TRITON_INTERPRET while they run

from lowbit import ModelConfig, quantize
from lowbit.backend import TorchBackend
from lowbit.container import write_packed
from lowbit.cuda import CudaBackend, DecodeStep, fuse
from lowbit.engine import LanguageModel
from lowbit.forest import tries
from lowbit.gpu_layers import GpuLinear
from lowbit.kernels import GpuWeight
from lowbit.loading import _load_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CONFIGS = [
    ModelConfig(vocab_size=70, d_model=36, n_layers=2, n_heads=2, d_ffn=72, max_len=10, tied=True),
    ModelConfig(vocab_size=70, d_model=40, n_layers=2, n_heads=2, d_ffn=64, max_len=10, norm="post", activation="relu",
                position="sinusoidal", tied=False),
    ModelConfig(vocab_size=33, d_model=32, n_layers=1, n_heads=1, d_ffn=64, max_len=10, position="learned", tied=True),
]  # fmt: skip


def name_of(case: tuple[ModelConfig, str]) -> str:
    return f"{case[0].position}-{case[1]}"


@pytest.fixture(params=itertools.product(CONFIGS, ("triton", "cuda")), ids=name_of)
def models(request, tmp_path, pack_random, monkeypatch):
    """The same file on the reference and on the GPU modules, whose products are Triton's or the CUDA kernels'."""
    config, route = request.param
    if DEVICE == "cpu" and route == "cuda":
        emulate(monkeypatch)
        monkeypatch.setattr("lowbit.cuda.serves", lambda *_: "cuda")
    path = tmp_path / "m.lowbit"
    write_packed(path, pack_random(config))
    reference = _load_packed(path, "cpu", "exact")
    loaded = _load_packed(path, DEVICE, "int8", gpu=True)
    return TorchBackend(reference.model, "cpu"), CudaBackend(loaded.model, DEVICE), loaded


def check(found: np.ndarray, wanted: np.ndarray) -> None:
    """fp16 activations are off by 2^-11 of their size at each of about 10 roundings: 0.5 % of the largest logit."""
    assert np.abs(found - wanted).max() <= 0.005 * np.abs(wanted).max()


def test_forests(models):
    reference, backend, loaded = models
    gen = np.random.default_rng(0)
    size = reference.model.config.vocab_size
    lists = [[gen.integers(2, size, length).tolist() for length in (3, 9, 1)] for _ in range(2)]
    lists[0].append(lists[0][1][:5])  # shares a prefix
    query, _ = tries(lists, 10, 5)
    check(backend.log_probs(query), reference.log_probs(query))
    assert loaded.description["compute"] == "fp16" and "M=1" in loaded.description["kernel"]


def test_decoding(models):
    """Steps along a path, a branch off it, and back: the cache must follow."""
    reference, backend, _ = models
    paths: dict = {None: (None, None)}
    for name, past in [("a", None), ("b", "a"), ("c", "b"), ("d", "b"), ("x", None), ("e", "c")]:
        both = [
            b.extend(before, [ord(name) % 31 + 2], True) for b, before in zip((reference, backend), paths[past])
        ]  # fmt: skip
        paths[name] = tuple(block for block, _ in both)
        check(both[1][1], both[0][1])
        np.testing.assert_array_equal(backend.next_log_probs(paths[name][1]), both[1][1])
    # A prefix read at once, one step, then two tokens at once over the step's block.
    at = (None, None)
    for tokens in ([3, 4, 5], [6], [7, 8], [9]):
        both = [b.extend(before, tokens, True) for b, before in zip((reference, backend), at)]
        at = tuple(block for block, _ in both)
        check(both[1][1], both[0][1])


@pytest.mark.parametrize("models", [(CONFIGS[2], "triton"), (CONFIGS[2], "cuda")], indirect=True, ids=name_of)
def test_the_language_model_generates(models):
    """Beyond the context, where the cache starts anew."""
    reference, backend, loaded = models
    lm = LanguageModel(backend, backend.model.config, loaded.vocab)
    text = lm.generate("w1 w2", 12, temperature=0)
    assert text.startswith("w1 w2")
    assert text == LanguageModel(reference, backend.model.config, loaded.vocab).generate("w1 w2", 12, temperature=0)


def test_steps_on_several_streams_follow_each_other():
    """A thread may have a current stream of its own, and the cache is one."""

    class Stream:
        def __init__(self):
            self.waited: list[Stream] = []

        def wait_stream(self, other: Stream) -> None:
            self.waited.append(other)

    step, a, b = DecodeStep.__new__(DecodeStep), Stream(), Stream()
    step._stream = None
    for stream in (a, a, b, b, a):
        step._follow(stream)
    assert a.waited == [b] and b.waited == [a]


@pytest.mark.parametrize("group", [None, 64])
def test_fused_matrices_are_the_same_numbers(group):
    gen = torch.Generator().manual_seed(0)
    make = [quantize(torch.randn(40, 128, generator=gen), 2, None, group) for _ in range(3)]
    modules = [GpuLinear(GpuWeight.from_quant_tensor(q).to(DEVICE), torch.randn(40, generator=gen)) for q in make]
    x = torch.randn(3, 128, generator=gen).to(DEVICE)
    separate = [m(x) for m in modules]
    fused = fuse(modules)
    together = fused(x).view(3, 3, 64)
    for i, (module, y, q) in enumerate(zip(modules, separate, make)):
        assert torch.equal(together[:, i, :40], y) and torch.equal(module(x), y)
        assert torch.equal(module.weight.dequantize().cpu(), q.dequantize())
    other = GpuLinear(GpuWeight.from_quant_tensor(quantize(torch.randn(40, 128), 4)).to(DEVICE))
    assert fuse([*modules[:2], other]) is None
