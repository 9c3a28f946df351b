"""tools/train.py and tools/training: the fused loss, the order of the data, exact resume, processes, bad input."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import MODEL, stop_at, train_argv, train_tiny, write_data

from lowbit.checkpoint import Checkpoint
from lowbit.config import ModelConfig
from lowbit.errors import LowbitError
from lowbit.model import Dropout, TransformerLM
from lowbit.tools import train
from lowbit.tools.training import loss as loss_module
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.data import IGNORED, Batches, Sentences, TokenStream, corpus_file
from lowbit.tools.training.loop import Stepper, learning_rate
from lowbit.tools.training.parallel import Parallel
from lowbit.vocab import EOS_ID, UNK_ID, Vocab

ROOT = Path(__file__).resolve().parents[1]
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The fused loss


def reference(hidden, weight, target, teacher_hidden, teacher_weight, distill):
    """Loss and NLL in fp64 by torch's own operations."""
    log_p = (hidden @ weight.T).log_softmax(1)
    nll = -log_p.gather(1, target[:, None]).sum()
    if teacher_hidden is None:
        return nll, nll
    log_q = (teacher_hidden @ teacher_weight.T).log_softmax(1)
    return (1 - distill) * nll + distill * (log_q.exp() * (log_q - log_p)).sum(), nll


@pytest.mark.parametrize("distill", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_linear_cross_entropy_is_the_reference(distill, rows, monkeypatch):
    monkeypatch.setattr(loss_module, "_MATMUL_ROWS", 16)  # 50 rows: several products of several blocks
    monkeypatch.setattr(loss_module, "_CACHE_BYTES", 4 * 37 * 5)
    gen = torch.Generator().manual_seed(rows)
    vocab, width = 37, 12

    def inputs(n):
        return torch.randn(n, width, generator=gen)

    hidden, weight, target = inputs(rows), inputs(vocab), torch.randint(vocab, (rows,), generator=gen)
    teacher = (None, None) if distill is None else (inputs(rows), inputs(vocab))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, nll = loss_module.linear_cross_entropy(h, w, target, *teacher, distill or 0.0)
    (loss * 0.5).backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    teacher64 = [None if t is None else t.double() for t in teacher]
    loss64, nll64 = reference(h64, w64, target, *teacher64, distill or 0.0)
    (loss64 * 0.5).backward()

    # A logit sums K products: |error| <= (K + 1) eps sum |h||w|, at most `slack` over all logits. A log-probability has
    # twice that, a probability twice that relatively; gradients sum V or M of them, with a rounding for each.
    slack = (width + 1) * EPS * (h64.abs() @ w64.abs().T).max().item()
    relative = 4 * slack + (vocab + rows + 8) * EPS
    assert abs((nll - nll64).item()) <= rows * 2 * slack + (rows + vocab) * EPS * nll64.item()
    assert abs((loss - loss64).item()) <= rows * 4 * slack + (rows + vocab) * EPS * (1 + (loss64.abs() + nll64).item())
    bound = 2 * 0.5 * relative  # |p| + |one-hot| (or |p| + |q|) sums to at most 2 a row
    assert (h.grad - h64.grad).abs().max() <= bound * w64.abs().max()
    assert (w.grad - w64.grad).abs().max() <= bound * rows * h64.abs().max()


def test_distilling_from_oneself_has_no_gradient():
    gen = torch.Generator().manual_seed(1)
    h, w = torch.randn(9, 8, generator=gen, requires_grad=True), torch.randn(20, 8, generator=gen, requires_grad=True)
    loss, _ = loss_module.linear_cross_entropy(h, w, torch.arange(9), h.detach(), w.detach(), 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5 and h.grad.abs().max() < 1e-6


def test_loss_of_no_rows_is_zero():
    """A process whose share of a batch is empty still takes part."""
    h, w = torch.zeros(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss, nll = loss_module.linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == nll.item() == 0 and not w.grad.any()


# Batches


def corpus(n=60):
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 30, rng.integers(1, 40))) for _ in range(n)]


