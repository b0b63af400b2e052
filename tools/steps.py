"""The steps of a decode as calls of the kernels' launchers, at the shapes of real models, on ``meta`` tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from cards import cards_of
from torch import Tensor
from triton.runtime import driver

from kangaroo_kernels.contract import AttentionBlock, DraftModel, Layer
from kangaroo_kernels.draft_loop import DraftLoop
from kangaroo_kernels.draft_loop.table import PROGRAMS_PER_SM
from kangaroo_kernels.operation import EPS, OPERATIONS
from kangaroo_kernels.workloads import ModelShape, Settings, Workload, workloads

META = torch.device("meta")
SHORT_TEXT = 128
"""A text whose KV cache is not split."""

DRAFT_LAYERS = 2
"""The exit layer of a drafting step; the paper's for Vicuna-7B."""

CACHE_BLOCK = 16
"""Positions a block of a paged cache."""


def on_device(dtype: torch.dtype) -> Tensor:
    """A number that kernels read from device memory, as an iteration on the device has them all."""
    return torch.empty(1, dtype=dtype, device=META)


FILTERS = {"top_k": on_device(torch.int64), "top_p": on_device(torch.float32)}


class Call(NamedTuple):
    """A launcher's call.

    Attributes:
        op: the operation.
        role: of the matrix that it reads.
        args: positional.
        kwargs: by name.
        bytes_moved: that the operation must move.
    """

    op: str
    role: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bytes_moved: int | None

    def launch(self) -> None:
        """Launch the kernel."""
        OPERATIONS[self.op].launcher(*self.args, **self.kwargs)


Calls = Iterator[Call]


class Step(NamedTuple):
    """Calls that belong together.

    Attributes:
        name: in the report.
        calls: ``(shape, settings)`` to the calls.
        length: of the text, where it is the step's own.
        drafting: it runs on one row, under the flag that ends drafting.
        variant: it is another version of kernels that the other steps have, left out of a plain report.
    """

    name: str
    calls: Callable[[ModelShape, Settings], Calls]
    length: int | None = None
    drafting: bool = False
    variant: bool = False


def call(workload: Workload, settings: Settings, **more: Any) -> Call:
    """The call of a workload, with ``more`` arguments."""
    args, kwargs = workload.make(settings)
    moved = workload.bytes_moved(settings.rows, settings.length, settings.dtype.itemsize)
    return Call(workload.op, workload.role, args, kwargs | more, moved)


def workload_of(shape: ModelShape, op: str, role: str | None = None) -> Workload:
    """The first operation of that name and role."""
    return next(each for each in workloads(shape) if each.op == op and role in (None, each.role))


def attention_block(shape: ModelShape, settings: Settings, **more: Any) -> Calls:
    """The first half of a layer, which is all of an adapter."""
    for op, role in (("qkv_rope", "qkv"), ("attention", "kv"), ("linear_residual", "output")):
        yield call(workload_of(shape, op, role), settings, **more)


def layer(shape: ModelShape, settings: Settings, **more: Any) -> Calls:
    """A whole layer."""
    yield from attention_block(shape, settings, **more)
    for op, role in (("gate_up", "gate_up"), ("linear_residual", "down")):
        yield call(workload_of(shape, op, role), settings, **more)


