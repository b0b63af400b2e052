"""Find the fastest launch configurations on this GPU and write them to ``kangaroo_kernels/configs/<GPU>.json``.

    python tools/tune.py --minutes 8
    python tools/tune.py --model Llama-3.1-8B --dtype float16 --json
    python tools/tune.py --dry-run

Every operation is tried at every shape of ``workloads.MODELS``. A candidate is timed only if it gives the bits of the
architecture's default on fresh random inputs of 1, 5 and 16 rows (of a head the tokens: a confidence is summed tile by
tile), and if these are within the error budget of the reference in float64: nothing that ``docs/kernels.md`` fixes can
change. What does not compile or launch is skipped and
counted. Candidates like the default come first, every shape takes its turn, and the last seventh of the time goes to
timing each shape's best few again, side by side with the default. The file keeps its rules for other shapes.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from gpu_measure import (
    ALLOWED,
    ROUNDS,
    Card,
    Quantiles,
    first_rows,
    launcher,
    read_card,
    relative_error,
    repetitions_for,
    row_operands,
    same_bits,
    sets_needed,
    snapshot,
    time_graph,
    written,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from kangaroo_kernels import launch_config
from kangaroo_kernels.attention import TILE_BYTES
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.operation import Arguments
from kangaroo_kernels.shared.tiles import K_STEP_BYTES
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings, Workload, workloads

NOTHING_FOUND, USER_ERROR, INTERRUPTED = 1, 2, 130
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_ROWS = (1, 5, 16)
TIMED_ROWS = (1, 8)
CACHE_LENGTH = 4096
"""Positions that attention is tuned for."""

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), range(2, 9)
TIE = 0.01
"""Candidates within this share of the fastest at one row are told apart at eight."""

FINALISTS = 3
FINAL_SHARE = 1 / 7
SWEEP_ROUNDS, REPLAY_US = 11, 1000.0
"""Timed replays in the sweep, where many are compared; the finals have the benchmarks' number."""

SUPPOSED = Card("a GPU of the sm_90 generation", 132, 50 << 20, 227 << 10, 90)
"""What ``--dry-run`` lists candidates for where there is no GPU."""

# ---- what is tuned


class Case(NamedTuple):
    """An operation at one shape, as ``launch_config`` knows it, and a workload that has it."""

    op: str
    n: int
    k: int
    dtype: str
    workload: Workload

    @property
    def key(self) -> dict[str, int | str]:
        """A rule's conditions."""
        return {"n": self.n, "k": self.k, "dtype": self.dtype}

    def __str__(self) -> str:
        return f"{self.op} n={self.n} k={self.k}"


class _AskedError(Exception):
    """Ends a launch where it asks for its configuration."""


def asked_for(workload: Workload, dtype: torch.dtype) -> tuple[int, int]:
    """The ``n`` and ``k`` by which a workload's launcher asks for its configuration; no kernel is launched."""
    asked: list[tuple[int, int]] = []

    def note(op: str, n: int, k: int, dtype: torch.dtype) -> LaunchConfig:
        asked.append((n, k))
        raise _AskedError

    positional, named = workload.make(Settings(1, CACHE_LENGTH, dtype, torch.device("meta")))
    try:
        with configured_by(note):
            launcher(workload.op)(*positional, **named)
    except _AskedError:
        pass
    return asked[0]


def find_cases(models: Sequence[ModelShape], dtype: torch.dtype) -> list[Case]:
    """The operations of some models, each shape once."""
    name = str(dtype).removeprefix("torch.")
    cases: dict[tuple[str, int, int], Case] = {}
    for workload in (workload for model in models for workload in workloads(model)):
        n, k = asked_for(workload, dtype)
        cases.setdefault((workload.op, n, k), Case(workload.op, n, k, name, workload))
    return list(cases.values())


def stage_bytes(case: Case, block_n: int) -> int:
    """Of shared memory that a tile of the software pipeline takes."""
    if case.op == "attention":
        return 2 * int(TILE_BYTES.value) * case.n
    weight_rows = 2 * block_n if case.op == "gate_up" else block_n
    return (weight_rows + MAX_ROWS) * int(K_STEP_BYTES.value)


def default_of(case: Case, capability: int) -> LaunchConfig:
    """What the architecture's file says."""
    files = (launch_config.architecture_file(capability),)
    return launch_config.pick(files, case.op, case.n, case.k, case.dtype)


