"""The loop on the device: the host loop's tokens and counts, no question to the host, any lag, any bucket."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest
import torch
from drafters import in_one_launch, with_backend
from no_host_reads import HostReadError, no_host_reads
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo, Session
from kangaroo_kernels.model import session as session_module
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.loop import device as decode
from kangaroo_kernels.model.loop.graphs import GraphRunner
from kangaroo_kernels.model.loop.iteration import Iteration

PROMPT = [7, 3, 5]
SAMPLINGS = ({}, {"temperature": 1.0, "seed": 2**64 - 3}, {"temperature": 0.8, "seed": 4, "top_k": 9, "top_p": 0.9})


@pytest.fixture(scope="module")
def host(pair) -> Kangaroo:
    return pair.load(device="cpu")


@pytest.fixture
def with_lag(monkeypatch) -> Callable[[int], None]:
    """``with_lag(n)``: from now on the host reads n iterations late."""
    steps = decode.device_steps

    def put(lag: int) -> None:
        monkeypatch.setattr(session_module, "device_steps", lambda *args, **named: steps(*args, **named, lag=lag))

    return put


def counts(kangaroo: Kangaroo | Session, prompt: list[int] = PROMPT, **settings: Any) -> dict[str, Any]:
    """Tokens and everything that was counted."""
    result = kangaroo.generate(prompt, **settings).as_dict()
    for timed in ("prefill_seconds", "decode_seconds", "processor_seconds", "tokens_per_second"):
        del result["stats"][timed]
    return result


@pytest.fixture
def iterations(monkeypatch) -> list[int]:
    """The reaches of all iterations launched."""
    launched = []
    run = Iteration.run

    def counted(iteration: Iteration, reach: int) -> None:
        launched.append(reach)
        run(iteration, reach)

    monkeypatch.setattr(Iteration, "run", counted)
    return launched


@pytest.fixture
def made(monkeypatch) -> list[Iteration]:
    """Every iteration that a decode made."""
    found = []
    init = Iteration.__init__
    monkeypatch.setattr(Iteration, "__init__", lambda self, *args: (found.append(self), init(self, *args))[1])
    return found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("gamma", [1, 3, 15])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_it_does_what_the_host_loop_does(host, resident, sampling, gamma, threshold):
    """The same tokens, drafts and agreements at every position."""
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": threshold, **sampling}
    for new_tokens in (1, 2, 5, 40):
        wanted = counts(host, max_new_tokens=new_tokens, **settings)
        assert counts(resident, max_new_tokens=new_tokens, **settings) == wanted
    assert wanted["stats"]["draft_steps"] == wanted["stats"]["drafted"] > 0


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("gamma", [1, 4, 15])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_drafting_in_one_launch_does_the_same(host, resident, iterations, sampling, gamma, threshold):
    resident = in_one_launch(resident)
    settings = {"num_speculative_tokens": gamma, "draft_confidence_threshold": threshold, **sampling}
    for new_tokens in (1, 5, 40):
        assert counts(resident, max_new_tokens=new_tokens, **settings) == counts(
            host, max_new_tokens=new_tokens, **settings
        )
    assert iterations


def test_plain_decoding_is_the_same_loop_without_drafts(host, resident, iterations):
    for sampling in SAMPLINGS:
        wanted = counts(host, max_new_tokens=20, plain=True, **sampling)
        assert counts(resident, max_new_tokens=20, plain=True, **sampling) == wanted
    assert len(iterations) == 3 * 20


def test_requests_leave_nothing_behind(host, resident):
    """Longer, shorter, plain, drafted: all through the same buffers."""
    prompts = [PROMPT, [5] * 50, [1, 2], [5]]
    for prompt, gamma, plain in product(prompts, (4, 2), (False, True)):
        settings = {"max_new_tokens": 9, "num_speculative_tokens": gamma, "plain": plain}
        assert counts(resident, prompt, **settings) == counts(host, prompt, **settings)


@pytest.mark.parametrize("plain", [False, True])
def test_a_prompt_that_fills_the_context(host, resident, iterations, plain):
    prompt = [1] * host.target.config.context_length
    assert counts(resident, prompt, max_new_tokens=3, plain=plain) == counts(
        host, prompt, max_new_tokens=3, plain=plain
    )
    assert iterations == []


def test_steps_behind_the_early_exit_do_nothing(resident, made):
    """The draft that is unsure still gets its row of the exit layer; those that are not made get none."""
    resident.generate(PROMPT, max_new_tokens=1, num_speculative_tokens=5, draft_confidence_threshold=1.0)
    written = made[-1].buffers.exit_hidden[1:].abs().sum(dim=1) > 0
    assert written.tolist() == [True, True, False, False, False, False]


def test_attention_is_launched_for_the_bucket(resident, monkeypatch):
    """Not for all that the cache holds: programs that find nothing to do cost time, too."""
    reaches = set()

    def attention(*args: Any, max_length: int | None = None, **named: Any) -> torch.Tensor:
        reaches.add(max_length)
        return REFERENCES.attention(*args, max_length=max_length, **named)

    with_backend(resident, replace(REFERENCES, resident=True, max_rows=16, attention=attention))
    resident.generate(PROMPT * 40, max_new_tokens=300, plain=True)  # the prefill is the references'
    resident.generate(PROMPT * 40, max_new_tokens=300)
    assert reaches == {256, 448}  # the second is the cache's capacity


def test_any_number_of_stop_tokens(host, resident):
    text = host.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    others = [token for token in range(60) if token not in text[:10]]
    for stop in (others, others[:16], others[:17]):
        settings = {"max_new_tokens": 20, "stop": stop, "draft_confidence_threshold": 0.2}
        assert counts(resident, **settings) == counts(host, **settings)
    assert len(resident.generate(PROMPT, max_new_tokens=20, stop=others).tokens) > 10


def test_what_lies_in_the_buffers_does_not_matter(host, resident):
    """A text that went wrong leaves NaN; the next one must not see it."""
    settings = {"max_new_tokens": 9, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.4}
    session = resident.session()
    for _ in range(2):
        assert counts(session, **settings) == counts(host, **settings)
        with torch.inference_mode():
            for buffer in session.memory.runner._buffers.values():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 2**30)
        session.memory.forget()


def test_the_adapter_has_seen_what_the_host_loop_shows_it(host, resident):
    """Its cache, the prompt's positions included; the last steps may end before either's adapter has run."""
    settings = {"max_new_tokens": 20, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.3}
    sessions = resident.session(), host.session()
    length = len(PROMPT) + [len(session.generate(PROMPT, **settings).tokens) for session in sessions][1]
    for name in ("keys", "values"):
        ours, theirs = (getattr(each.memory.drafter_memory.cache, name)[0][:, : length - 6] for each in sessions)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_the_host_may_lag(host, resident, with_lag, lag, plain):
    with_lag(lag)
    text = host.generate(PROMPT, max_new_tokens=30, plain=True).tokens
    for new_tokens in (1, 2, 7, 30):
        settings = {"max_new_tokens": new_tokens, "draft_confidence_threshold": 0.2, "plain": plain}
        assert counts(resident, **settings) == counts(host, **settings)
    for place in (0, 1, 11, 29):
        settings = {"max_new_tokens": 30, "draft_confidence_threshold": 0.2, "plain": plain, "stop": [text[place]]}
        stopped = counts(resident, **settings)
        assert stopped == counts(host, **settings)
        assert stopped["tokens"] == text[: text.index(text[place]) + 1]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_what_runs_beyond_the_end_commits_nothing(resident, with_lag, lag, made):
    """A stop token that the host has not read yet; the text on the device is what was committed."""
    text = resident.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    with_lag(lag)
    stopped = resident.generate(PROMPT, max_new_tokens=20, stop=[text[9]], draft_confidence_threshold=0.0)
    length = len(PROMPT) + len(stopped.tokens)
    assert made[-1].buffers.length.tolist() == made[-1].buffers.limit.tolist() == [length]
    assert made[-1].buffers.text[:length].tolist() == PROMPT + stopped.tokens
    assert made[-1].buffers.flags.tolist() == [0] * len(made[-1].buffers.flags)


def test_no_iteration_runs_that_cannot_be_needed(resident, with_lag, iterations):
    """Every iteration commits a token at least, so plain decoding launches exactly one a token, whatever the lag."""
    with_lag(3)
    resident.generate(PROMPT, max_new_tokens=12, plain=True)
    assert len(iterations) == 12


def test_text_streams(resident, iterations):
    """A step is handed out before the next one is launched (where the host does not lag)."""
    steps = resident.progress(PROMPT, max_new_tokens=12, draft_confidence_threshold=0.0)
    for number, step in enumerate(islice(steps, 3), start=1):
        assert len(iterations) == number
        assert step.commit.tokens


def test_an_abandoned_text_does_not_reach_the_next(host, resident, with_lag):
    with_lag(2)
    next(resident.progress([9, 8, 7], max_new_tokens=30))
    assert counts(resident, max_new_tokens=10) == counts(host, max_new_tokens=10)


OTHERS = (
    {"draft_confidence_threshold": 0.9},
    {"draft_confidence_threshold": 0.1, "seed": 11},
    {"temperature": 3.0},
    {"temperature": 0.2, "seed": 12, "draft_confidence_threshold": 0.5},
    {"top_k": 2},
    {"top_p": 0.2, "top_k": 40},
)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
def test_a_captured_iteration_serves_all_numbers(host, resident, monkeypatch, sampling, persistent):
    """One graph, whatever threshold, temperature, filters and seed; what is replayed is the first request's work."""
    first: dict[Any, Callable[[], None]] = {}
    monkeypatch.setattr(GraphRunner, "run", lambda runner, key, work: first.setdefault(key, work)())
    resident = in_one_launch(resident) if persistent else resident
    settings = {"max_new_tokens": 30, "num_speculative_tokens": 4, "draft_confidence_threshold": 0.3, **sampling}
    others = [each for each in OTHERS if each.keys() - {"draft_confidence_threshold"} <= sampling.keys()]
    wanted = []
    for other in ({}, *others):
        wanted.append(counts(host, **(settings | other)))
        assert counts(resident, **(settings | other)) == wanted[-1]
    assert len(first) == 1
    assert len({str(each) for each in wanted}) == len(wanted)  # the numbers matter


