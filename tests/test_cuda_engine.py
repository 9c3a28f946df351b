"""The GPU engine on a CPU: its modules and decoding step in Triton's interpreter, against the packed CPU model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_triton_linear import interpreter_switch  # noqa: F401  the kernels read TRITON_INTERPRET while they run

from lowbit import ModelConfig, quantize
from lowbit.backend import TorchBackend
from lowbit.container import write_packed
from lowbit.cuda import CudaBackend, fuse
from lowbit.engine import LanguageModel
from lowbit.forest import tries
from lowbit.gpu_layers import GpuLinear
from lowbit.kernels import GpuWeight
from lowbit.loading import _load_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CONFIGS = [
    ModelConfig(vocab_size=70, d_model=36, n_layers=2, n_heads=2, d_ffn=72, max_len=24, tied=True),
    ModelConfig(vocab_size=70, d_model=40, n_layers=2, n_heads=2, d_ffn=64, max_len=24, norm="post", activation="relu",
                position="sinusoidal", tied=False),
    ModelConfig(vocab_size=33, d_model=32, n_layers=1, n_heads=1, d_ffn=64, max_len=24, position="learned", tied=True),
]  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.norm}-{c.position}")
def models(request, tmp_path, pack_random):
    """The same file on the reference and on the GPU modules. fp16 activations differ from fp32 ones by 2^-11 of their
    size at each of a few roundings a layer: log-probabilities of these small models by well under 0.03."""
    path = tmp_path / "m.lowbit"
    write_packed(path, pack_random(request.param))
    reference = _load_packed(path, "cpu", "exact")
    loaded = _load_packed(path, DEVICE, "int8", gpu=True)
    return TorchBackend(reference.model, "cpu"), CudaBackend(loaded.model, DEVICE), loaded


def test_forests(models):
    reference, backend, loaded = models
    gen = np.random.default_rng(0)
    size = reference.model.config.vocab_size
    lists = [[gen.integers(2, size, length).tolist() for length in (3, 9, 1)] for _ in range(2)]
    lists[0].append(lists[0][1][:5])  # shares a prefix
    query, _ = tries(lists, 24, 12)
    np.testing.assert_allclose(backend.log_probs(query), reference.log_probs(query), atol=0.03)
    assert loaded.description["compute"] == "fp16" and "M=1" in loaded.description["kernel"]


def test_decoding(models):
    """Steps along a path, a branch off it, and back: the cache must follow."""
    reference, backend, _ = models
    paths = {}
    tree = [("a", []), ("b", ["a"]), ("c", ["a", "b"]), ("d", ["a", "b"]), ("x", []), ("e", ["a", "b", "c"])]
    for name, past in tree:
        token = [ord(name) % 31 + 2]
        blocks = [[paths[p][i] for p in past] for i in range(2)]
        paths[name] = (reference.extend(blocks[0], token), backend.extend(blocks[1], token))
        wanted, found = reference.next_log_probs(paths[name][0]), backend.next_log_probs(paths[name][1])
        np.testing.assert_allclose(found, wanted, atol=0.03, err_msg=name)
    prefix = [3, 4, 5]  # read at once, then one step
    wide = (reference.extend([], prefix), backend.extend([], prefix))
    step = (reference.extend([wide[0]], [6]), backend.extend([wide[1]], [6]))
    np.testing.assert_allclose(backend.next_log_probs(step[1]), reference.next_log_probs(step[0]), atol=0.03)


def test_the_language_model_generates(models):
    _, backend, loaded = models
    lm = LanguageModel(backend, backend.model.config, loaded.vocab)
    text = lm.generate("w1 w2", 30, temperature=0)  # beyond the context: the cache starts anew
    assert text.startswith("w1 w2") and text == lm.generate("w1 w2", 30, temperature=0)


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