def find_candidates(case: Case, card: Card) -> list[LaunchConfig]:
    """The default, then all whose tiles could fit into shared memory, those like the default first."""
    default = default_of(case, card.capability)
    blocks = BLOCKS if default.block_n else (0,)
    candidates = [
        LaunchConfig(num_warps, num_stages, block_n)
        for num_warps in WARPS
        for num_stages in STAGES
        for block_n in blocks
        # one tile is in use and the others under way; the copies of all but one lie there at any time
        if (num_stages - 1) * stage_bytes(case, block_n) <= card.shared_bytes
    ]

    def unlike(candidate: LaunchConfig) -> tuple[bool, float]:
        steps = abs(math.log2(candidate.block_n / default.block_n)) if default.block_n else 0.0
        return candidate.num_warps != default.num_warps, steps + abs(candidate.num_stages - default.num_stages)

    return [default, *sorted((candidate for candidate in candidates if candidate != default), key=unlike)]


# ---- the search


class Speed(NamedTuple):
    """Of a candidate: the time of a call at each of ``TIMED_ROWS``."""

    one: Quantiles
    eight: Quantiles


class Trial(NamedTuple):
    """What became of a candidate.

    Attributes:
        speed: None unless it was timed.
        reason: why it was not: "rejected: ..." by the check, "failed: ..." to compile, launch or be timed.
    """

    config: LaunchConfig
    speed: Speed | None
    reason: str = ""


Check = Callable[[Case, LaunchConfig], str]
"""Why a candidate must not be used; an empty string if it may be."""

Time = Callable[[Case, LaunchConfig], Speed]


def attempt(case: Case, config: LaunchConfig, check: Check, time_it: Time) -> Trial:
    """Check a candidate and, if it is right, time it."""
    try:
        reason = check(case, config)
        return Trial(config, None, f"rejected: {reason}") if reason else Trial(config, time_it(case, config))
    except Exception as error:  # compilers, drivers and launches have many ways to refuse
        first_line = next(iter(str(error).splitlines()), "")
        return Trial(config, None, f"failed: {type(error).__name__}: {first_line}")


def sweep(
    candidates: Mapping[Case, Sequence[LaunchConfig]],
    check: Check,
    time_it: Time,
    deadline: float,
    clock: Callable[[], float],
) -> Iterator[tuple[Case, Trial]]:
    """Try the first candidate of every case (its default), then the second of every case, until the deadline.

    Where the default itself does not serve, there is nothing to hold the others against, and they are left out.
    """
    open_cases = dict(candidates)
    for turn in range(max(map(len, candidates.values()), default=0)):
        for case, configs in tuple(open_cases.items()):
            if turn >= len(configs):
                continue
            if clock() >= deadline:
                return
            trial = attempt(case, configs[turn], check, time_it)
            if turn == 0 and trial.speed is None:
                del open_cases[case]
            yield case, trial


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The best at one row, of those within ``TIE`` of it the best at eight, of equals the first; None if none ran."""
    timed = [(trial.speed, trial) for trial in trials if trial.speed is not None]
    if not timed:
        return None
    least = min(speed.one.p50 for speed, _ in timed)
    close = [(speed.eight.p50, trial) for speed, trial in timed if speed.one.p50 <= least * (1 + TIE)]
    return min(close, key=lambda pair: pair[0])[1]


def finalists(trials: Sequence[Trial]) -> list[LaunchConfig]:
    """The default and the best few others."""
    rest, best = list(trials), list[LaunchConfig]()
    while len(best) < FINALISTS and (winner := fastest(rest)) is not None:
        best.append(winner.config)
        rest.remove(winner)
    default = trials[0].config
    return [default, *(config for config in best if config != default)]


def time_again(
    tried: Mapping[Case, Sequence[Trial]],
    time_it: Time,
    deadline: float,
    clock: Callable[[], float],
) -> Iterator[tuple[Case, list[Trial]]]:
    """Time each case's finalists side by side; a case that the deadline falls into is left out."""
    for case, trials in tried.items():
        if trials[0].speed is None:
            continue
        finals = []
        for config in finalists(trials):
            if clock() >= deadline:
                return
            finals.append(attempt(case, config, lambda case, config: "", time_it))
        yield case, finals


# ---- on the card