def test_filters_that_keep_all_are_none(host, resident, monkeypatch):
    """They are launched, and drafted in one kernel, as if they were not asked for."""
    keys = set()
    monkeypatch.setattr(GraphRunner, "run", lambda runner, key, work: (keys.add(key), work()))
    resident = in_one_launch(resident)
    for filters in ({}, {"top_p": 1.0}, {"top_k": host.target.config.vocab_size}, {"top_k": 10**6, "top_p": 1}):
        settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, **filters}
        assert counts(resident, **settings) == counts(host, **settings)
    assert len(keys) == 1


@pytest.mark.parametrize("lag", [0, 2])
def test_a_context_that_outgrows_its_bucket(host, resident, monkeypatch, with_lag, iterations, lag):
    """Reaches double; each holds every position that its iterations can touch."""
    monkeypatch.setattr(decode, "LEAST_REACH", 8)
    with_lag(lag)
    settings = {"max_new_tokens": 150, "num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
    assert counts(resident, **settings) == counts(host, **settings)
    assert set(iterations) == {8, 16, 32, 64, 128, 192}  # the last is the cache's capacity
    assert iterations == sorted(iterations)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_reach_bounds_what_an_iteration_touches(resident, monkeypatch, with_lag, lag):
    """The rows of an iteration end below its reach, although the host does not know yet where they begin."""
    monkeypatch.setattr(decode, "LEAST_REACH", 4)
    with_lag(lag)
    run = Iteration.run

    def checked(iteration: Iteration, reach: int) -> None:
        assert int(iteration.buffers.position(0)) + iteration.max_drafts + 1 <= reach
        run(iteration, reach)

    monkeypatch.setattr(Iteration, "run", checked)
    for gamma in (1, 6, 15):
        resident.generate(PROMPT, max_new_tokens=40, num_speculative_tokens=gamma, draft_confidence_threshold=0.0)


def test_a_damaged_decode_ends(resident, monkeypatch):
    """Rather than going on for ever."""
    monkeypatch.setattr(Iteration, "commit", lambda self: self.buffers.report[:-1].fill_(5))
    with pytest.raises(RuntimeError, match="committed nothing"):
        resident.generate(PROMPT, max_new_tokens=9)


def test_buckets():
    assert [decode.bucket(positions, 3000) for positions in (1, 256, 257, 1024, 1025, 2049)] == [
        256,
        256,
        512,
        1024,
        2048,
        3000,
    ]


def test_stages_in_order(resident, made):
    def stages(kangaroo: Kangaroo, **settings: Any) -> list[str]:
        kangaroo.generate(PROMPT, max_new_tokens=1, num_speculative_tokens=2, **settings)
        return [stage.name for stage in made[-1].stages(8)]

    drafting, end = ["kangaroo/draft/shallow", "kangaroo/draft/step"], ["kangaroo/accept", "kangaroo/commit"]
    by_steps = [*drafting, *drafting, drafting[0], "kangaroo/verify", *end]
    assert stages(resident) == by_steps
    assert stages(resident, plain=True) == ["kangaroo/verify", *end]
    persistent = in_one_launch(resident)
    assert stages(persistent) == ["kangaroo/draft", "kangaroo/verify", *end]
    assert stages(persistent, temperature=1.0, top_k=5) == by_steps  # a filter needs a row of logits
    assert len({iteration.key for iteration in made}) == 4  # each has graphs of its own


def test_a_lost_program_is_an_error(resident, monkeypatch):
    """The error word of the launch, read with the record; the next text prepares the loop anew."""
    words = []

    class Prepared:
        def __init__(self) -> None:
            self.error = torch.zeros(1, dtype=torch.int32)
            words.append(self.error)

    backend = replace(resident.target.backend, prepare_draft_loop=lambda model, most: Prepared())
    monkeypatch.setattr(resident.target, "backend", backend)
    resident = in_one_launch(resident)
    wanted = resident.generate(PROMPT, max_new_tokens=9).tokens
    assert resident.generate(PROMPT, max_new_tokens=9).tokens == wanted
    assert len(words) == 1
    with torch.inference_mode():
        words[0].fill_(4)
    with pytest.raises(RuntimeError, match=r"a program never came to a barrier \(error word 4\)"):
        resident.generate(PROMPT, max_new_tokens=9)
    assert resident.generate(PROMPT, max_new_tokens=9).tokens == wanted
    assert len(words) == 2


# ---- on the kernels


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, device) -> Kangaroo:
    """A very small pair, for the interpreter's sake."""
    folder = tmp_path_factory.mktemp("iteration")
    sizes = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 40, "layers": 2, "heads": 2, "kv_heads": 1}
    target = make_target(folder / "target", **sizes, quiet_from=1, quiet=0.2)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1)
    return Kangaroo.from_pretrained(target, adapter, device=device, dtype="float32", kernels="triton")