def tokens_of(batches) -> list[int]:
    """Sorted targets of all batches, padding aside."""
    return sorted(t for batch in batches for t in batch.targets[batch.targets != IGNORED].tolist())


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_every_token_once(rows):
    lines = corpus()
    vocab = Vocab.build(lines)
    wanted = sorted(t for line in lines for t in [*vocab.encode(line)[0], EOS_ID])
    sentences = Batches(Sentences(lines, vocab, 16), rows, seed=1)
    assert tokens_of(sentences.evaluation()) == wanted
    assert tokens_of(sentences.epoch(0)) == wanted
    stream = Batches(TokenStream(lines, vocab, 16), rows, seed=1)
    assert tokens_of(stream.evaluation()) == wanted
    # Training drops the piece before a random offset and the incomplete last one: fewer than two pieces.
    assert len(wanted) - 2 * 16 < len(tokens_of(stream.epoch(0))) <= len(wanted)


def test_targets_follow_tokens_and_padding_is_ignored():
    lines = corpus()
    vocab = Vocab.build(lines)
    for batch in Batches(Sentences(lines, vocab, 16), 4, seed=1).epoch(0):
        kept = batch.targets != IGNORED
        assert torch.equal(kept, kept.cummin(1).values), "padding stands at the end only"
        assert (batch.tokens[:, 1:][kept[:, 1:]] == batch.targets[:, :-1][kept[:, 1:]]).all()
        assert batch.tokens.numel() <= 4 * 16 or len(batch.tokens) == 1
        assert batch.n_targets == int(kept.sum())


def test_padding_does_not_touch_the_loss():
    config = ModelConfig(vocab_size=9, **MODEL)
    torch.manual_seed(0)
    stepper = Stepper(TransformerLM(config).eval(), Parallel(torch.device("cpu")), torch.device("cpu"), "fp32", 1.0)
    vocab = Vocab(["</s>", "<unk>", *"abcdefg"])
    together = Batches(Sentences(["a b c d e f g", "b c", "d"], vocab, 16), 8).epoch(0)
    alone = [b for line in ("a b c d e f g", "b c", "d") for b in Batches(Sentences([line], vocab, 16), 8).epoch(0)]
    sums = [sum(stepper.losses(b)[0].item() for b in batches) for batches in (together, alone)]
    assert len(together) == 1 and sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_order_is_a_function_of_seed_and_epoch():
    lines = corpus()
    vocab = Vocab.build(lines)

    def first(seed, epoch):
        return [b.tokens.tolist() for b in Batches(Sentences(lines, vocab, 16), 4, 0.5, seed).epoch(epoch)]

    assert first(1, 2) == first(1, 2)
    assert first(1, 2) != first(1, 3) and first(1, 2) != first(2, 2)


def test_rare_words_become_unk_at_the_rate_and_only_they():
    lines = [f"common r{i} common" for i in range(400)]
    vocab = Vocab.build(lines)
    batches = Batches(Sentences(lines, vocab, 8), 16, rare_to_unk=0.3, seed=1)
    tokens = torch.cat([b.targets[b.targets != IGNORED] for b in batches.epoch(0)])
    replaced = int((tokens == UNK_ID).sum())
    assert abs(replaced - 120) < 5 * (400 * 0.3 * 0.7) ** 0.5  # five standard deviations of the binomial
    assert int((tokens == vocab.id("common")).sum()) == 800
    evaluated = torch.cat([b.targets.flatten() for b in batches.evaluation()])
    assert not (evaluated == UNK_ID).any()


def test_shards_part_a_batch():
    lines = corpus()
    for batch in Batches(Sentences(lines, Vocab.build(lines), 16), 5).epoch(0):
        rows = [r for i in range(3) for r in batch.shard(i, 3).tokens.tolist()]
        assert sorted(rows) == sorted(batch.tokens.tolist())


# Schedules, variants