class Workbench:
    """The arguments of every case, made when they are first asked for, and what is done with them.

    Args:
        card: None leaves one set of arguments a case, for checks alone.
    """

    def __init__(self, device: torch.device, card: Card | None, capability: int) -> None:
        self.device, self.card, self.capability = device, card, capability
        self._sets: dict[Case, list[Arguments]] = {}

    def sets(self, case: Case) -> list[Arguments]:
        """Arguments of 16 rows."""
        if case not in self._sets:
            length = CACHE_LENGTH if case.op == "attention" else 2 * MAX_ROWS
            settings = Settings(MAX_ROWS, length, DTYPES[case.dtype], self.device)
            count = 1
            if self.card is not None:
                set_bytes = case.workload.bytes_moved(MAX_ROWS, length, settings.dtype.itemsize)
                free_bytes, _ = torch.cuda.mem_get_info(self.device)
                count = sets_needed(set_bytes, self.card.l2_bytes, free_bytes)
            self._sets[case] = [case.workload.make(settings) for _ in range(count)]
        return self._sets[case]

    def check(self, case: Case, config: LaunchConfig) -> str:
        """Hold a candidate's bits against the default's, and its numbers against the reference, on fresh inputs."""
        arguments = self.sets(case)[0]
        for index in row_operands(case.op):
            arguments[0][index].normal_()
        kernel, default = launcher(case.op), default_of(case, self.capability)
        for rows in CHECKED_ROWS:
            some = first_rows(case.op, arguments, rows)
            with configured_by(lambda *_: default):
                wanted = written(case.op, kernel, some)
            with configured_by(lambda *_: config):
                got = written(case.op, kernel, some)
            if not same_bits(fixed_bits(got), fixed_bits(wanted)):
                return f"other bits than the default's at {rows} rows"
            error = relative_error(case.op, got, some)
            if not error <= ALLOWED[DTYPES[case.dtype]]:
                return f"relative error {error:.1e} at {rows} rows"
        return ""

    def time(self, case: Case, config: LaunchConfig, rounds: int = SWEEP_ROUNDS) -> Speed:
        """Time a candidate over all sets in turns."""
        sets, kernel = self.sets(case), launcher(case.op)
        repetitions = repetitions_for(len(sets), self.least_us(case), REPLAY_US)
        speeds = []
        for rows in TIMED_ROWS:
            calls = [_call(kernel, first_rows(case.op, arguments, rows)) for arguments in sets]
            with configured_by(lambda *_: config):
                speeds.append(time_graph(calls, repetitions, rounds))
        return Speed(*speeds)

    def least_us(self, case: Case) -> float:
        """A call's time at 5 TB/s, more than cards have."""
        itemsize = DTYPES[case.dtype].itemsize
        return case.workload.bytes_moved(MAX_ROWS, CACHE_LENGTH, itemsize) / 5e6


def fixed_bits(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What no configuration may change: of a head (which gives tokens) the tokens, else everything."""
    tokens = [result for result in results if not result.is_floating_point()]
    return tokens or list(results)


def _call(kernel: Callable[..., Any], arguments: Arguments) -> Callable[[], object]:
    positional, named = arguments
    return lambda: kernel(*positional, **named)


# ---- files and reports


def rule_of(case: Case, config: LaunchConfig) -> dict[str, int | str]:
    """A line of the file."""
    block = {"block_n": config.block_n} if config.block_n else {}
    return {**case.key, "num_warps": config.num_warps, "num_stages": config.num_stages, **block}


def merge_rules(
    existing: Mapping[str, Sequence[Mapping[str, Any]]], found: Mapping[Case, LaunchConfig]
) -> dict[str, list[dict[str, Any]]]:
    """The existing rules, with those of the same conditions replaced and all exact ones before the others."""
    merged = {op: [dict(rule) for rule in rules] for op, rules in existing.items()}
    for case, config in found.items():
        rules = merged.setdefault(case.op, [])
        kept = [rule for rule in rules if _conditions(rule) != case.key]
        merged[case.op] = [*kept, rule_of(case, config)]
    for op, rules in merged.items():
        exact = [rule for rule in rules if _conditions(rule).keys() == {"n", "k", "dtype"}]
        others = [rule for rule in rules if rule not in exact]
        merged[op] = sorted(exact, key=lambda rule: (rule["dtype"], rule["n"], rule["k"])) + others
    return merged


def _conditions(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rule.items() if name not in LaunchConfig._fields}


def read_rules(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A file's rules; none where there is no file.

    Raises:
        ValueError: not the JSON of such a file.
    """
    if not path.exists():
        return {}
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); mend it or give another --out.") from error
    if not isinstance(rules, dict) or not all(isinstance(value, list) for value in rules.values()):
        raise ValueError(f"{path} does not map operations to lists of rules; give another --out.")
    return rules


