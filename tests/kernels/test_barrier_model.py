"""The barrier of ``draft_loop`` in every order that three programs may come in.

The programs call the functions of ``shared/grid.py`` themselves, on a memory of one processor. A program is run up to
its next access, again and again from the beginning of its stage, with what it has read in this stage so far. So a state
is the memory, and of each program its stage and what it has read in it, and all states can be visited.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from kangaroo_kernels.shared import grid

PROGRAMS, STAGES = 3, 3
POLLS = 2
"""Looks at the counter: in some orders a program gives up early, as it would after a second on a GPU."""

COUNTER, LEFT, ERROR, BROKEN = (getattr(grid, name).value for name in ("COUNTER", "LEFT", "ERROR", "BROKEN"))
PLACES = (COUNTER, LEFT, ERROR, *(-1 - index for index in range(PROGRAMS)))
"""Words of the grid's state, and what each program has written: how many stages."""

NEW = (0,) * len(PLACES)
ALL_DONE = (0, 0, 0, *[STAGES] * PROGRAMS)
ENDED = STAGES

Memory = tuple[int, ...]


class AccessError(Exception):
    """A program has come to an access that it has not done yet: ``access(memory)`` does it and says what it read."""

    def __init__(self, access: Callable[[dict[int, int]], int]) -> None:
        self.access = access


class State(NamedTuple):
    """Where all programs are: ``(stage, what was read in it)`` of each."""

    memory: Memory
    programs: tuple[tuple[int, tuple[int, ...]], ...]


