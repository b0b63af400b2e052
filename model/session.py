"""One text's memory: the caches, the buffers and the graphs captured over them, and the text that is being written.

A ``Kangaroo`` holds the weights and gives out sessions; each is independent of the others. A step of a text is
exclusive: the texts of one model take turns, whichever threads they are read from.
"""

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import torch

from .drafters.protocol import Drafter
from .errors import KangarooError, is_out_of_memory
from .loop.device import device_steps
from .loop.graphs import GraphRunner
from .loop.host import kangaroo_steps, plain_steps
from .loop.iteration import Iteration
from .loop.pace import pace_of
from .loop.prefill import prefill, reach_of
from .loop.state import TextState, Written
from .request import Request, Settings
from .results import Commit, Generation, Outcome, Progress
from .target.llama import Llama
from .text import TextStream
from .writer import BothWays, Messages, Prompt, Writer

if TYPE_CHECKING:
    from .kangaroo import Kangaroo


class Memory:
    """What one text needs besides the weights.

    Args:
        target: the model.
        drafter: what drafts for it; None without one.
        graphs: whether a GPU's iterations are captured.

    Attributes:
        cache: the target's keys and values.
        drafter_memory: what ``Drafter.new_memory`` made; None without a drafter.
        runner: holds the device's buffers and graphs, and counts their bytes.
        text: the one that the caches hold; None before the first.
    """

    def __init__(self, target: Llama, drafter: Drafter | None, graphs: bool) -> None:
        self.cache = target.new_cache()
        self.drafter_memory = None if drafter is None else drafter.new_memory()
        self.runner = GraphRunner(target.device, graphs)
        self.text: TextState | None = None
        self._target_holds: Written | None = None
        self._drafter_holds: Written | None = None  # an earlier text, where the last one was decoded plainly
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory: caches, buffers, and what captured graphs took."""
        own = self.cache.nbytes + getattr(self.drafter_memory, "nbytes", 0)
        return own + self.runner.buffer_bytes + self.runner.captured_bytes

    @property
    def held(self) -> Written:
        """The text before, as far as the target's cache holds it."""
        return self._target_holds or Written((), [])

    def forget(self) -> None:
        """Let the next text begin anew, whatever the caches hold."""
        self._target_holds = self._drafter_holds = None

    def begin(self, kangaroo: "Kangaroo", request: Request, outcome: Outcome) -> Iterator[Commit]:
        """Fill the caches for a request and return the loop that writes it; the text before it ends.

        What both texts begin with stays in the caches. Where there is no memory left, that of the texts before is let
        go.
        """
        kept = self._kept(kangaroo.drafter if request.max_drafts else None, request)
        try:
            return self._begin(kangaroo, request, outcome, kept)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not kangaroo.forget_idle() and not kept:
                raise
        return self._begin(kangaroo, request, outcome, 0)

    def _kept(self, drafter: Drafter | None, request: Request) -> int:
        """How many tokens of a request all caches hold from the texts before.

        Of the text before, the last three tokens are left out: the loops have run at least the others through target
        and adapter, drafting or not, so a text decoded plainly and one with drafts begin at the same place. Of the new
        one, the last two: the first step reads the exit layer's output before the newest token.
        """
        tokens, holders = request.tokens[:-2], [self._target_holds]
        if drafter is not None:
            holders.append(self._drafter_holds)
        kept = min(0 if held is None else held.shared(tokens) for held in holders)
        if not kept or not self.cache.serves(request.length):
            return 0
        return kept if drafter is None else min(kept, drafter.keep(self.drafter_memory, kept, request.length))

    def _begin(self, kangaroo: "Kangaroo", request: Request, outcome: Outcome, kept: int) -> Iterator[Commit]:
        """The loop is on the device where the backend is resident and the request allows it; else the host leads it."""
        target, drafter = kangaroo.target, kangaroo.drafter if request.max_drafts else None
        self._target_holds = None  # a prefill that does not come to its end leaves nothing to rely on
        if drafter is not None:
            self._drafter_holds = None
        self.text = text = TextState(list(request.tokens), self.cache, self.drafter_memory)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # what another thread's stream still writes here comes first
        if reach_of(request.length) > self.cache.capacity:
            self.runner.clear()  # it may hold the old cache, which goes before the new one comes
        prefill(target, drafter, text, request.length, kept)
        outcome.stats.cached_tokens, outcome.stats.prefilled_tokens = kept, text.newest - kept
        self._target_holds = Written(request.tokens, outcome.tokens)
        if drafter is not None:
            self._drafter_holds = self._target_holds
        if target.backend.resident and not request.led_by_host:
            iteration = Iteration(target, drafter, text, request, self.runner)
            pace = pace_of(request, drafter, kangaroo.paces, on_the_device=True) if drafter and iteration.auto else None
            return device_steps(iteration, length=request.length, pace=pace)
        if drafter is None:
            return plain_steps(target, text, request)
        return kangaroo_steps(target, drafter, text, request, pace_of(request, drafter, kangaroo.paces))

    def follow_stream(self) -> None:
        """Let this thread's stream wait for the one that the last step ran on, if it is another one."""
        if self.runner.device.type == "cuda":
            current = torch.cuda.current_stream(self.runner.device)
            if self._stream is not None and self._stream != current:
                current.wait_stream(self._stream)
            self._stream = current


