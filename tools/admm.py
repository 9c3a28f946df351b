"""Train a full-precision model into its precision plan: ADMM, hard phase, scale phase (DESIGN section 7).

Leng et al. 2018 and arXiv 2112.11540, section 3: weights W, their quantized image Q and a scaled dual U per matrix. The
three phases share one budget of steps: ADMM draws W towards the levels while the loss is trained; the hard phase trains
the quantized model itself with straight-through gradients; the scale phase fixes the codes and trains what is left.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.errors import LowbitError
from lowbit.plan import Plan
from lowbit.tables import FREE
from lowbit.tools import cli
from lowbit.tools.search.sensitivities import pull_weights
from lowbit.tools.training.admm import Admm
from lowbit.tools.training.admm_options import METHODS, AdmmOptions
from lowbit.tools.training.config import TrainConfig
from lowbit.tools.training.loop import Stepper
from lowbit.tools.training.start import Corpora, add_run_options, prepare_run
from lowbit.tools.training.tile_layers import use_tiles


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "admm",
        "lowbit admm fp.safetensors --plan plan.json --data data/ptb --out admm.safetensors",
        "Batches, vocabulary and regularisation are those the checkpoint was trained with. An interrupted run goes on\n"
        "exactly where it was when the same command is given again; OUT.log.jsonl holds the perplexity of W and of Q,\n"
        "the residual |W - Q| / |W| and the share of codes that flip.",
    )
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a full-precision checkpoint of `lowbit train`")
    p.add_argument("--plan", required=True, metavar="FILE", help="precision of every matrix (JSON)")
    p.add_argument("--data", required=True, metavar="DIR", help="the text that the checkpoint was trained on")
    p.add_argument("--out", required=True, metavar="FILE", help="checkpoint to write (safetensors)")
    o = AdmmOptions()
    p.add_argument("--epochs", type=float, help="length of all phases together (default: as long as the original)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: half of the original's)")
    p.add_argument("--method", choices=list(METHODS), default="admm",
                   help="admm is followed by a straight-through phase (default: admm)")  # fmt: skip
    p.add_argument("--phases", type=float, nargs=3, metavar=("ADMM", "HARD", "SCALES"),
                   help="shares of the steps (default: the method's)")  # fmt: skip
    p.add_argument("--lr-scales", type=float, nargs=3, default=o.lr_scales, metavar=("ADMM", "HARD", "SCALES"),
                   help="factors on the learning rate (default: %(default)s)")  # fmt: skip
    p.add_argument("--dropout-scale", type=float, default=o.dropout_scale,
                   help="factor on the original dropout rates (default: %(default)s)")  # fmt: skip
    p.add_argument("--distill", type=float, default=o.distill, metavar="L",
                   help="loss (1-L) CE + L KL(full precision || quantized) (default: %(default)s)")  # fmt: skip
    p.add_argument("--duals", type=int, default=o.duals, help="dual updates (default: %(default)s)")
    p.add_argument("--kappa", type=float, nargs=2, default=o.kappa, metavar=("FIRST", "LAST"),
                   help="geometric ramp of the proximal pull (default: %(default)s)")  # fmt: skip
    p.add_argument("--extra-gradient", action="store_true", help="two gradients a step, as the papers do")
    p.add_argument("--pull", metavar="SENS.json",
                   help="weigh the pull of every matrix by its sensitivity (`lowbit sensitivity`)")  # fmt: skip
    p.add_argument("--learn-scales", action="store_true",
                   help="learn scales by gradient in the hard phase, instead of fitting them")  # fmt: skip
    p.add_argument("--freeze-from", type=float, default=o.freeze_from, metavar="SHARE",
                   help="of the hard phase, then stable codes are frozen; 1 never (default: %(default)s)")  # fmt: skip
    p.add_argument("--start", metavar="FILE",
                   help="start from these weights, such as a model of more bits; CHECKPOINT still teaches")  # fmt: skip
    p.add_argument("--seed", type=int, help="order of the data and dropout (default: the original's)")
    add_run_options(p)
    return p


def body(args: argparse.Namespace) -> dict[str, Any]:
    args.stage = "admm"
    checkpoint = Checkpoint.load(args.checkpoint)
    if checkpoint.plan is not None:
        raise LowbitError(f"{args.checkpoint}: already quantized; ADMM starts from a full-precision checkpoint")
    if "train_config" not in checkpoint.info:
        raise LowbitError(f"{args.checkpoint}: says nothing of its training; ADMM needs a checkpoint of `lowbit train`")
    plan = Plan.load(args.plan)
    plan.validate(checkpoint.config, args.plan)
    if free := [name for name, entry in plan.items() if entry.table == FREE]:
        raise LowbitError(f"{args.plan}: matrix {free[0]!r}: free levels are learned by packing, after training;"
                          " ADMM needs a fixed table such as midrise2 or midrise4")  # fmt: skip
    config = TrainConfig.from_dict(
        checkpoint.info["train_config"] | ({} if args.seed is None else {"seed": args.seed}), args.checkpoint
    )
    options = AdmmOptions(
        epochs=config.epochs if args.epochs is None else args.epochs, lr=config.lr / 2 if args.lr is None else args.lr,
        phases=tuple(args.phases or METHODS[args.method]), lr_scales=tuple(args.lr_scales),
        dropout_scale=args.dropout_scale, distill=args.distill, duals=args.duals, kappa=tuple(args.kappa),
        extra_gradient=args.extra_gradient, learn_scales=args.learn_scales, freeze_from=args.freeze_from,
    )  # fmt: skip
    dropout = replace(config, dropout=config.dropout.scaled(options.dropout_scale)).dropout  # checked again
    start, pull = _start(args, checkpoint), None if args.pull is None else pull_weights(args.pull, checkpoint.config)
    corpora = Corpora.read(args.data, config, checkpoint.vocab)
    device, precision, parallel = prepare_run(args, config.seed)
    model = (checkpoint if start is None else start).build_model().to(device)
    model.dropout = dropout
    torch.manual_seed(config.seed * 1000 + parallel.rank)
    teacher = use_tiles(checkpoint.build_model().to(device)) if options.distill > 0 else None
    stepper = Stepper(model, parallel, device, precision, config.clip)
    run = Admm(options, config, plan, corpora, stepper, teacher, args.out, args.restart, pull)
    result = run.run()
    if parallel.is_main:
        info = checkpoint.info | {"admm": result}
        Checkpoint.of_model(model, checkpoint.vocab, plan=plan, scales=run.scales(), residual=result["residual"],
                            info=info).save(args.out)  # fmt: skip
        cli.console(args).print(
            f"{args.out}: mean {plan.mean_bits(checkpoint.config):.2f} bits, valid PPL {result['valid_ppl']:.2f} "
            f"(full precision {checkpoint.info.get('valid_ppl', math.nan):.2f}), residual {result['residual']:g}"
        )
    run.finish()
    parallel.close()
    return result


def _start(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint | None:
    """The checkpoint of --start, of the same model as ``checkpoint``."""
    if args.start is None:
        return None
    start = Checkpoint.load(args.start)
    if start.config != checkpoint.config or start.vocab.hash != checkpoint.vocab.hash:
        raise LowbitError(f"--start {args.start}: a model of another shape or vocabulary than {args.checkpoint}")
    return start


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
