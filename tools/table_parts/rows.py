"""The rows of a table, as data: which model each is, made by which stage, from which plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.tools.table_parts.config import TableConfig

SEARCHED = ("hessian", "kl", "nas")
EQUAL_BYTES = "hessian-equal"  # the Hessian's plan of as many bytes as uniform 2 bits


@dataclass(frozen=True)
class RowSpec:
    """One row.

    Attributes:
        key: its name in files and JSON.
        kind: "fp32" (the baseline), "train" (full precision, longer), "post" (rounded), or a method of `lowbit admm`.
        plan: name of its plan; "" at full precision.
        seeds: one model each.
        epochs: of the training from the full-precision model; None without one.
        options: further arguments of its stage.
    """

    key: str
    title: str
    kind: str
    plan: str = ""
    seeds: tuple[int, ...] = ()
    epochs: float | None = None
    options: tuple[str, ...] = ()


def plans(config: TableConfig) -> dict[str, list[str]]:
    """Plan name -> arguments of `lowbit allocate` behind its file of sensitivities, but for those that wait for others:
    nas has a stage of its own, and the budget of ``EQUAL_BYTES`` is the size of another plan."""
    at = ["--ratio", str(config.ratio)]
    out = {f"uniform-{c}": ["--uniform", c] for c in config.uniform}
    out |= {"manual": ["--manual", config.manual], "hessian": at, "kl": at, "inverse": [*at, "--inverse"]}
    out |= {f"random-{i}": [*at, "--random", str(i)] for i in range(1, config.randoms + 1)}
    return out | {f"hessian-{b:g}x": ["--ratio", str(b)] for b in config.budgets}


def first_rows(config: TableConfig) -> list[RowSpec]:
    """Every row but those that depend on which searched plan is best."""
    one, e = config.seeds[:1], config.epochs
    seed = tuple(one)
    ratio = f"{config.ratio:g}x"
    rows = [
        RowSpec("fp32", "full precision", "fp32", seeds=tuple(config.seeds)),
        RowSpec("fp32-again", "full precision, trained on", "train", seeds=seed, epochs=e),
    ]
    if config.distill:
        options = ("--distill", str(config.distill))
        rows.append(RowSpec("fp32-distilled", "full precision, trained on, distilled", "train", "", seed, e, options))
    titles = {f"uniform-{c}": f"uniform {'1.58 (ternary)' if c == 'ternary' else c}" for c in config.uniform}
    titles |= {"manual": "manual", "hessian": f"Hessian {ratio}", "kl": f"KL {ratio}", "nas": f"NAS {ratio}"}
    titles |= {f"random-{i}": f"random {i} {ratio}" for i in range(1, config.randoms + 1)}
    titles |= {"inverse": f"inverse Hessian {ratio}"}
    titles |= {f"hessian-{b:g}x": f"Hessian {b:g}x" for b in config.budgets}
    titles[EQUAL_BYTES] = "Hessian, bytes of uniform 2"
    rows += [RowSpec(plan, title, "admm", plan, seed, e) for plan, title in titles.items()]
    rows += [
        RowSpec("ste-only", f"Hessian {ratio}, straight-through only", "straight-through", "hessian", seed, e),
        RowSpec("admm-only", f"Hessian {ratio}, ADMM only", "admm-only", "hessian", seed, e),
        RowSpec("post-training", f"Hessian {ratio}, post-training", "post", "hessian", seed),
        RowSpec("post-training-uniform-2", "uniform 2, post-training", "post", "uniform-2", seed),
    ]
    return rows


def headline_rows(config: TableConfig, best: RowSpec) -> list[RowSpec]:
    """The best searched row and uniform 2 bits with all seeds, and the longer trainings."""
    by_key = {row.key: row for row in first_rows(config)}
    seeds = tuple(config.seeds)
    rows = []
    if len(seeds) > 1:
        rows += [_with_seeds(row, seeds) for row in (best, by_key["uniform-2"])]
    by_key["best"] = best
    for i, long in enumerate(config.long, 1):
        epochs, number = long["epochs"], "" if i == 1 else f"-{i}"
        about, options = next(iter(long.get("options", {"": []}).items()))
        for name in long["rows"]:
            row = by_key[name]
            title = f"{row.title}, {epochs:g} epochs" + (f", {about}" if about else "")
            longer = replace(row, key=f"{row.key}-long{number}", title=title, epochs=epochs)
            rows.append(replace(longer, options=(*row.options, *options)))
            if name in long.get("seeds", ()) and len(seeds) > 1:
                rows.append(_with_seeds(rows[-1], seeds))
    return rows


def _with_seeds(row: RowSpec, seeds: tuple[int, ...]) -> RowSpec:
    return replace(row, key=f"{row.key}-seeds", title=f"{row.title}, {len(seeds)} seeds", seeds=seeds)


def trial_rows(config: TableConfig) -> list[RowSpec]:
    """The Hessian's plan trained with other options, one seed each."""
    seed, e = tuple(config.seeds[:1]), config.epochs
    return [
        RowSpec(f"trial-{i}", title, "admm", "hessian", seed, e, tuple(options))
        for i, (title, options) in enumerate(config.trials.items(), 1)
    ]
