"""Programs of a kernel side by side in Triton's interpreter, which by itself runs one to its end, then the next.

At every atomic, before it and after it, another program may go on, as chance has it. So a barrier across the grid
works, and a program that should have waited at one, and did not, finds what the others have not written yet. Memory is
that of one processor: what a fence orders on a GPU is ordered here without it.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

MOST_SWITCHES = 200_000
"""Far more than any test needs: programs that wait for each other for ever are an error."""


class Programs:
    """Runs a function once for every program of a grid, in threads of which one at a time goes on."""

    def __init__(self, grid: tuple[int, int, int], seed: int) -> None:
        self.places = [*product(*map(range, grid))]
        self.waiting = set(range(len(self.places)))
        self.draw = random.Random(seed)
        self.changed = threading.Condition()
        self.errors: list[BaseException] = []
        self.switches = 0
        self.now: int | None = None

    def run(self, work: Callable[[], object]) -> None:
        """All programs to their ends; the first error of any of them is raised."""
        threads = [threading.Thread(target=self._program, args=(index, work)) for index in sorted(self.waiting)]
        for thread in threads:
            thread.start()
        with self.changed:
            self._next()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _program(self, index: int, work: Callable[[], object]) -> None:
        with self.changed:
            self._wait(index)
            try:
                if not self.errors:
                    work()
            except BaseException as error:
                self.errors.append(error)
            self.waiting.discard(index)
            self._next()

    def switch(self) -> None:
        """Let chance say who goes on; the caller, if it is not the one, waits."""
        me = self.now
        assert me is not None
        self.switches += 1
        if self.errors or self.switches > MOST_SWITCHES:
            raise RuntimeError("programs wait for each other for ever, or one of them failed.")
        self._next()
        self._wait(me)

    def _next(self) -> None:
        self.now = self.draw.choice(sorted(self.waiting)) if self.waiting else None
        self.changed.notify_all()

    def _wait(self, index: int) -> None:
        self.changed.wait_for(lambda: self.now == index)
        interpreter.interpreter_builder.set_grid_idx(*self.places[index])


@contextmanager
def side_by_side(seed: int) -> Iterator[list[int]]:
    """Within it, launches run so; yields a list that gets the number of switches of each."""
    builder, switches = interpreter.interpreter_builder, []
    running: list[Programs] = []
    atomic = builder.create_atomic_rmw

    def switching(*args: Any) -> Any:
        running[-1].switch()
        result = atomic(*args)
        running[-1].switch()
        return result

    def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        names = executor.arg_names
        host, named = executor._init_args_hst(args, {name: kwargs[name] for name in kwargs if name in names})
        given = dict(zip(names, host, strict=False)) | named
        arguments = {n: v if n in executor.constexprs else interpreter._implicit_cvt(v) for n, v in given.items()}
        grid = (*executor.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        running.append(Programs(grid, seed))
        scope = interpreter._patch_lang(executor.fn)
        try:
            running[-1].run(lambda: executor.fn(**arguments))
        finally:
            scope.restore()
            switches.append(running.pop().switches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_atomic_rmw", switching)
        patch.setattr(GridExecutor, "__call__", launch)
        yield switches
