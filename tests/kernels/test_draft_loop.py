"""``draft_loop``: the persistent kernel gives the bits of the stage kernels, launched one after the other."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from draft_steps import (
    CAPACITY,
    FEW_POLLS,
    HIDDEN,
    INNER,
    NAN,
    VOCAB,
    Step,
    begin,
    blocks_of,
    by,
    by_stages,
    draft,
    make_model,
    same,
    with_caches,
)
from kernel_inputs import same_bits
from torch import Tensor

from kangaroo_kernels.contract import Layer, Top1
from kangaroo_kernels.draft_loop import DraftLoop, draft_loop, prepare_draft_loop
from kangaroo_kernels.draft_loop.table import resident_programs
from kangaroo_kernels.launch_config import LaunchConfig, configured_by
from kangaroo_kernels.packed_weight import Layout, PackedWeight
from kangaroo_kernels.reference import draft_loop as draft_loop_ref
from kangaroo_kernels.shared.grid import BROKEN, COUNTER, ERROR, LEFT, STATE_WORDS, arrive, leave, wait
from kangaroo_kernels.shared.launch import weight_and_bias
from kangaroo_kernels.shared.splits import count_splits

# ---- the bits of the stages


@pytest.mark.parametrize(("layers", "most"), [(1, 15), (3, 2), (8, 1)])
def test_never_unsure(device, layers, most):
    heads = (4, 2, 8) if layers == 3 else (1, 1, 8)  # the most layers and drafts with the fewest tiles
    model = make_model(device, layers=layers, heads=heads, adapter_heads=heads)
    step, drafted = draft(model, most, 20, threshold=0.0)
    assert drafted == most
    assert step.flags.tolist() == [1] * (most + 1)


def test_unsure_at_once(device):
    """The one draft is verified: its row is computed, and nothing behind it."""
    step, drafted = draft(make_model(device, layers=1), 4, 20, threshold=1.1)
    assert drafted == 1
    assert step.flags.tolist() == [1, 0, -7, -7, -7]
    assert [bool(row.isnan().any()) for row in step.exit_hidden] == [False] * 3 + [True] * 3


def test_unsure_in_the_middle(device):
    model = make_model(device, layers=1)
    all_of_them = begin(model, 6, 20)
    by(draft_loop_ref.draft_loop, model, all_of_them, threshold=0.0)
    lowest, next_lowest = all_of_them.out.confidence.sort().values[:2].tolist()
    place = int(all_of_them.out.confidence.argmin())
    assert 0 < place < 5
    step, drafted = draft(model, 6, 20, threshold=(lowest + next_lowest) / 2)
    assert drafted == place + 1
    assert step.flags.tolist() == [1] * (place + 1) + [0] + [-7] * (5 - place)


@pytest.mark.parametrize("before", [-1, 126, 254])
def test_contexts_up_to_and_across_splits(device, before):
    """From a text of one token, whose row before it is of no position, on."""
    _, drafted = draft(make_model(device, layers=1), 1 if before < 0 else 2, before, threshold=0.0)
    assert drafted == (1 if before < 0 else 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is NumPy, which warns of them
def test_a_confidence_that_is_no_number_is_unsure(device):
    model = make_model(device, layers=1)
    model = model._replace(norm=torch.full_like(model.norm, NAN))
    kernel, stages = begin(model, 3, 20), begin(model, 3, 20)
    by(draft_loop, model, kernel, threshold=0.0)
    by_stages(model, stages, threshold=0.0)
    same(kernel, stages)
    assert kernel.flags.tolist() == [1, 0, -7, -7]


@pytest.mark.parametrize("biases", [(), ("adapter's qkv", "down"), ("qkv", "gate_up", "adapter's output")])
def test_biases(device, biases):
    model = make_model(device, layers=1, biases=biases)
    draft(model, 1, 20, threshold=0.0)
    blank = DraftLoop(model, 1).blank  # in the place of a bias that is not there
    assert len(blank) >= max(2 * INNER, *(len(weight_and_bias(block.qkv)[0]) for block in blocks_of(model)))
    assert bool(((blank == 0) & blank.signbit()).all())


@pytest.mark.parametrize(
    ("heads", "adapter_heads"), [((4, 4, 8), (3, 3, 8)), ((6, 1, 12), (4, 4, 12)), ((4, 4, 8), (4, 4, 20))]
)
def test_an_adapter_may_have_other_heads(device, heads, adapter_heads):
    draft(make_model(device, layers=1, heads=heads, adapter_heads=adapter_heads), 1, 126, threshold=0.0)


@pytest.mark.parametrize("whose", ["heads", "adapter_heads"])
def test_no_more_query_heads_share_keys_than_fit_into_a_tile(device, whose):
    """Further ones would not be computed, and the newest row's text be wrong."""
    most = 8 if device.type == "cpu" else 32
    DraftLoop(make_model(device, layers=1, **{whose: (most, 1, 8)}), 1)
    with pytest.raises(ValueError, match=f"{most + 1} query heads share a key-value head; this kernel takes at most"):
        DraftLoop(make_model(device, layers=1, **{whose: (most + 1, 1, 8)}), 1)