def paged_layer(shape: ModelShape, settings: Settings) -> Calls:
    """The operations of a layer that see the cache, with the cache in blocks."""
    blocks = -(-settings.length // CACHE_BLOCK)
    block_table = torch.empty(blocks, dtype=torch.int32, device=META)

    def in_blocks(argument: Any, cache: tuple[int, ...]) -> Any:
        if not isinstance(argument, Tensor) or tuple(argument.shape) != cache:
            return argument
        return argument.new_empty(blocks, shape.kv_heads, CACHE_BLOCK, shape.head_dim)

    for each in attention_block(shape, settings):
        if each.op != "linear_residual":
            cache = (shape.kv_heads, settings.length, shape.head_dim)
            args = tuple(in_blocks(argument, cache) for argument in each.args)
            yield each._replace(args=args, kwargs=each.kwargs | {"block_table": block_table})


def top1_head(shape: ModelShape, settings: Settings) -> Calls:
    """The greedy head."""
    yield call(workload_of(shape, "top1_head"), settings)


def sample_head(shape: ModelShape, settings: Settings) -> Calls:
    """The sampling head."""
    yield call(workload_of(shape, "sample_head"), settings, temperature=on_device(torch.float32))


def filtered_sample_head(shape: ModelShape, settings: Settings) -> Calls:
    """The sampling head with top-k and top-p."""
    yield call(workload_of(shape, "sample_head"), settings, temperature=on_device(torch.float32), **FILTERS)


def accept(shape: ModelShape, settings: Settings) -> Calls:
    """The end of a verification step of ``rows`` rows."""
    yield Call("accept", "", *Workload("accept", "", shape, 0, 0).make(settings), None)


def commit(shape: ModelShape, settings: Settings) -> Calls:
    """What follows ``accept``: the state of the next iteration."""
    workload = Workload("commit", "embedding", shape, shape.vocab_size, shape.hidden)
    yield Call("commit", "", *workload.make(settings), None)


def drafting(shape: ModelShape, settings: Settings) -> dict[str, Tensor]:
    """The flag of a drafting step."""
    return {"active": torch.empty(1, dtype=torch.int32, device=META)}


def drafting_head(shape: ModelShape, settings: Settings) -> dict[str, Any]:
    """What the head of a drafting step is given: the flag that it may lower, and where the next step begins."""
    table = torch.empty(shape.vocab_size, shape.hidden, dtype=settings.dtype, device=META)
    row = torch.empty(1, shape.hidden, dtype=settings.dtype, device=META)
    return {"threshold": on_device(torch.float32), "embedding": table, "embedded": row, **drafting(shape, settings)}


def draft_step(shape: ModelShape, settings: Settings) -> Calls:
    """The shallow layers, the adapter and the head."""
    for _ in range(DRAFT_LAYERS):
        yield from layer(shape, settings, **drafting(shape, settings))
    yield from attention_block(shape, settings, **drafting(shape, settings))
    yield call(workload_of(shape, "top1_head"), settings, **drafting_head(shape, settings))


def sampled_draft_head(shape: ModelShape, settings: Settings) -> Calls:
    """The head of a drafting step that samples."""
    temperature = on_device(torch.float32)
    yield call(workload_of(shape, "sample_head"), settings, temperature=temperature, **drafting_head(shape, settings))


def filtered_draft_head(shape: ModelShape, settings: Settings) -> Calls:
    """The same with top-k and top-p."""
    step = drafting_head(shape, settings)
    yield call(workload_of(shape, "sample_head"), settings, temperature=on_device(torch.float32), **FILTERS, **step)


def draft_model(shape: ModelShape, settings: Settings, layers: int) -> DraftModel:
    """A drafter of so many shallow layers."""
    hidden, query, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=settings.dtype, device=META)

    table = torch.empty(settings.length, 1, shape.head_dim // 2, dtype=torch.complex64, device=META)

    def block() -> AttentionBlock:
        cache = (shape.kv_heads, settings.length, shape.head_dim)
        qkv, output = empty(query + 2 * kv, hidden), empty(hidden, query)
        return AttentionBlock(
            empty(hidden), qkv, output, empty(*cache), empty(*cache), table, EPS, shape.head_dim**-0.5
        )

    def whole_layer() -> Layer:
        return Layer(block(), empty(hidden), empty(2 * shape.inner, hidden), empty(hidden, shape.inner))

    tables = empty(shape.vocab_size, hidden), empty(shape.vocab_size, hidden)
    return DraftModel(tuple(whole_layer() for _ in range(layers)), block(), empty(hidden), tables[0], EPS, tables[1])


def draft_loop(
    shape: ModelShape, settings: Settings, layers: int = DRAFT_LAYERS, most: int = 6, sampled: bool = False
) -> Calls:
    """The drafting loop of one launch, its bytes those of one draft."""
    model = draft_model(shape, settings, layers)
    architecture = driver.active.get_current_target().arch
    loop = DraftLoop(model, most, programs=PROGRAMS_PER_SM * cards_of(architecture)[0].sms)
    flags = torch.empty(most + 1, dtype=torch.int32, device=META)
    positions = torch.empty(most + 3, dtype=torch.int64, device=META)
    newest = torch.empty(1, shape.hidden, dtype=settings.dtype, device=META)
    rows = torch.empty(most + 2, shape.hidden, dtype=settings.dtype, device=META)
    numbers = {"threshold": on_device(torch.float32), "seed": on_device(torch.int64)}
    numbers |= {"temperature": on_device(torch.float32)} if sampled else {}
    moved = [each.bytes_moved for _ in range(layers) for each in layer(shape, settings)]
    moved += [each.bytes_moved for each in (*attention_block(shape, settings), *top1_head(shape, settings))]
    yield Call(
        "draft_loop",
        "",
        (model, flags, positions, newest, rows),
        numbers | {"prepared": loop},
        sum(filter(None, moved)),
    )


STEPS = (
    Step("layer", layer),
    Step("top-1 head", top1_head),
    Step("sampling head", sample_head),
    Step("filtered head", filtered_sample_head),
    Step("accept", accept),
    Step("commit", commit),
    Step("layer, short text", layer, length=SHORT_TEXT, variant=True),
    Step("layer, paged", paged_layer, variant=True),
    Step("draft step", draft_step, drafting=True, variant=True),
    Step("draft step, short text", draft_step, length=SHORT_TEXT, drafting=True, variant=True),
    Step("sampling draft head", sampled_draft_head, drafting=True, variant=True),
    Step("filtered draft head", filtered_draft_head, drafting=True, variant=True),
    Step("draft loop", draft_loop, drafting=True, variant=True),
    Step("draft loop, 4 layers", partial(draft_loop, layers=4, most=15), drafting=True, variant=True),
    Step("sampling draft loop", partial(draft_loop, sampled=True), drafting=True, variant=True),
)