class Forbidden:
    """Every iteration runs where questions to the host raise."""

    def __init__(self) -> None:
        self.iterations = 0
        run = Iteration.run

        def forbidding(iteration: Iteration, reach: int) -> None:
            self.iterations += 1
            with no_host_reads():
                run(iteration, reach)

        self.run = forbidding


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's way to see it")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
@pytest.mark.parametrize("way", ["plain", "steps", "persistent", "auto"])
def test_an_iteration_never_asks_the_host(kernels, monkeypatch, sampling, way):
    forbidden = Forbidden()
    monkeypatch.setattr(Iteration, "run", forbidden.run)
    kernels = in_one_launch(kernels) if way == "persistent" else kernels
    settings = {"num_speculative_tokens": 3, "plain": way == "plain", **sampling}
    settings["draft_confidence_threshold"] = "auto" if way == "auto" else 0.2
    assert len(kernels.generate(PROMPT, max_new_tokens=4, **settings).tokens) == 4
    assert forbidden.iterations > 0


def test_the_references_would_be_found_out(resident, monkeypatch):
    """They ask at every turn: the check sees it."""
    forbidden = Forbidden()
    monkeypatch.setattr(Iteration, "run", forbidden.run)
    with pytest.raises(HostReadError):
        resident.generate(PROMPT, max_new_tokens=4)