def write_rules(path: Path, rules: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a file, one rule a line, whole or not at all."""
    blocks = (
        f"  {json.dumps(op)}: [\n" + ",\n".join(f"    {json.dumps(dict(rule))}" for rule in lines) + "\n  ]"
        for op, lines in rules.items()
    )
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    os.replace(partial, path)


def report_of(case: Case, trials: Sequence[Trial], finals: Sequence[Trial]) -> dict[str, Any]:
    """What was found for a case, for a table and for JSON."""
    contenders = finals if finals and finals[0].speed is not None else trials
    default, best = contenders[0], fastest(contenders)
    refused = {str(tuple(trial.config)): trial.reason for trial in trials if trial.reason}

    def figures(trial: Trial | None) -> dict[str, Any] | None:
        if trial is None or trial.speed is None:
            return None
        return {**trial.config._asdict(), "us": {rows: speed._asdict() for rows, speed in _by_rows(trial.speed)}}

    return {
        "op": case.op,
        **case.key,
        "default": figures(default),
        "best": figures(best),
        "tried": len(trials),
        "rejected": sum(reason.startswith("rejected") for reason in refused.values()),
        "failed": sum(reason.startswith("failed") for reason in refused.values()),
        "timed_again": bool(finals),
        "refused": refused,
    }


def _by_rows(speed: Speed) -> Iterator[tuple[str, Quantiles]]:
    return zip(map(str, TIMED_ROWS), speed, strict=True)


def show(console: Console, reports: Sequence[Mapping[str, Any]]) -> None:
    """Print a row a case."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("operation", no_wrap=True)
    for header in ("n", "k", "default", "us at\n1, 8 rows", "best", "us at\n1, 8 rows", "gain"):
        table.add_column(header, justify="right", no_wrap=True)
    for report in reports:
        default, best = report["default"], report["best"]
        gain = "" if default is None else f"{default['us']['1']['p50'] / best['us']['1']['p50'] - 1:+.1%}"
        table.add_row(report["op"], str(report["n"]), str(report["k"]), *_cells(default), *_cells(best), gain)
    console.print(table)
    tried, rejected, failed = (sum(report[count] for report in reports) for count in ("tried", "rejected", "failed"))
    console.print("configurations as block_n, warps, stages", highlight=False)
    console.print(f"{tried} tried, {rejected} rejected, {failed} failed", highlight=False)


def _cells(figures: Mapping[str, Any] | None) -> tuple[str, str]:
    if figures is None:
        return "none", ""
    times = ", ".join(f"{figures['us'][str(rows)]['p50']:.1f}" for rows in TIMED_ROWS)
    return _words(LaunchConfig(*(figures[field] for field in LaunchConfig._fields))), times


def _words(config: LaunchConfig) -> str:
    return f"{config.block_n or '-'}, {config.num_warps}, {config.num_stages}"


def show_candidates(console: Console, candidates: Mapping[Case, Sequence[LaunchConfig]]) -> None:
    """Print what would be tried."""
    table = Table("operation", "n", "k", "default", "block_n: stages, at 4 and at 8 warps", box=SIMPLE_HEAD, padding=0)
    for case, configs in candidates.items():
        stages: dict[int, list[int]] = {}
        for config in sorted(configs, key=lambda config: config.block_n):
            stages.setdefault(config.block_n, []).append(config.num_stages)
        ranges = [f"{block or '-'}: {min(some)}-{max(some)}" for block, some in stages.items()]
        table.add_row(case.op, str(case.n), str(case.k), _words(configs[0]), ", ".join(ranges))
    console.print(table)
    console.print("defaults as block_n, warps, stages", highlight=False)
    console.print(f"{sum(map(len, candidates.values()))} candidates", highlight=False)


@contextmanager
def time_bar(limit: float, clock: Callable[[], float]) -> Iterator[Callable[[str], None]]:
    """A bar on stderr of the time that is left; call it with what is being done.

    It is drawn between trials only: a thread that draws would disturb what is timed meanwhile.
    """
    console, started = Console(stderr=True), clock()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(
        *columns, console=console, disable=not console.is_terminal, auto_refresh=False, transient=True
    ) as bar:
        task = bar.add_task("", total=limit, left="")

        def update(what: str) -> None:
            spent = clock() - started
            left = max(0, math.ceil(limit - spent))
            bar.update(task, description=what, completed=min(limit, spent), left=f"{left // 60}:{left % 60:02} left")
            bar.refresh()

        yield update


def choose_models(name: str | None) -> list[ModelShape]:
    """The models whose names contain ``name``, all of them without one.

    Raises:
        ValueError: there is none.
    """
    chosen = [model for model in MODELS if name is None or name.lower() in model.name.lower()]
    if not chosen:
        raise ValueError(f"no model is called {name}; there are {', '.join(model.name for model in MODELS)}.")
    return chosen


def refuse(sentence: str) -> typer.Exit:
    """Say what was wrong; raise what comes back."""
    typer.echo(f"tune: {' '.join(sentence.split())}", err=True)
    return typer.Exit(USER_ERROR)


def main(
    minutes: Annotated[float, typer.Option(help="The time limit.")] = 8.0,
    model: Annotated[str | None, typer.Option(help="Only models whose names contain this.")] = None,
    dtype: Annotated[str, typer.Option(help="'bfloat16', 'float16' or 'float32'.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="The file to write; by default the GPU's own of configs/.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the candidates; no GPU is needed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Sweep launch configurations within a time limit and write the best, bit for bit equal to the defaults."""
    if dtype not in DTYPES:
        raise refuse(f"--dtype is {dtype}; it must be one of {', '.join(DTYPES)}.")
    if not 0 < minutes < math.inf:
        raise refuse(f"--minutes is {minutes:g}; it must be a finite number above 0.")
    if not dry_run and not torch.cuda.is_available():
        raise refuse("tuning needs a CUDA GPU and there is none here; --dry-run lists the candidates without one.")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    card = read_card(device) if torch.cuda.is_available() else SUPPOSED
    path = out if out is not None else launch_config.configs_folder() / launch_config.file_name(card.name)
    try:
        cases = find_cases(choose_models(model), DTYPES[dtype])
        existing = read_rules(path)
    except (OSError, ValueError) as error:
        raise refuse(str(error)) from error
    candidates = {case: find_candidates(case, card) for case in cases}
    if dry_run:
        if as_json:
            listed = [{"op": case.op, **case.key, "candidates": configs} for case, configs in candidates.items()]
            typer.echo(json.dumps({"gpu": card.name, "cases": listed}, indent=2))
        else:
            Console().print(f"for {card.name}", highlight=False)
            show_candidates(Console(), candidates)
        return

    clock, limit = time.monotonic, 60 * minutes
    started = clock()
    tried: dict[Case, list[Trial]] = {}
    finals: dict[Case, list[Trial]] = {}
    bench, interrupted, before = Workbench(device, card, card.capability), False, snapshot(device)
    try:
        with torch.inference_mode(), time_bar(limit, clock) as update:
            update("sweeping")
            sweeping = sweep(candidates, bench.check, bench.time, started + limit * (1 - FINAL_SHARE), clock)
            for case, trial in sweeping:
                tried.setdefault(case, []).append(trial)
                update(str(case))
            final_time = partial(bench.time, rounds=ROUNDS)
            for case, trials in time_again(tried, final_time, started + limit, clock):
                finals[case] = trials
                update(f"again {case}")
    except KeyboardInterrupt:
        interrupted = True

    reports = [report_of(case, trials, finals.get(case, [])) for case, trials in tried.items()]
    found = {
        case: LaunchConfig(*(report["best"][field] for field in LaunchConfig._fields))
        for case, report in zip(tried, reports, strict=True)
        if report["best"] is not None
    }
    try:
        if found:
            write_rules(path, merge_rules(existing, found))
    except OSError as error:
        raise refuse(f"{path} cannot be written: {error.strerror}.") from error
    unreached = [str(case) for case in cases if case not in found]
    if as_json:
        machine = {"before": before, "after": snapshot(device), "torch": torch.__version__}
        summary = {"file": str(path), "minutes": minutes, "interrupted": interrupted, "without_a_rule": unreached}
        typer.echo(json.dumps({**summary, "gpu": machine, "cases": reports}, indent=2))
    else:
        show(Console(), reports)
        for sentence in unreached:
            typer.echo(f"tune: no rule for {sentence}; more --minutes may reach it.", err=True)
        typer.echo(f"tune: {f'wrote {path}' if found else 'nothing was timed, so nothing is written'}.", err=True)
    if interrupted or not found:
        raise typer.Exit(INTERRUPTED if interrupted else NOTHING_FOUND)


if __name__ == "__main__":
    typer.run(main)
