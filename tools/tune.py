"""Find the fastest launch configurations on this GPU and write them to ``kangaroo_kernels/configs/<GPU>.json``.

    python tools/tune.py --minutes 8
    python tools/tune.py --model Llama-3.1-8B --dtype float16 --json
    python tools/tune.py --dry-run

Every operation is tried at every shape of ``workloads.MODELS``. A candidate is timed only if it gives the bits of the
architecture's default on fresh random inputs of 1, 5 and 16 rows (of a head the tokens: a confidence is summed tile by
tile), and if these are within the error budget of the reference in float64: nothing that ``docs/kernels.md`` fixes can
change. What does not compile or launch is skipped and counted. Candidates like the default come first, and every shape
takes its turn; a candidate that seems faster than the best so far is timed again, longer, side by side with it. A rule
is written where one beat the default; the file keeps its rules for other shapes.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from command import INCOMPLETE, INTERRUPTED, refuse, require_time
from gpu_card import Card, read_card, snapshot
from tuning import DTYPES, Case, Found, Workbench, find_candidates, find_cases, result_of, search

from kangaroo_kernels import launch_config
from kangaroo_kernels.launch_config import LaunchConfig
from kangaroo_kernels.workloads import MODELS

NAME = "tune"
SUPPOSED = Card("a GPU of the sm_90 generation", 132, 50 << 20, 227 << 10, 90)
"""What ``--dry-run`` lists candidates for where there is no GPU."""

# ---- files

Rules = dict[str, list[dict[str, Any]]]


def merge_rules(existing: Rules, found: Mapping[Case, LaunchConfig | None]) -> Rules:
    """The existing rules, those of the same conditions replaced (None: left out), all exact ones before the others."""

    def conditions(rule: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in rule.items() if name not in LaunchConfig._fields}

    merged = {op: [dict(rule) for rule in rules] for op, rules in existing.items()}
    for case, config in found.items():
        kept = [rule for rule in merged.get(case.op, []) if conditions(rule) != case.key]
        if config is not None:
            block = {"block_n": config.block_n} if config.block_n else {}
            kept.append({**case.key, "num_warps": config.num_warps, "num_stages": config.num_stages, **block})
        merged[case.op] = kept
    for op, rules in merged.items():
        exact = [rule for rule in rules if conditions(rule).keys() == {"n", "k", "dtype"}]
        others = [rule for rule in rules if rule not in exact]
        merged[op] = sorted(exact, key=lambda rule: (rule["dtype"], rule["n"], rule["k"])) + others
    return {op: rules for op, rules in merged.items() if rules}


def read_rules(path: Path) -> Rules:
    """A file's rules; none where there is no file.

    Raises:
        ValueError: not the JSON of such a file.
    """
    try:
        rules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it or give another --out.") from error
    if not isinstance(rules, dict) or not all(isinstance(value, list) for value in rules.values()):
        raise ValueError(f"{path} does not map operations to lists of rules; give another --out.")
    return rules


def write_rules(path: Path, rules: Rules) -> None:
    """Write a file, one rule a line, whole or not at all."""
    blocks = (
        f"  {json.dumps(op)}: [\n" + ",\n".join(f"    {json.dumps(rule)}" for rule in lines) + "\n  ]"
        for op, lines in rules.items()
    )
    partial_file = path.with_suffix(".partial")
    partial_file.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    os.replace(partial_file, path)


# ---- the command


def show(result: Mapping[str, Any]) -> None:
    """Print a line of a case: configurations as warps, stages and ``block_n``, times at 1 and 8 rows."""

    def told(figures: Mapping[str, Any] | None) -> str:
        if figures is None:
            return "nothing"
        config = tuple(figures[field] for field in LaunchConfig._fields)
        return f"{config} {', '.join(f'{us:.1f}' for us in figures['us'].values())} us"

    default, best = result["default"], result["best"]
    gain = f", {default['us']['1'] / best['us']['1'] - 1:+.1%}" if best else ""
    counts = f"{result['tried']} tried, {result['rejected']} rejected, {result['failed']} failed"
    typer.echo(f"{result['op']} n={result['n']} k={result['k']}: {told(default)} -> {told(best)}{gain} ({counts})")


def main(
    minutes: Annotated[float, typer.Option(help="The time limit.")] = 8.0,
    model: Annotated[str | None, typer.Option(help="Only models whose names contain this.")] = None,
    dtype: Annotated[str, typer.Option(help="'bfloat16', 'float16' or 'float32'.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="The file to write; by default the GPU's own of configs/.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates; no GPU is needed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Sweep launch configurations within a time limit and write those faster than the defaults, bit for bit equal."""
    if dtype not in DTYPES:
        refuse(NAME, f"--dtype is {dtype}; it must be one of {', '.join(DTYPES)}.")
    require_time(NAME, "--minutes", minutes)
    on_gpu = torch.cuda.is_available()
    if not dry_run and not on_gpu:
        refuse(NAME, "tuning needs a CUDA GPU and there is none here; --dry-run lists the candidates without one.")
    models = [each for each in MODELS if model is None or model.lower() in each.name.lower()]
    if not models:
        refuse(NAME, f"no model is called {model}; there are {', '.join(each.name for each in MODELS)}.")
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    card = read_card(device) if on_gpu else SUPPOSED
    path = out if out is not None else launch_config.configs_folder() / launch_config.file_name(card.name)
    try:
        existing = read_rules(path)
    except (OSError, ValueError) as error:
        refuse(NAME, str(error))
    candidates = {case: find_candidates(case, card) for case in find_cases(models, DTYPES[dtype])}
    if dry_run:
        listed = [{"op": case.op, **case.key, "candidates": configs} for case, configs in candidates.items()]
        lines = (f"{case}: {len(some)} candidates, default {tuple(some[0])}" for case, some in candidates.items())
        typer.echo(json.dumps({"gpu": card.name, "cases": listed}) if as_json else "\n".join((card.name, *lines)))
        return

    found, interrupted, before = dict[Case, Found](), False, snapshot(device)
    try:
        with torch.inference_mode():
            search(candidates, Workbench(device, card, card.capability), 60 * minutes, found, time.monotonic)
    except KeyboardInterrupt:
        interrupted = True
    won = {case: None if each.best == each.default else each.best.config for case, each in found.items() if each.best}
    rules = merge_rules(existing, won)
    try:
        if rules != existing:
            write_rules(path, rules)
    except OSError as error:
        refuse(NAME, f"{path} cannot be written: {error.strerror}.")
    results = [result_of(case, each) for case, each in found.items()]
    unreached = [str(case) for case in candidates if case not in won]
    if as_json:
        machine = {"before": before, "after": snapshot(device), "torch": torch.__version__}
        summary = {"file": str(path), "minutes": minutes, "interrupted": interrupted, "unreached": unreached}
        typer.echo(json.dumps({**summary, "gpu": machine, "cases": results}, indent=2))
    else:
        for result in results:
            show(result)
    for sentence in unreached:
        typer.echo(f"{NAME}: nothing was timed for {sentence}; more --minutes may reach it.", err=True)
    count = sum(config is not None for config in won.values())
    typer.echo(f"{NAME}: {count} of {len(won)} shapes are faster than by default; {path} says how.", err=True)
    if interrupted or not won:
        raise typer.Exit(INTERRUPTED if interrupted else INCOMPLETE)


if __name__ == "__main__":
    typer.run(main)