ONE = torch.ones(1)
QUESTIONS: dict[str, Callable[[], object]] = {
    "item": ONE.item,
    "tolist": ONE.tolist,
    "int": lambda: int(ONE),
    "float": lambda: float(ONE),
    "bool": lambda: bool(ONE),
    "index": lambda: [0, 1][ONE.long()],
    "if": lambda: 1 if ONE > 0 else 0,
    "numpy": ONE.numpy,
    "cpu": ONE.cpu,
    "equal": lambda: torch.equal(ONE, ONE),
    "nonzero": ONE.nonzero,
    "mask": lambda: ONE[ONE > 0],
    "tensor": lambda: torch.tensor([1]),
    "fill": lambda: torch.zeros(1).fill_(ONE.sum().item()),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_seen(question):
    with pytest.raises(HostReadError), no_host_reads():
        QUESTIONS[question]()


def test_what_is_no_question():
    with no_host_reads():
        buffer = torch.zeros(4)
        buffer[1:2].copy_(ONE)
        torch.where(buffer > 0, buffer, 0.0).sum()
        assert buffer.shape == (4,)


@pytest.mark.parametrize("prompt", [[5], [5, 6]])
def test_a_prompt_of_one_token(kernels, prompt):
    """Nothing was prefilled: the adapter's first pass has a row before the first position."""
    settings = {"max_new_tokens": 6, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.0}
    plain = kernels.generate(prompt, max_new_tokens=6, plain=True).tokens
    by_steps = counts(kernels, prompt, **settings)
    assert by_steps["tokens"] == plain
    assert counts(in_one_launch(kernels), prompt, **settings) == by_steps


def test_one_launch_drafts_what_the_steps_draft(kernels):
    """Through the kernels, with an early exit now and then."""
    for sampling in SAMPLINGS[:2]:
        settings = {"max_new_tokens": 5, "num_speculative_tokens": 2, "draft_confidence_threshold": 0.4, **sampling}
        assert counts(in_one_launch(kernels), **settings) == counts(kernels, **settings)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.gpu_first
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "filtered"])
def test_on_a_gpu_graphs_change_nothing(pair, monkeypatch, sampling):
    """Captured, recaptured at every bucket, or launched kernel by kernel: the same tokens and counts."""
    monkeypatch.setattr(decode, "LEAST_REACH", 8)
    captured, launched = (pair.load(dtype="bfloat16", graphs=graphs).session() for graphs in (True, False))
    persistent = pair.load(dtype="bfloat16", persistent=True).session()
    for plain in (False, True):
        for new_tokens in (60, 200):  # the second outgrows the cache: every graph is dropped
            settings = {"max_new_tokens": new_tokens, "draft_confidence_threshold": 0.3, "plain": plain, **sampling}
            assert counts(captured, **settings) == counts(launched, **settings)
            assert counts(persistent, **settings) == counts(launched, **settings)
    assert captured.memory.runner.graphs > 2
    assert captured.memory.runner.captured_bytes > 0
    assert launched.memory.runner.graphs == 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("way", [{"persistent": True}, {"prompt_lookup": True}, {}, {"draft_tree": 9}], ids=str)
def test_on_a_gpu_nothing_waits_inside_an_iteration(pair, monkeypatch, graphs, way):
    kangaroo = pair.load(dtype="bfloat16", graphs=graphs, **way)
    run = GraphRunner.run
    settings = {"max_new_tokens": 30, "draft_confidence_threshold": 0.2}
    wanted = kangaroo.generate(PROMPT, **settings).tokens  # compiles

    def strictly(runner: GraphRunner, key: object, work: Callable[[], None]) -> None:
        captures = graphs and key not in runner._graphs
        torch.cuda.set_sync_debug_mode("default" if captures else "error")
        try:
            run(runner, key, work)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(GraphRunner, "run", strictly)
    assert kangaroo.generate(PROMPT, **settings).tokens == wanted
