"""The graph runner: when work runs as it is, when it is captured, and what drops a graph."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kangaroo_kernels.model.loop import graphs
from kangaroo_kernels.model.loop.graphs import GraphRunner, no_garbage_collection

CPU = torch.device("cpu")


class FakeGraph:
    """Replays by calling the work again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> GraphRunner:
    """A runner that captures, on a machine that cannot; it counts what was captured and how often it waited."""
    made = GraphRunner(CPU)
    made.captures, made.captured, made.waits = True, [], 0

    def capture(work: Callable[[], None]) -> FakeGraph:
        made.captured.append(work)
        return FakeGraph(work)

    def wait(device: torch.device) -> None:
        made.waits += 1

    monkeypatch.setattr(made, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return made


def test_work_runs_once_a_call(runner):
    """As it is the first time, captured the second: capturing launches nothing, so the graph is replayed at once."""
    ran = []
    for calls in range(1, 5):
        assert runner.run("key", lambda: ran.append(None)) == (calls > 2)  # nothing is compiled or captured any more
        assert len(ran) == calls
        assert len(runner.captured) == runner.graphs == (calls > 1)


def test_work_that_failed_was_not_run(runner):
    """Its kernels may not be compiled yet, and a capture must not compile them."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run("key", interrupted)
    runner.run("key", lambda: None)
    assert runner.graphs == 0
    runner.run("key", lambda: None)
    assert runner.graphs == 1


def test_keys_have_graphs_of_their_own(runner):
    ran = []
    for key in "abab":
        runner.run(key, lambda key=key: ran.append(key))
    assert "".join(ran) == "abab"
    assert runner.graphs == 2
    runner.run("a", lambda: ran.append("a new work under an old key is not looked at"))
    assert ran[-1] == "a"


def test_a_cpu_runs_everything_as_it_is():
    runner, ran = GraphRunner(CPU), []
    for calls in range(1, 4):
        assert runner.run("key", lambda: ran.append(None)) == (calls > 1)
    assert len(ran) == 3
    assert runner.graphs == runner.captured_bytes == 0
    assert not runner.captures


def test_capture_may_be_off():
    assert not GraphRunner(torch.device("cuda"), capture=False).captures
    assert GraphRunner(torch.device("cuda")).captures


def test_the_graph_that_ran_longest_ago_goes(runner, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    for key in "aabb":
        runner.run(key, lambda: None)
    runner.run("a", lambda: None)  # b is the older one now
    for key in "cc":
        runner.run(key, lambda: None)
    assert (runner.graphs, runner.waits) == (2, 1)
    captured = len(runner.captured)
    runner.run("a", lambda: None)
    assert len(runner.captured) == captured
    assert not runner.run("b", lambda: None)  # compiled long ago, so captured at once
    assert len(runner.captured) == captured + 1


def test_buffers_stay_where_they_are(runner):
    buffer = runner.buffer("text", (4,), torch.int64)
    assert buffer.tolist() == [0] * 4
    buffer[1] = 7
    for _ in range(2):
        runner.run("key", lambda: None)
    again = runner.buffer("text", (4,), torch.int64)
    assert again.data_ptr() == buffer.data_ptr()
    assert again.tolist() == [0, 7, 0, 0]
    runner.buffer("more", (2, 3), torch.float32)  # a new one is no reason
    assert runner.graphs == 1
    assert runner.buffer_bytes == 4 * 8 + 6 * 4


@pytest.mark.parametrize(("shape", "dtype"), [((5,), torch.int64), ((4,), torch.int32)])
def test_a_buffer_of_another_shape_drops_the_graphs(runner, shape, dtype):
    runner.buffer("text", (4,), torch.int64)
    for _ in range(2):
        runner.run("key", lambda: None)
    fresh = runner.buffer("text", shape, dtype)
    assert (fresh.shape, fresh.dtype) == (torch.Size(shape), dtype)
    assert (runner.graphs, runner.waits) == (0, 1)
    ran = []
    runner.run("key", lambda: ran.append(None))
    assert (len(ran), runner.graphs) == (1, 0)  # as it is again: new shapes may compile new kernels


def test_memory_of_others_that_moves_drops_the_graphs(runner):
    cache, other = torch.zeros(4), torch.zeros(4)
    runner.rely_on("cache", cache)
    for _ in range(2):
        runner.run("key", lambda: None)
    runner.rely_on("cache", cache)
    runner.rely_on("adapter", other)  # named for the first time: no graph has read it
    assert runner.graphs == 1
    runner.rely_on("cache", torch.zeros(4))
    assert runner.graphs == 0
    for _ in range(2):
        runner.run("key", lambda: None)
    runner.rely_on("adapter", other)
    assert runner.graphs == 1


def test_memory_of_others_that_changes_shape_drops_the_graphs(runner):
    """A cache that grew may begin where the old one did."""
    memory = torch.zeros(8)
    for shape, kept in (((2, 2), 1), ((2, 2), 1), ((2, 4), 0)):
        runner.rely_on("cache", memory[: shape[0] * shape[1]].view(shape))
        if shape == (2, 2):
            for _ in range(2):
                runner.run("key", lambda: None)
        assert runner.graphs == kept


def test_what_is_kept_goes_with_the_graphs(runner):
    made = []
    for _ in range(2):
        assert runner.keep("loop", lambda: made.append(None) or len(made)) == 1
    assert runner.keep("another", lambda: 7) == 7
    runner.clear()
    assert runner.keep("loop", lambda: made.append(None) or len(made)) == 2


def test_garbage_waits_for_the_capture():
    assert gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with no_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_capture_runs_on_the_runners_own_gpu(monkeypatch):
    """PyTorch's own stream for captures belongs to the GPU that captured first."""
    streams = []

    @contextmanager
    def capture(graph: object, stream: object = None, **how: object) -> Iterator[None]:
        streams.append(stream)
        yield

    for name, stand_in in {
        "graph": capture,
        "CUDAGraph": lambda: FakeGraph(lambda: None),
        "Stream": lambda device: (device, object()),
        "graph_pool_handle": object,
        "memory_reserved": lambda device: 0,
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    first, second = (GraphRunner(torch.device("cuda", index)) for index in range(2))
    for runner in (first, second):
        for key in "aabb":
            runner.run(key, lambda: None)
    assert [device.index for device, _ in streams] == [0, 0, 1, 1]
    assert streams[0] is streams[1] and streams[2] is streams[3]  # graphs share their memory on one stream alone


@pytest.mark.gpu
def test_on_a_gpu_work_is_captured_and_accounted_for(device):
    runner = GraphRunner(device)
    counter = runner.buffer("counter", (1,), torch.int64)
    sizes = []

    def work() -> None:
        scratch = torch.ones(1 << 20, dtype=torch.int64, device=device)
        counter.add_(scratch.sum() >> 20)

    for calls in range(1, 6):
        runner.run("key", work)
        assert counter.item() == calls
        sizes.append(runner.captured_bytes)
    assert sizes[0] == 0
    assert sizes[1] == sizes[-1] >= 8 << 20
    for _ in range(2):
        runner.run("another", work)
    assert runner.graphs == 2
    assert counter.item() == 7
    runner.clear()
    assert (runner.graphs, runner.captured_bytes) == (0, 0)
    runner.run("key", work)
    assert counter.item() == 8
