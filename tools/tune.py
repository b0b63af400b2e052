"""Find the fastest launch configurations on this GPU and write them to ``kangaroo_kernels/configs/<GPU>.json``.

    python tools/tune.py --minutes 8

Every operation is tried at every shape of ``workloads.MODELS``, in bfloat16. A candidate is timed only if it gives the
bits of the architecture's default on fresh random inputs of 1, 5 and 16 rows (of a head the tokens: a confidence is
summed tile by tile), and if these are within the error budget of the reference in float64: nothing that
``docs/kernels.md`` fixes can change. A head keeps its number of warps, which the order of a confidence's sum follows
from. Every shape takes its turn. A rule is written where one beat the default.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gpu_measure as gm
import torch
import typer
from accuracy import ALLOWED, first_rows, launcher, relative_error, row_operands, same_bits, written
from command import INCOMPLETE, INTERRUPTED, refuse, require_time
from gpu_card import Card, read_card
from report.job import write_json

from kangaroo_kernels import launch_config
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.operation import Arguments
from kangaroo_kernels.workloads import MODELS, ModelShape, Settings, Workload, workloads

NAME = "tune"
CHECKED_ROWS, TIMED_ROWS = (1, 5, 16), (1, 8)
"""Timed are a drafting step's row and a verification's."""
CACHE_LENGTH = 4096
"""Positions that attention is tuned for."""

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), range(2, 9)
HEADS = "top1_head", "sample_head"
TIE = 0.01
"""Times within this share are equal, and the default stays."""

# ---- what is tuned


class Case(NamedTuple):
    """An operation at one shape, as ``launch_config`` knows it, and a workload that has it."""

    op: str
    n: int
    k: int
    workload: Workload
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> dict[str, Any]:
        """A rule's conditions."""
        return {"n": self.n, "k": self.k, "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        return f"{self.op} n={self.n} k={self.k}"


class _AskedError(Exception):
    """Ends a launch where it asks for its configuration."""


def find_cases(models: Sequence[ModelShape], dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """The operations of some models, each shape once: ``n`` and ``k`` as their launchers ask; no kernel is launched."""
    cases: dict[tuple[str, int, int], Case] = {}

    def note(workload: Workload, op: str, n: int, k: int, dtype: torch.dtype) -> LaunchConfig:
        cases.setdefault((op, n, k), Case(op, n, k, workload, dtype))
        raise _AskedError

    for workload in (workload for model in models for workload in workloads(model)):
        positional, named = workload.make(Settings(1, CACHE_LENGTH, dtype, torch.device("meta")))
        with suppress(_AskedError), configured_by(partial(note, workload)):
            launcher(workload.op)(*positional, **named)
    return list(cases.values())


def find_candidates(case: Case, card: Card) -> list[LaunchConfig]:
    """The architecture's default, then all others, those like the default first."""
    default = launch_config.pick((launch_config.architecture_file(card.capability),), case.op, **case.key)

    def unlike(candidate: LaunchConfig) -> tuple[bool, int]:
        doublings = abs(candidate.block_n.bit_length() - default.block_n.bit_length())
        return candidate.num_warps != default.num_warps, doublings + abs(candidate.num_stages - default.num_stages)

    warps = (default.num_warps,) if case.op in HEADS else WARPS
    sizes = product(warps, STAGES, BLOCKS if default.block_n else (0,), {0, default.registers})
    every = (LaunchConfig(count, stages, block_n, registers=most) for count, stages, block_n, most in sizes)
    return [default, *sorted((each for each in every if each != default), key=unlike)]


# ---- on the card


def fixed_bits(results: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What no configuration may change: of a head (which gives tokens) the tokens, else everything."""
    return [result for result in results if not result.is_floating_point()] or results


@dataclass(frozen=True)
class Workbench:
    """A card, the arguments of every case on it, made when they are first asked for, and what is done with them."""

    device: torch.device
    card: Card
    made: dict[Case, list[Arguments]] = field(default_factory=dict)

    def sets(self, case: Case) -> list[Arguments]:
        """Arguments of 16 rows, whose weights together exceed the L2."""
        if case not in self.made:
            length = CACHE_LENGTH if case.op == "attention" else 2 * MAX_ROWS
            set_bytes = case.workload.bytes_moved(MAX_ROWS, length, case.dtype.itemsize)
            count = gm.sets_needed(set_bytes, self.card.l2_bytes, torch.cuda.mem_get_info(self.device)[0])
            settings = Settings(MAX_ROWS, length, case.dtype, self.device)
            self.made[case] = [case.workload.make(settings) for _ in range(count)]
        return self.made[case]

    def is_right(self, case: Case, config: LaunchConfig, default: LaunchConfig) -> bool:
        """Whether a candidate gives the default's bits, and numbers near the reference's, on fresh inputs."""
        arguments = self.sets(case)[0]
        for index in row_operands(case.op):
            arguments[0][index].normal_()
        for rows in CHECKED_ROWS:
            some = first_rows(case.op, arguments, rows)
            with configured_by(lambda *_: default):
                wanted = written(case.op, launcher(case.op), some)
            with configured_by(lambda *_: config):
                got = written(case.op, launcher(case.op), some)
            near = relative_error(case.op, got, some) <= ALLOWED[case.dtype]
            if not (near and same_bits(fixed_bits(got), fixed_bits(wanted))):
                return False
        return True

    def time(self, case: Case, config: LaunchConfig) -> float:
        """Microseconds of a call at each of ``TIMED_ROWS`` together, over all sets in turns."""
        sets, us = self.sets(case), 0.0
        least_us = case.workload.bytes_moved(MAX_ROWS, CACHE_LENGTH, case.dtype.itemsize) / gm.FASTEST_READ
        for rows in TIMED_ROWS:
            some = [first_rows(case.op, arguments, rows) for arguments in sets]
            calls = [partial(launcher(case.op), *positional, **named) for positional, named in some]
            with configured_by(lambda *_: config):
                us += gm.time_graph(calls, gm.repetitions_for(len(sets), least_us)).p50
        return us


# ---- the search


@dataclass
class Found:
    """What is known of a case."""

    default: LaunchConfig  # the architecture's, against which the others are held
    us: dict[LaunchConfig, float] = field(default_factory=dict)  # of those that are right, over all of TIMED_ROWS
    counts: Counter[str] = field(default_factory=Counter)  # how many were tried to what end

    @property
    def best(self) -> LaunchConfig | None:
        """The fastest; the default where none is faster by more than ``TIE``; None where the default does not serve."""
        if self.default not in self.us:
            return None
        best = min(self.us, key=self.us.__getitem__)
        return best if self.us[best] < (1 - TIE) * self.us[self.default] else self.default

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        if self.best is None:
            return f"nothing ({counts})"
        default, best = (f"{each[:3]} {self.us[each]:.1f} us" for each in (self.default, self.best))
        return f"{default} -> {best}, {self.us[self.default] / self.us[self.best] - 1:+.1%} ({counts})"


def attempt(bench: Workbench, case: Case, config: LaunchConfig, found: Found) -> None:
    """Check a candidate and time it."""
    found.counts["tried"] += 1
    try:
        if bench.is_right(case, config, found.default):
            found.us[config] = bench.time(case, config)
        else:
            found.counts["rejected"] += 1
    except Exception as error:  # compilers, drivers and launches have many ways to refuse
        found.counts[f"failed by {type(error).__name__}"] += 1


def search(
    candidates: Mapping[Case, Sequence[LaunchConfig]], bench: Workbench, seconds: float, found: dict[Case, Found]
) -> None:
    """Try the default of every case, then the second candidate of every case, until the time is over.

    ``found`` holds what there is, also when the search is interrupted.
    """
    began = time.monotonic()
    for turn in range(max(map(len, candidates.values()))):
        for case, configs in candidates.items():
            if time.monotonic() - began >= seconds:
                return
            if turn < len(configs) and (not turn or found[case].best):
                attempt(bench, case, configs[turn], found.setdefault(case, Found(configs[0])))


# ---- the file

Rules = dict[str, list[dict[str, Any]]]


def merge_rules(existing: Rules, found: Mapping[Case, LaunchConfig | None]) -> Rules:
    """The existing rules without those of the cases that were found; in front of the others, what beat the default."""
    merged = dict(existing)
    for case, config in found.items():
        others = [rule for rule in merged.get(case.op, []) if {**rule, **case.key} != rule or "max_n" in rule]
        won = [{**case.key, **{name: value for name, value in config._asdict().items() if value}}] if config else []
        merged[case.op] = won + others
    return {op: rules for op, rules in merged.items() if rules}


def read_rules(path: Path) -> Rules:
    """A file's rules, none where there is no file; refused where it holds something else or could not be written."""
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        refuse(NAME, f"{path} cannot be written; give another --out.")
    try:
        rules = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError):
        rules = None
    if not isinstance(rules, dict) or not all(isinstance(value, list) for value in rules.values()):
        refuse(NAME, f"{path} does not map operations to lists of rules; mend it or give another --out.")
    return rules


def main(
    minutes: Annotated[float, typer.Option(help="The time limit.")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default the GPU's own of configs/.")] = None,
) -> None:
    """Sweep launch configurations within a time limit and write those faster than the defaults, bit for bit equal."""
    require_time(NAME, "--minutes", minutes)
    if not torch.cuda.is_available():
        refuse(NAME, "tuning needs a CUDA GPU and there is none here.")
    device = torch.device("cuda", torch.cuda.current_device())
    card = read_card(device)
    path = out or launch_config.configs_folder() / launch_config.file_name(card.name)
    existing = read_rules(path)
    candidates = {case: find_candidates(case, card) for case in find_cases(MODELS)}
    found, interrupted = dict[Case, Found](), False
    try:
        with torch.inference_mode():
            search(candidates, Workbench(device, card), 60 * minutes, found)
    except KeyboardInterrupt:
        interrupted = True
    won = {case: None if each.best == each.default else each.best for case, each in found.items() if each.best}
    rules = merge_rules(existing, won)
    for case in candidates:
        typer.echo(f"{case}: {found.get(case, 'not reached; more --minutes may')}")
    if rules != existing:
        write_json(path, rules)
    count = sum(config is not None for config in won.values())
    typer.echo(f"{NAME}: {count} of {len(won)} shapes are faster than by default; {path} says how.", err=True)
    if interrupted or not won:
        raise typer.Exit(INTERRUPTED if interrupted else INCOMPLETE)


if __name__ == "__main__":
    typer.run(main)