class Session(Writer):
    """One text after another, each in the same memory. ``Kangaroo.session`` makes one.

    Beginning a text ends the one before: its next step raises. Texts that are to grow side by side need a session each.
    What a text begins with as the one before it did stays in the caches, so each turn of a conversation runs only what
    is new (``DecodeStats.cached_tokens`` counts the rest).

    Attributes:
        memory: caches, buffers and graphs; its ``runner`` counts the graphs.
    """

    def __init__(self, kangaroo: "Kangaroo", memory: Memory) -> None:
        self._kangaroo, self.memory = kangaroo, memory

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the session takes; the weights are not among them."""
        return self.memory.nbytes

    @property
    def held(self) -> Written:
        """The text before, as far as the caches hold it: what a next text may begin with."""
        return self.memory.held

    def write(self, request: Request) -> "Writing":
        """As ``progress``, for what ``Kangaroo.resolve`` has made already."""
        return Writing(self._kangaroo, request, lambda: self.memory)

    def _write(self, prompt: Prompt | None, messages: Messages | None, settings: Settings) -> "Writing":
        return self.write(self._kangaroo.resolve(prompt, settings, messages))


class Writing(BothWays[Progress]):
    """A text that is being written: an iterator over its steps that any thread may read, one step at a time.

    Args:
        kangaroo: the model.
        request: what was asked for.
        borrow: gives the memory when the first step is taken.
        give_back: takes it when the text has ended, in whatever way.

    Attributes:
        outcome: the text so far, its counts and its times.
    """

    def __init__(
        self,
        kangaroo: "Kangaroo",
        request: Request,
        borrow: Callable[[], Memory],
        give_back: Callable[[Memory], None] = lambda memory: None,
    ) -> None:
        self.outcome = Outcome(seed=request.sampling.seed, logprobs=None if request.logprobs is None else [])
        self._turn = threading.RLock()
        self._steps = _steps(kangaroo, request, self.outcome, borrow, give_back)

    def __next__(self) -> Progress:
        with self._turn:
            try:
                return next(self._steps)
            except StopIteration:
                raise
            except BaseException:
                self.outcome.end("error")
                raise

    def finish(self) -> Generation:
        """Write the text to its end and return all of it."""
        for _ in self:
            pass
        return self.outcome.generation()

    def close(self) -> None:
        """End the text where it is; its memory is free for another one. A step under way is waited for."""
        with self._turn:
            self._steps.close()
            self.outcome.end("abort")


def _steps(
    kangaroo: "Kangaroo",
    request: Request,
    outcome: Outcome,
    borrow: Callable[[], Memory],
    give_back: Callable[[Memory], None],
) -> Generator[Progress, None, None]:
    """Write a request in memory that is borrowed for it.

    The generator does not know its ``Writing``, so a text that nobody holds any more ends at once.
    """
    memory = borrow()
    try:
        commits = _commits(kangaroo, request, outcome, memory)
        text = TextStream(kangaroo.tokenizer, request.stop_strings, request.tokens, request.min_new_tokens)
        yield from _pieces(commits, text, request, outcome)
    finally:
        give_back(memory)


def _commits(kangaroo: "Kangaroo", request: Request, outcome: Outcome, memory: Memory) -> Iterator[Commit]:
    """The commits of a request, timed; each step has the model for itself."""
    stats, device = outcome.stats, kangaroo.target.device
    with kangaroo.step():
        began = time.perf_counter()
        steps = memory.begin(kangaroo, request, outcome)
        text = memory.text
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the first step's time must not include the prefill's
        stats.prefill_seconds = time.perf_counter() - began
    while True:
        with kangaroo.step():
            if memory.text is not text:
                raise KangarooError(
                    "another text was begun in this session before this one ended; a session holds one at a time, so "
                    "take a second one."
                )
            memory.follow_stream()
            began, processor = time.perf_counter(), time.process_time()
            try:
                commit = next(steps, None)
            except BaseException:
                memory.forget()  # what failed, or Ctrl-C cut short, may have left anything in the caches
                raise
            stats.decode_seconds += time.perf_counter() - began
            stats.processor_seconds += time.process_time() - processor
        if commit is None:
            return
        yield commit


def _pieces(commits: Iterator[Commit], text: TextStream, request: Request, outcome: Outcome) -> Iterator[Progress]:
    """Every step with its text; ``outcome`` is up to date with each."""
    deadline = math.inf if request.timeout is None else time.monotonic() + request.timeout
    full = "context" if request.limited_by_context else "length"
    for step in commits:
        pieces = []
        for token in step.tokens:
            pieces.append(text.push(token))
            if text.stopped:
                break
        commit = step if len(pieces) == len(step.tokens) else step.cut(len(pieces))
        outcome.add(commit)
        reason = None
        if commit.stopped or text.stopped:
            reason = "stop"
        elif len(request.tokens) + len(outcome.tokens) == request.length:
            reason = full
        elif time.monotonic() >= deadline:
            reason = "timeout"
        if reason is not None:
            pieces[-1] += text.finish()
            if text.stopped:  # by the text that was held back until now
                reason = "stop"
            outcome.end(reason)
        outcome.text += "".join(pieces)
        yield Progress(commit, pieces, outcome)
        if reason is not None:
            return
    outcome.end(full)  # the prompt left no room for a step