@pytest.mark.parametrize("inner", [24, INNER + 40])
@pytest.mark.parametrize("biases", [(), ("adapter's gate_up", "adapter's down")])
def test_an_adapter_may_have_an_mlp(device, inner, biases):
    """Of a size of its own; the first draft runs the adapter on two rows, of which its MLP takes one."""
    model = make_model(device, biases=biases, adapter_inner=inner)
    step, drafted = draft(model, 3, 20, threshold=0.0)
    assert drafted == 3
    without = begin(model, 3, 20)
    by(draft_loop, model._replace(adapter=model.adapter._replace(mlp=None)), without, threshold=0.0)
    assert not torch.equal(step.out.confidence, without.out.confidence)
    draft(model, 1, -1, threshold=0.0, temperature=0.8, seed=3)
    _, drafted = draft(model, 3, 20, threshold=1.1)
    assert drafted == 1


@pytest.mark.parametrize(("capacity", "adapter_capacity"), [(24, 320), (320, 23)])
def test_a_cache_may_be_full(device, capacity, adapter_capacity):
    """Drafts beyond it are worthless and cut off later: nothing is appended, and nothing else is disturbed."""
    model = make_model(device, layers=1, capacity=capacity, adapter_capacity=adapter_capacity)
    kernel, stages = begin(model, 3, 20), begin(model, 3, 20)
    drafted_model = with_caches(model, kernel.caches)
    loop = DraftLoop(drafted_model, 3, **FEW_POLLS)
    assert loop.sums.shape[0] == count_splits(320)
    draft_loop(drafted_model, *kernel[:4], prepared=loop, out=kernel.out, threshold=0.0)
    by_stages(model, stages, threshold=0.0)
    same(kernel, stages)


def test_a_short_rope_table_bounds_the_text(device):
    model = make_model(device, layers=1)
    block = model.adapter.attention
    model = model._replace(adapter=model.adapter._replace(attention=block._replace(table=block.table[:100])))
    loop = DraftLoop(model, 1)
    assert (loop.shape.room, loop.adapter_shape.room) == (CAPACITY, 100)


def test_half_precision(device):
    draft(make_model(device, torch.float16, layers=1), 2, 20, threshold=0.0)


def test_sampled(device):
    model, greedy = make_model(device, layers=1), begin(make_model(device, layers=1), 2, 20)
    step, _ = draft(model, 2, 20, threshold=0.0, temperature=0.8, seed=2**64 - 1, stream=2)
    by(draft_loop_ref.draft_loop, model, greedy, threshold=0.0)
    assert not torch.equal(step.out.token, greedy.out.token)


@pytest.mark.parametrize("operation", [draft_loop, draft_loop_ref.draft_loop], ids=["kernel", "reference"])
def test_nothing_to_do_writes_nothing(device, operation):
    model = make_model(device, layers=1)
    step, untouched = begin(model, 3, 20), begin(model, 3, 20)
    for each in (step, untouched):
        each.flags[0] = 0
    by(operation, model, step, threshold=0.0)
    same(step, untouched)


def test_results_are_made_if_none_are_given(device):
    model = make_model(device, layers=1)
    step, given = begin(model, 3, 20), begin(model, 3, 20)
    out = draft_loop(with_caches(model, step.caches), *step[:4], threshold=1.1)
    by(draft_loop, model, given, threshold=1.1)
    assert int(out.token[0]) == int(given.out.token[0])
    assert float(out.confidence[0]) == float(given.out.confidence[0])