class Machine:
    """Stands for ``tl`` in ``grid``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **instead: Any) -> None:
        self.known: list[int] = []
        names = ("is_whole", "arrive", "wait", "leave", "is_last")
        self.barrier = SimpleNamespace(**{name: instead.get(name, getattr(grid, name).fn) for name in names})
        monkeypatch.setattr(grid, "tl", self)
        for name in ("COUNTER", "LEFT", "ERROR", "BROKEN"):
            monkeypatch.setattr(grid, name, globals()[name])

    def access(self, do: Callable[[dict[int, int]], int]) -> int:
        """What the program read, or the end of its run for now."""
        if self.known:
            return self.known.pop(0)
        raise AccessError(do)

    def change(self, at: int, new: Callable[[int], int], is_read: bool) -> int:
        def do(memory: dict[int, int]) -> int:
            old, memory[at] = memory[at], new(memory[at])
            return old if is_read else 0

        return self.access(do)

    def atomic_add(self, at: int, value: int, sem: str = "acq_rel") -> int:
        return self.change(at, lambda old: old + value, sem != "release")  # nobody looks at what a release read

    def atomic_max(self, at: int, value: int) -> int:
        return self.change(at, lambda old: max(old, value), is_read=False)

    def store(self, at: int, value: int) -> None:
        self.change(at, lambda old: value, is_read=False)

    def debug_barrier(self) -> None:
        """A program has one thread here."""

    def work(self, index: int, stage: int) -> None:
        """Read what all have written in the stage before, and write."""

        def do(memory: dict[int, int]) -> int:
            assert all(memory[-1 - other] >= stage for other in range(PROGRAMS)), "it reads what is not written yet"
            memory[-1 - index] = stage + 1
            return 0

        self.access(do)

    def stage(self, index: int, stage: int) -> int:
        """A stage of a program as ``draft_loop`` has it; returns the next one."""
        if stage == 0 and not self.barrier.is_whole(0):
            return ENDED
        self.work(index, stage)
        if stage == STAGES - 1:
            self.barrier.leave(0, PROGRAMS)
            return ENDED
        self.barrier.arrive(0)
        return stage + 1 if self.barrier.wait(0, (stage + 1) * PROGRAMS, POLLS, stage + 1) else ENDED

    def ends(self, memory: Memory = NEW, missing: int = 0) -> set[Memory]:
        """Every memory that is left when all have ended; the last ``missing`` programs never come."""
        seen, found = set[State](), set[Memory]()
        left = [State(memory, ((0, ()),) * (PROGRAMS - missing))]
        while left:
            state = left.pop()
            if state in seen:
                continue
            seen.add(state)
            if all(stage == ENDED for stage, _ in state.programs):
                found.add(state.memory)
            for index, (stage, read) in enumerate(state.programs):
                if stage != ENDED:
                    cells, now = dict(zip(PLACES, state.memory, strict=True)), list(state.programs)
                    self.known = list(read)
                    try:
                        now[index] = (self.stage(index, stage), ())
                    except AccessError as stopped:
                        now[index] = (stage, (*read, stopped.access(cells)))
                    left.append(State(tuple(cells.values()), tuple(now)))
        return found


class Counting(Machine):
    """Every program leaves a part and arrives at a counter; the last one merges all parts. ``LEFT`` counts merges."""

    def stage(self, index: int, stage: int) -> int:
        def leave_part(memory: dict[int, int]) -> int:
            memory[-1 - index] += 1
            return 0

        def merge(memory: dict[int, int]) -> int:
            memory[LEFT] += 1
            parts = {memory[-1 - other] for other in range(PROGRAMS)}
            assert parts == {memory[LEFT]}, "it merges a part that is not there, or merges twice"
            return 0

        self.access(leave_part)
        if self.barrier.is_last(COUNTER, PROGRAMS):
            self.access(merge)
        return ENDED


def check_counting(machine: Counting, launches: int = 3) -> None:
    """One after the other, as a graph that is replayed: each merges once, after all have left their parts."""
    memory = NEW
    for launch in range(1, launches + 1):
        ends = machine.ends(memory)
        memory = (0, launch, 0, *[launch] * PROGRAMS)
        assert ends == {memory}


def check(machine: Machine) -> None:
    """Nobody reads too early, whoever comes first; all is done and the state as before, or an error word says no."""
    ends = machine.ends()
    assert ALL_DONE in ends
    for counter, left, error, *_ in ends - {ALL_DONE}:
        assert counter >= BROKEN
        assert left < PROGRAMS
        assert 1 <= error < STAGES


def test_all_stages_or_an_error(monkeypatch):
    check(Machine(monkeypatch))


def test_a_lost_program_is_an_error_in_every_order(monkeypatch):
    """The others give up at the first barrier, or come too late to begin; no later launch does anything."""
    machine = Machine(monkeypatch)
    ends = machine.ends(missing=1)
    for end in ends:
        assert end[0] >= BROKEN
        assert end[1:3] == (0, 1)
        assert machine.ends(end) == {end}


def test_the_last_to_arrive_merges(monkeypatch):
    check_counting(Counting(monkeypatch))


def test_a_part_that_never_comes_is_merged_by_nobody(monkeypatch):
    """The counter stays up, so what comes after a launch that was cut off must begin by clearing it."""
    machine = Counting(monkeypatch)
    (end,) = machine.ends(missing=1)
    assert end[:2] == (PROGRAMS - 1, 0)
    with pytest.raises(AssertionError):
        machine.ends(end)


def last_without_reset(counter: int, programs: int) -> bool:
    return grid.tl.atomic_add(counter, 1) == programs - 1


def last_that_resets_first(counter: int, programs: int) -> bool:
    last = grid.tl.atomic_add(counter, 0) == programs - 1
    grid.tl.atomic_add(counter, 1 - programs if last else 1)
    return last


@pytest.mark.parametrize(
    "broken",
    [
        last_without_reset,
        last_that_resets_first,
        lambda counter, programs: grid.is_last.fn(counter, programs - 1),
        lambda counter, programs: grid.tl.atomic_add(counter, 1) == 0,
        lambda counter, programs: False,
    ],
)
def test_a_broken_counter_is_found(monkeypatch, broken):
    with pytest.raises(AssertionError):
        check_counting(Counting(monkeypatch, is_last=broken))


def leave_without_reset(state: int, programs: int) -> None:
    grid.tl.atomic_add(state + LEFT, 1)


def first_resets(state: int, programs: int) -> None:
    if grid.tl.atomic_add(state + LEFT, 1) == 0:
        grid.tl.store(state + COUNTER, 0)
        grid.tl.store(state + LEFT, 0)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("arrive", lambda state: None),
        ("arrive", lambda state: grid.tl.atomic_add(state + COUNTER, 2, sem="release")),
        ("wait", lambda state, arrivals, polls, cause: True),
        ("wait", lambda state, arrivals, polls, cause: grid.wait.fn(state, arrivals - 1, polls, cause)),
        ("leave", leave_without_reset),
        ("leave", first_resets),
    ],
)
def test_a_broken_barrier_is_found(monkeypatch, name, broken):
    with pytest.raises(AssertionError):
        check(Machine(monkeypatch, **{name: broken}))
