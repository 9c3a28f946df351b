"""Choose the best precision plan under a size budget, exactly: sens.json -> plan.json (DESIGN section 7)."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from typing import Any

from lowbit.errors import LowbitError, check_seed
from lowbit.files import check_writable, write_json
from lowbit.plan import Plan
from lowbit.tools import cli
from lowbit.tools.search.budget import Allocation, Budget, inverse_costs, random_plan
from lowbit.tools.search.choices import choice_name, make_plan, parse_choices
from lowbit.tools.search.sensitivities import Sensitivities


def parser() -> argparse.ArgumentParser:
    p = cli.parser(
        "allocate",
        "lowbit allocate sens.json --ratio 16 --out plan.json\n"
        "lowbit allocate sens.json --ratio 16 --random 3 --out random3.json\n"
        "lowbit allocate sens.json --manual 'embed=ternary *.attn.[qk]=1 *=2' --out manual.json",
        "The plan of least predicted loss among all that fit, found by dynamic programming over exact file bytes: the\n"
        "file that `lowbit pack` writes has the predicted size to the byte. The other methods are controls.",
    )
    p.add_argument("sensitivities", metavar="SENS.json", help="a file of `lowbit sensitivity`")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--ratio", type=float, metavar="R", help="R times smaller than the fp32 checkpoint, or more")
    budget.add_argument("--bytes", type=int, metavar="B", help="packed file of B bytes at most")
    budget.add_argument("--mean-bits", type=float, metavar="b", help="b bits a weight at most, scales not included")
    p.add_argument("--choices", metavar="LIST", help="precisions to choose from (default: those that were measured)")
    method = p.add_mutually_exclusive_group()
    method.add_argument("--uniform", metavar="CHOICE", help="the same for every matrix; needs no budget")
    method.add_argument("--manual", metavar="RULES", help="'PATTERN=CHOICE ...', the first that matches; no budget")
    method.add_argument("--random", type=int, metavar="SEED", help="a random plan that fills the budget")
    method.add_argument("--inverse", action="store_true", help="the plan of inverted sensitivities")
    p.add_argument("--out", required=True, metavar="FILE", help="plan to write (JSON)")
    return p


def make_budget(args: argparse.Namespace, sens: Sensitivities) -> Budget | None:
    """What the arguments ask for; None without a budget, which only a fixed plan may lack."""
    fixed = args.uniform is not None or args.manual is not None
    given = [v for v in (args.ratio, args.bytes, args.mean_bits) if v is not None]
    if fixed:
        if given:
            raise LowbitError("--uniform and --manual say the whole plan: they take no budget")
        return None
    if not given:
        raise LowbitError("needs a budget: --ratio, --bytes or --mean-bits")
    if not 0 < given[0] < float("inf"):
        raise LowbitError(f"the budget must be a positive number, not {given[0]}")
    if args.ratio is not None:
        return Budget.of_ratio(sens.size, args.ratio)
    return Budget(sens.size, args.bytes, args.mean_bits)


def choose(args: argparse.Namespace, sens: Sensitivities) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what is known of it: the cost and, where it is an optimum, the bound and the runner-up."""
    budget = make_budget(args, sens)
    choices = sens.choices if args.choices is None else parse_choices(args.choices)
    if unknown := [c for c in choices if c not in sens.choices]:
        raise LowbitError(f"--choices: {unknown[0]!r} was not measured; {args.sensitivities} has {sens.choices}")
    if args.uniform is not None:
        (name,) = _one(parse_choices(args.uniform), "--uniform")
        return make_plan(dict.fromkeys(sens.omega, name), {"method": "uniform"}), {}
    if args.manual is not None:
        return manual_plan(sens, args.manual), {}
    if args.random is not None:
        check_seed(args.random)
        source = {"method": "random", "seed": args.random} | budget.describe()
        return random_plan(budget, choices, args.random, source), {}
    method = f"inverse {sens.metric}" if args.inverse else sens.metric
    costs = inverse_costs(sens.omega, sens.squared_error) if args.inverse else sens.omega
    found = Allocation(budget, costs, choices, {"method": method} | budget.describe())
    return found.plan, found.summary()


def manual_plan(sens: Sensitivities, text: str) -> Plan:
    """Rules "PATTERN=CHOICE ...": the first shell pattern that matches a matrix decides.

    Raises:
        LowbitError: a rule of another form, an unknown precision, or a matrix that no pattern matches.
    """
    rules = []
    for rule in text.split():
        pattern, equals, name = rule.rpartition("=")
        if not equals or not pattern:
            raise LowbitError(f"--manual: {rule!r} is not PATTERN=CHOICE")
        rules.append((pattern, _one(parse_choices(name), f"--manual {rule}")[0]))
    chosen = {m: next((name for p, name in rules if fnmatch.fnmatchcase(m, p)), None) for m in sens.omega}
    if missing := [m for m, name in chosen.items() if name is None]:
        raise LowbitError(f"--manual: no pattern matches matrix {missing[0]!r}")
    return make_plan(chosen, {"method": "manual", "rules": text})


def _one(names: list[str], what: str) -> list[str]:
    if len(names) != 1:
        raise LowbitError(f"{what}: one precision, not {len(names)}")
    return names


def body(args: argparse.Namespace) -> dict[str, Any]:
    check_writable(args.out)
    sens = Sensitivities.load(args.sensitivities)
    plan, found = choose(args, sens)
    nbytes = sens.size.nbytes(plan)
    result = {
        "method": plan.source["method"], "bytes": nbytes, "ratio": sens.size.fp32_nbytes / nbytes,
        "mean_bits": plan.mean_bits(sens.size.config), "matrices": {m: choice_name(e) for m, e in plan.items()},
        "predicted": _predicted(plan, sens), **found,
    }  # fmt: skip
    # Beside the plan, not in its source: a packed file carries the source, and needs none of this.
    write_json(args.out, plan.to_dict() | {"allocation": cli.finite(result)})
    show(args, result)
    return result


def _predicted(plan: Plan, sens: Sensitivities) -> float | None:
    """Sum of the predicted costs; None where a precision was not measured."""
    names = {m: choice_name(entry) for m, entry in plan.items()}
    if any(name not in sens.choices for name in names.values()):
        return None
    return sum(sens.omega[m][name] for m, name in names.items())


def show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    console = cli.console(args)
    width = max(map(len, result["matrices"]))
    for name, choice in result["matrices"].items():
        console.print(f"{name:{width}}  {choice}")
    console.print(
        f"{args.out}: {result['bytes']:,} bytes packed, {result['ratio']:.3f} times smaller, "
        f"{result['mean_bits']:.3f} bits a weight"
    )
    if result["predicted"] is not None:
        console.print(f"predicted increase of the loss: {result['predicted']:.3g} nats a token")
    if "bound" in result:
        console.print(f"cost {result['cost']:.6g}, no plan of this budget below {result['bound']:.6g}")
    if result.get("runner_up"):
        second = result["runner_up"]
        changes = ", ".join(f"{m}: {c}" for m, c in second["changes"].items())
        console.print(f"second best {second['cost']:.6g} ({changes})")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