def test_a_prepared_loop_is_launched_again_and_again(device):
    model = make_model(device, layers=1)
    step = begin(model, 2, 20)
    model = with_caches(model, step.caches)
    loop = prepare_draft_loop(model, 2)
    first = None
    for _ in range(2):
        again = begin(model, 2, 20)._replace(caches=step.caches)
        draft_loop(model, *again[:4], threshold=1.1, prepared=loop, out=again.out)
        first = first or again
        same(again, first)
        assert not loop.state.any()


# ---- a program that never comes


@triton.jit
def wait_kernel(state_ptr, result_ptr, arrivals):
    """One program waits for so many, with 20 looks, in its fifth stage."""
    tl.store(result_ptr, wait(state_ptr, arrivals, 20, 5).to(tl.int32))


@triton.jit
def leave_kernel(state_ptr, programs):
    """One of ``programs`` arrives and leaves."""
    arrive(state_ptr)
    leave(state_ptr, programs)


@pytest.mark.parametrize(
    ("counter", "whole", "counter_behind", "error"),
    [
        (6, 1, 6, 0),
        (7, 1, 7, 0),  # another is at the next barrier already
        (5, 0, BROKEN.value, 5),
        (BROKEN.value, 0, BROKEN.value, 0),  # another has given up, and said why
        (BROKEN.value + 1, 0, BROKEN.value + 1, 0),
    ],
)
def test_waiting(device, counter, whole, counter_behind, error):
    state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
    state[COUNTER.value] = counter
    result = torch.full((1,), -1, dtype=torch.int32, device=device)
    wait_kernel[(1,)](state, result, 6)
    assert result.tolist() == [whole]
    assert (state[COUNTER.value].item(), state[ERROR.value].item()) == (counter_behind, error)


def test_the_last_to_leave_resets_the_counters(device):
    state = torch.zeros(STATE_WORDS, dtype=torch.int32, device=device)
    for left in (1, 2):
        leave_kernel[(1,)](state, 3)
        assert (state[COUNTER.value].item(), state[LEFT.value].item()) == (left, left)
    leave_kernel[(1,)](state, 3)
    assert not state.any()


def test_a_lost_program_is_an_error_and_no_endless_wait(device):
    model = make_model(device, layers=1)
    step, untouched = begin(model, 2, 20), begin(model, 2, 20)
    model = with_caches(model, step.caches)
    loop = DraftLoop(model, 2, programs=1, polls=20)
    loop.programs = 2  # of which one is launched
    assert loop.error.tolist() == [0]
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    assert loop.error.tolist() == [1]  # at the first stage
    assert torch.equal(step.flags, untouched.flags)
    assert bool(step.exit_hidden[1:].isnan().all())

    loop.programs = 1
    for cache, other in zip(step.caches, untouched.caches, strict=True):
        cache.copy_(other)
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    same(step, untouched)  # it stays broken
    assert loop.error.tolist() == [1]

    loop.reset()
    assert loop.error.tolist() == [0]
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    assert step.flags.tolist() == [1, 1, 1]
    assert loop.error.tolist() == [0]


def test_a_late_program_leaves_at_once(device):
    """The interpreter runs one program to its end before the next begins."""
    if device.type != "cpu":
        pytest.skip("on a GPU both are there")
    model = make_model(device, layers=1)
    step, untouched = begin(model, 2, 20), begin(model, 2, 20)
    model = with_caches(model, step.caches)
    loop = DraftLoop(model, 2, programs=2, polls=20)
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    assert loop.error.tolist() == [1]
    assert torch.equal(step.flags, untouched.flags)


# ---- refusals


