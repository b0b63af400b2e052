"""The search for launch configurations: what is tried of each operation, what is refused, and what is fastest."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import gpu_measure as gm
import torch
from gpu_card import Card
from right import ALLOWED, first_rows, launcher, relative_error, row_operands, same_bits, written

from kangaroo_kernels import launch_config
from kangaroo_kernels.attention import TILE_BYTES
from kangaroo_kernels.contract import MAX_ROWS
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.operation import Arguments
from kangaroo_kernels.shared.tiles import K_STEP_BYTES
from kangaroo_kernels.workloads import ModelShape, Settings, Workload, workloads

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_ROWS, TIMED_ROWS = (1, 5, 16), (1, 8)
CACHE_LENGTH = 4096
"""Positions that attention is tuned for."""

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), range(2, 9)
TIE = 0.01
"""Times within this share are equal: who ties at one row is told apart at eight."""

SWEEP_ROUNDS, REPLAY_US = 11, 1000.0
"""Timed replays of every candidate; the side by side of two has the benchmarks' number."""

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


def find_cases(models: Sequence[ModelShape], dtype: torch.dtype) -> list[Case]:
    """The operations of some models, each shape once: ``n`` and ``k`` as their launchers ask; no kernel is launched."""
    cases: dict[tuple[str, int, int], Case] = {}

    def note(workload: Workload, op: str, n: int, k: int, dtype: torch.dtype) -> LaunchConfig:
        cases.setdefault((op, n, k), Case(op, n, k, str(dtype).removeprefix("torch."), workload))
        raise _AskedError

    for workload in (workload for model in models for workload in workloads(model)):
        positional, named = workload.make(Settings(1, CACHE_LENGTH, dtype, torch.device("meta")))
        try:
            with configured_by(partial(note, workload)):
                launcher(workload.op)(*positional, **named)
        except _AskedError:
            pass
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
    candidates = [
        LaunchConfig(num_warps, num_stages, block_n)
        for num_warps in WARPS
        for num_stages in STAGES
        for block_n in (BLOCKS if default.block_n else (0,))
        # one tile is in use and the others under way; the copies of all but one lie there at any time
        if (num_stages - 1) * stage_bytes(case, block_n) <= card.shared_bytes
    ]

    def unlike(candidate: LaunchConfig) -> tuple[bool, float]:
        steps = abs(math.log2(candidate.block_n / default.block_n)) if default.block_n else 0.0
        return candidate.num_warps != default.num_warps, steps + abs(candidate.num_stages - default.num_stages)

    return [default, *sorted((candidate for candidate in candidates if candidate != default), key=unlike)]


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
                count = gm.sets_needed(set_bytes, self.card.l2_bytes, torch.cuda.mem_get_info(self.device)[0])
            self._sets[case] = [case.workload.make(settings) for _ in range(count)]
        return self._sets[case]

    def check(self, case: Case, config: LaunchConfig) -> str:
        """Hold a candidate's bits against the default's, and its numbers against the reference, on fresh inputs.

        Returns:
            Why it must not be used; an empty string if it may be.
        """
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

    def time(self, case: Case, config: LaunchConfig, rounds: int) -> tuple[float, ...]:
        """Microseconds of a call at each of ``TIMED_ROWS``, over all sets in turns."""
        sets, kernel = self.sets(case), launcher(case.op)
        least_us = case.workload.bytes_moved(MAX_ROWS, CACHE_LENGTH, DTYPES[case.dtype].itemsize) / 5e6  # at 5 TB/s
        times = []
        for rows in TIMED_ROWS:
            some = [first_rows(case.op, arguments, rows) for arguments in sets]
            calls = [partial(kernel, *positional, **named) for positional, named in some]
            with configured_by(lambda *_: config):
                times.append(gm.time_graph(calls, gm.repetitions_for(len(sets), least_us, REPLAY_US), rounds).p50)
        return tuple(times)


def fixed_bits(results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What no configuration may change: of a head (which gives tokens) the tokens, else everything."""
    tokens = [result for result in results if not result.is_floating_point()]
    return tokens or list(results)


# ---- the search


class Trial(NamedTuple):
    """A candidate and the microseconds of its call at each of ``TIMED_ROWS``."""

    config: LaunchConfig
    us: tuple[float, ...]


class Found:
    """What is known of a case: its default, the best so far, and why others are neither.

    Attributes:
        default: None until it was tried.
        best: the fastest that is right; None where the default itself does not serve.
        refused: reasons by configuration.
    """

    def __init__(self) -> None:
        self.default: Trial | None = None
        self.best: Trial | None = None
        self.tried, self.refused = 0, dict[LaunchConfig, str]()


def faster(one: Trial, other: Trial) -> bool:
    """Whether it is at one row by more than ``TIE``, or within it at one row and by more at eight."""
    ratios = [mine / theirs for mine, theirs in zip(one.us, other.us, strict=True)]
    return ratios[0] < 1 - TIE or (ratios[0] <= 1 + TIE and ratios[1] < 1 - TIE)


def attempt(bench: Workbench, case: Case, config: LaunchConfig, found: Found) -> None:
    """Check a candidate, time it, and where it seems faster than the best, time both again side by side."""
    found.tried += 1
    try:
        if reason := bench.check(case, config):
            found.refused[config] = f"rejected: {reason}"
            return
        trial = Trial(config, bench.time(case, config, SWEEP_ROUNDS))
        if found.best is None:
            found.default = found.best = trial
        elif faster(trial, found.best):
            best, trial = (Trial(each.config, bench.time(case, each.config, gm.ROUNDS)) for each in (found.best, trial))
            found.default = best if found.best is found.default else found.default
            found.best = trial if faster(trial, best) else best
    except Exception as error:  # compilers, drivers and launches have many ways to refuse
        found.refused[config] = f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def search(
    candidates: Mapping[Case, Sequence[LaunchConfig]],
    bench: Workbench,
    seconds: float,
    found: dict[Case, Found],
    clock: Callable[[], float],
) -> None:
    """Try the default of every case, then the second candidate of every case, until the time is over.

    ``found`` holds what there is, also when the search is interrupted. Where a default does not serve there is nothing
    to hold the others against, and they are left out.
    """
    began = clock()
    for turn in range(max(map(len, candidates.values()))):
        for case, configs in candidates.items():
            left = seconds - (clock() - began)
            if left <= 0:
                return
            if turn < len(configs) and (not turn or found[case].best):
                if sys.stderr.isatty():
                    print(f"\r{left:4.0f} s left  {case!s:60}", end="", file=sys.stderr)
                attempt(bench, case, configs[turn], found.setdefault(case, Found()))


def result_of(case: Case, found: Found) -> dict[str, Any]:
    """A case for people and for JSON."""

    def figures(trial: Trial | None) -> dict[str, Any] | None:
        return trial and {**trial.config._asdict(), "us": dict(zip(map(str, TIMED_ROWS), trial.us, strict=True))}

    reasons = list(found.refused.values())
    return {
        "op": case.op,
        **case.key,
        "default": figures(found.default),
        "best": figures(found.best),
        "tried": found.tried,
        "rejected": sum(reason.startswith("rejected") for reason in reasons),
        "failed": sum(reason.startswith("failed") for reason in reasons),
        "refused": {str(tuple(config)): reason for config, reason in found.refused.items()},
    }