def test_learning_rate():
    rates = [learning_rate(s, 100, 1.0, 10) for s in range(101)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert learning_rate(50, 100, 0.25, 10, "plateau") == 0.25


@pytest.mark.parametrize(
    ("norm", "activation", "position", "tied"),
    list(itertools.product(("pre", "post"), ("relu", "gelu"), ("sinusoidal", "learned", "rotary"), (True, False))),
)
def test_every_variant_learns(norm, activation, position, tied):
    config = ModelConfig(
        vocab_size=32, norm=norm, activation=activation, position=position, tied=tied, **MODEL | {"d_ffn": 64}
    )
    torch.manual_seed(0)
    model = TransformerLM(config)
    model.dropout = Dropout(0.1, 0.1, 0.1, 0.1, 0.1)
    lines = corpus(40)
    batches = Batches(Sentences(lines, Vocab.build(lines), 16), 8).epoch(0)
    stepper = Stepper(model, Parallel(torch.device("cpu")), torch.device("cpu"), "fp32", 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(16):
        optimizer.zero_grad()
        losses.append(stepper.backward(batches[step % 2])[1].item())
        stepper.clip_gradients()
        optimizer.step()
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2]), losses
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Resume


def assert_same(a: Path, b: Path) -> None:
    first, second = Checkpoint.load(a), Checkpoint.load(b)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), f"{name} differs"


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(f"{path}.log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["sentence", "stream"])
@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_a_killed_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, mode, schedule, capsys):
    variant = {"mode": mode, "schedule": schedule}
    whole = train_tiny(tmp_path, "whole.safetensors", **variant)
    for step in (3, 20):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train.main(train_argv(tmp_path, "killed.safetensors", **variant)) == 130
        assert not (tmp_path / "killed.safetensors").exists()
    killed = train_tiny(tmp_path, "killed.safetensors", **variant)
    assert "resuming at step 23" in capsys.readouterr().err
    assert_same(whole, killed)
    logs = [read_log(p) for p in (whole, killed)]
    for a, b in zip(*logs, strict=True):
        assert (a["step"], a["valid_ppl"], a["lr"]) == (b["step"], b["valid_ppl"], b["lr"])
    assert not Path(f"{killed}.resume").exists()