def refusals() -> dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]]:
    """What is done to the arguments, the error, and its words."""

    def change(**values: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda given: given.update(values)

    def in_model(**values: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
        def apply(given: dict[str, Any]) -> None:
            model = given["model"]
            given["model"] = model._replace(**{name: made(getattr(model, name)) for name, made in values.items()})

        return apply

    def in_adapter(**values: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
        def replaced(adapter: Layer) -> Layer:
            block = adapter.attention
            return adapter._replace(
                attention=block._replace(**{n: made(getattr(block, n)) for n, made in values.items()})
            )

        return in_model(adapter=replaced)

    def reshape(name: str, made: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], Any]:
        return lambda given: given.update({name: made(given[name])})

    odd = lambda layer: layer._replace(attention=layer.attention._replace(eps=0.5))  # noqa: E731
    return {
        "temperature": (change(temperature=0.0), ValueError, "draft_loop: temperature is 0.0; it must be"),
        "no drafts": (
            reshape("flags", lambda x: x[:1]),
            ValueError,
            "0 drafts a step; there must be at least one layer, and 1 to 15",
        ),
        "16 drafts": (reshape("flags", lambda x: x.new_ones(17)), ValueError, "16 drafts a step"),
        "no layers": (in_model(layers=lambda layers: ()), ValueError, "got 0 layers"),
        "layers": (
            in_model(layers=lambda x: (x[0], odd(x[1]))),
            ValueError,
            "the layers differ in shape, strides, eps",
        ),
        "newest": (reshape("newest", lambda x: x[0]), ValueError, r"newest is \[40\] torch.float32 on \w+; it"),
        "rows": (
            reshape("exit_hidden", lambda x: x[1:]),
            ValueError,
            r"exit_hidden is \[4, 40\] .* be \[5, 40\]",
        ),
        "dtype": (reshape("newest", Tensor.half), ValueError, "newest is .* torch.float16"),
        "flags": (reshape("flags", Tensor.long), ValueError, "flags are torch.int64"),
        "positions": (reshape("positions", Tensor.int), ValueError, "they must be int32 and int64"),
        "out": (change(out=Top1(torch.zeros(4), torch.zeros(4))), ValueError, "out must be Top1"),
        "head": (in_model(head=lambda head: torch.zeros(VOCAB + 1, HIDDEN)), ValueError, "the head is .* it must be"),
        "strides": (
            in_adapter(output=lambda weight: torch.zeros(32, HIDDEN).t()),
            ValueError,
            r"the output projection is \[40, 32\] with strides \(1, 40\); it must be \[40, 32\], contiguous",
        ),
        "a layout": (
            in_adapter(qkv=lambda weight: PackedWeight(weight.rows, None, Layout.TRANSPOSED)),
            ValueError,
            "packed as TRANSPOSED",
        ),
        "caches": (
            in_adapter(k_cache=lambda cache: cache[:, :64]),
            ValueError,
            "the key cache and the value cache differ",
        ),
        "heads": (in_adapter(qkv=lambda weight: torch.zeros(50, HIDDEN)), ValueError, "qkv has 50 rows"),
        "address": (
            in_adapter(norm=lambda norm: torch.cat((norm, norm))[1 : HIDDEN + 1]),
            ValueError,
            "begins at an address that is not a multiple of 16 bytes",
        ),
        "a double": (
            lambda given: given.update(model=given["model"]._replace(embedding=given["model"].embedding.double())),
            TypeError,
            "float64",
        ),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals(device, case):
    change, error, words = refusals()[case]
    model = make_model(device)
    step = begin(model, 3, 20)
    given = {"model": model, "threshold": 0.5, **dict(zip(Step._fields[:4], step[:4], strict=True))}
    change(given)
    with pytest.raises(error, match=words):
        draft_loop(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()})


def test_another_model_than_it_was_prepared_for(device):
    model = make_model(device)
    loop, step = prepare_draft_loop(model, 3), begin(model, 3, 20)
    with pytest.raises(ValueError, match="prepared for another model, or for 3 drafts and not for 3"):
        draft_loop(with_caches(model, step.caches), *step[:4], threshold=0.5, prepared=loop)
    with pytest.raises(ValueError, match="for 3 drafts and not for 2"):
        draft_loop(model, step.flags[:3], *step[1:4], threshold=0.5, prepared=loop)


@pytest.mark.parametrize("other", [{"dtype": torch.float32}, {"heads": (2, 1, 256)}, {"adapter_heads": (2, 1, 256)}])
def test_on_a_gpu_it_takes_what_sums_as_the_stages_do(other):
    """Decided before anything is launched; a device that holds nothing will do."""
    given = {"dtype": torch.float16, **other}
    with pytest.raises(ValueError, match="on a GPU this kernel takes float16 or bfloat16 with heads of at most"):
        prepare_draft_loop(make_model(torch.device("meta"), **given), 3)


def test_no_interpreter(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("a GPU needs none")
    from triton import knobs

    model = make_model(device)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="draft_loop got tensors on the CPU"):
        prepare_draft_loop(model, 3)


# ---- tiles and programs


def test_tuned_operations_leave_the_loops_tiles_alone(device):
    model = make_model(device)

    def widths():
        loop = DraftLoop(model, 2)
        return [value for name, value in loop.constants.items() if name.endswith("_N")], [n for n, _ in loop.heads]

    shipped = widths()
    with configured_by(lambda *_: LaunchConfig(4, 3, 128, programs_per_sm=2)):
        assert widths() == shipped


@pytest.mark.parametrize(
    ("shared", "weight_rows", "on_an_sm"),
    [(228 << 10, 32, 2), (228 << 10, 64, 2), (228 << 10, 128, 1), (164 << 10, 32, 2), (164 << 10, 64, 1)],
)
def test_a_grid_is_what_fits_at_once(device, monkeypatch, shared, weight_rows, on_an_sm):
    """Of an H100 and an A100; the largest tile of a weight decides."""
    card = SimpleNamespace(shared_memory_per_multiprocessor=shared, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    loop = DraftLoop(make_model(device), 2)
    x = SimpleNamespace(device=torch.device("cuda"))
    assert resident_programs(x, loop.config, (loop.shape,), weight_rows) == 100 * on_an_sm


# ---- on a GPU


DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2, 8])
@pytest.mark.parametrize("before", [-1, 20, 126, 300])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_on_a_gpu_the_bits_are_those_of_the_stages(device, dtype, layers, before, sampling):
    for biases, inner in (((), None), (("qkv", "output", "gate_up", "down", "head"), None), ((), 24)):
        model = make_model(device, dtype, layers, biases, adapter_inner=inner)
        for threshold in (0.0, 0.1, 1.1):
            kernel, stages = begin(model, 15, before), begin(model, 15, before)
            by(draft_loop, model, kernel, threshold=threshold, **sampling)
            by_stages(model, stages, threshold=threshold, **sampling)
            same(kernel, stages)


@pytest.mark.gpu
def test_on_a_gpu_ten_thousand_launches_end_and_agree(device):
    """The watchdog is the kernel's own: it gives up after so many looks, and the error stays."""
    model = make_model(device, torch.bfloat16)
    step = begin(model, 6, 126)
    model = with_caches(model, step.caches)
    loop = prepare_draft_loop(model, 6)
    fresh, first = begin(model, 6, 126), None
    disagreeing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(10_000):
        for mine, given in zip(step[:4], fresh[:4], strict=True):
            mine.copy_(given)
        draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
        if first is None:
            first = step.exit_hidden.clone(), step.out.token.clone()
        disagreeing += (step.exit_hidden != first[0]).sum() + (step.out.token != first[1]).sum()
    assert int(loop.error) == 0
    assert int(disagreeing) == 0


@pytest.mark.gpu
def test_on_a_gpu_a_captured_loop_is_replayed(device):
    model = make_model(device, torch.bfloat16)
    step, eager = begin(model, 4, 20), begin(model, 4, 20)
    by(draft_loop, model, eager, threshold=0.1)
    model = with_caches(model, step.caches)
    loop = prepare_draft_loop(model, 4)
    fresh = begin(model, 4, 20)
    draft_loop(model, *begin(model, 4, 20)[:4], threshold=0.1, prepared=loop, out=fresh.out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draft_loop(model, *step[:4], threshold=0.1, prepared=loop, out=step.out)
    for _ in range(3):
        for mine, given in zip(step[:4], fresh[:4], strict=True):
            mine.copy_(given)
        graph.replay()
        assert torch.equal(step.flags, eager.flags)
        assert same_bits(step.exit_hidden, eager.exit_hidden)
        assert int(loop.error) == 0


@pytest.mark.gpu
def test_on_a_gpu_a_lost_program_is_an_error(device):
    model = make_model(device)
    step = begin(model, 2, 20)
    model = with_caches(model, step.caches)
    loop = DraftLoop(model, 2, polls=10_000)
    loop.programs += 1
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    torch.cuda.synchronize()
    assert int(loop.error) > 0
    loop.reset()
    loop.programs -= 1
    draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)
    assert step.flags.tolist() == [1, 1, 1]
    assert int(loop.error) == 0
