"""The ramp of kappa over the dual updates of ADMM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_training import train_argv, train_tiny

from lowbit.checkpoint import Checkpoint
from lowbit.plan import Plan
from lowbit.tools import admm


@pytest.mark.parametrize("duals", [3, 1000])
def test_the_ramp_ends_at_its_last_value(tmp_path, duals):
    """Also where more dual updates are asked for than there are steps."""
    data = train_argv(tmp_path)[1]
    checkpoint = train_tiny(tmp_path, epochs=0.5)
    Plan.uniform(Checkpoint.load(checkpoint).config, 2).save(tmp_path / "plan.json")
    out = tmp_path / "q.safetensors"
    argv = [str(checkpoint), "--plan", str(tmp_path / "plan.json"), "--data", data, "--out", str(out)]
    options = ["--epochs", "0.5", "--duals", str(duals), "--kappa", "1e-4", "1e-2", "--precision", "fp32"]
    assert admm.main([*argv, *options, "--threads", "1"]) == 0
    records = [json.loads(line) for line in Path(f"{out}.log.jsonl").read_text().splitlines()]
    kappas = [r["kappa"] for r in records if "kappa" in r]
    assert kappas[0] == pytest.approx(1e-4) and kappas[-1] == pytest.approx(1e-2)
    assert Checkpoint.load(out).residual == 0.0