def test_the_state_of_another_run_is_refused(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(train_argv(tmp_path)) == 130
    capsys.readouterr()
    assert train.main(train_argv(tmp_path, lr=0.02)) == 2
    assert "--restart" in capsys.readouterr().err
    assert train.main([*train_argv(tmp_path, lr=0.02), "--restart"]) == 0


def test_a_damaged_state_is_an_error(tmp_path, capsys):
    argv = train_argv(tmp_path)
    (tmp_path / "fp.safetensors.resume").write_bytes(b"half a file")
    assert train.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "damaged resume file" in error and "--restart" in error


@pytest.mark.slow
def test_sigterm_saves_and_leaves(tmp_path):
    argv = train_argv(tmp_path, epochs=2000, evals=1000)
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "train.py"), *argv], stderr=subprocess.PIPE)
    log, deadline = tmp_path / "fp.safetensors.log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error.decode()
    assert (tmp_path / "fp.safetensors.resume").is_file()
    assert sorted(p.name for p in tmp_path.glob("fp.safetensors*")) == [
        "fp.safetensors.log.jsonl",
        "fp.safetensors.resume",
    ]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Summed gradients of half batches are those of whole batches, up to the order of fp32 sums."""
    still = {"dropout": {}, "epochs": 0.5, "lr": 0.001}
    argv = train_argv(tmp_path, "two.safetensors", **still)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(ROOT / "tools" / "train.py"), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = train_tiny(tmp_path, "one.safetensors", **still)
    logs = [read_log(p) for p in (one, tmp_path / "two.safetensors")]
    for a, b in zip(*logs, strict=True):
        # Adam divides by the gradient's size, so a rounding of eps moves an entry near 0 by a full step at worst; seen
        # here are relative differences below 1e-6, and a wrong batch or count would show above 1e-2.
        assert np.log(a["valid_ppl"]) == pytest.approx(np.log(b["valid_ppl"]), rel=1e-4)
        assert np.log(a["train_ppl"]) == pytest.approx(np.log(b["train_ppl"]), rel=1e-4)


def test_an_empty_share_of_a_batch_takes_part():
    config = ModelConfig(vocab_size=9, **MODEL)
    stepper = Stepper(TransformerLM(config), Parallel(torch.device("cpu")), torch.device("cpu"), "fp32", 1.0)
    vocab = Vocab(["</s>", "<unk>", *"abcdefg"])
    (batch,) = Batches(Sentences(["a b c"], vocab, 16), 8).epoch(0)
    loss, nll = stepper.losses(batch.shard(1, 2))
    loss.backward()
    assert nll.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in stepper.model.parameters())


# Continuing, and bad input


def test_init_starts_from_the_checkpoint(tmp_path, capsys):
    first = train_tiny(tmp_path, "first.safetensors")
    argv = [*train_argv(tmp_path, "second.safetensors"), "--init", str(first), "--lr", "1e-5", "--epochs", "0.2"]
    assert train.main(argv) == 0
    ppl = [Checkpoint.load(tmp_path / f"{n}.safetensors").info["valid_ppl"] for n in ("first", "second")]
    assert ppl[1] == pytest.approx(ppl[0], rel=0.02)
    capsys.readouterr()
    other = train_argv(tmp_path, "third.safetensors", model=MODEL | {"n_layers": 1})
    assert train.main([*other, "--init", str(first)]) == 2
    assert "another shape" in capsys.readouterr().err


def spoil(folder: Path, what: str) -> None:
    data = write_data(folder)
    if what == "empty":
        (data / "train.txt").write_text("\n  \n")
    elif what == "missing":
        (data / "valid.txt").unlink()
    elif what == "latin-1":
        (data / "train.txt").write_bytes(b"one line\ncaf\xe9\n")
    elif what == "two":
        (data / "a.train.txt").write_text("x\n")
        (data / "b.train.txt").write_text("x\n")
        (data / "train.txt").unlink()


@pytest.mark.parametrize(
    ("what", "named"),
    [("empty", "train.txt"), ("missing", "valid.txt"), ("latin-1", "not UTF-8"), ("two", "2 files")],
)
def test_bad_text(tmp_path, capsys, what, named):
    spoil(tmp_path, what)
    assert train.main(train_argv(tmp_path)) == 2
    error = capsys.readouterr().err.splitlines()
    assert named in error[-1] and error[-1].startswith("lowbit train: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "data"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"schedule": "step"}, "schedule"), ({"lr": -1}, "lr"), ({"epochs": 0}, "epochs"), ({"speed": 1}, "speed"),
        ({"dropout": {"word": 1.0}}, "word"), ({"dropout": {"words": 0.1}}, "words"), ({"dropout": 0.1}, ""),
        ({"model": {"depth": 3}}, "depth"), ({"model": {"d_model": 33}}, "d_model"), ({"batch_size": 0.5}, "batch"),
        ({"seq_len": "long"}, "seq_len"), ({"model": 3}, "model"), ({"warmup": -1}, "warmup"), ({"seed": "x"}, "seed"),
    ],
)  # fmt: skip
def test_bad_config(tmp_path, capsys, overrides, named):
    assert train.main(train_argv(tmp_path, **overrides)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lowbit train: ") and named in error
    assert not (tmp_path / "fp.safetensors").exists()


def test_bad_arguments(tmp_path, capsys):
    argv = train_argv(tmp_path)
    assert train.main([*argv, "--out", str(tmp_path / "no" / "fp.safetensors")]) == 2
    assert train.main([*argv, "--config", "no-such-config"]) == 2
    assert train.main([*argv, "--epochs", "-1"]) == 2
    assert train.main([*argv, "--data", str(tmp_path / "nowhere")]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("lowbit train: ") or line.startswith("train: cpu")


def test_corpus_file_by_ending(tmp_path):
    (tmp_path / "ptb.train.txt").write_text("x\n")
    assert corpus_file(tmp_path, "train").name == "ptb.train.txt"
    with pytest.raises(LowbitError, match=r"no valid\.txt"):
        corpus_file(tmp_path, "valid")


def test_named_configs_are_valid():
    for path in (ROOT / "tools" / "configs").glob("*.json"):
        config = TrainConfig.find(path.stem)
        assert TrainConfig.from_dict(config.to_dict(), path.name) == config
