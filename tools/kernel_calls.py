"""The steps of a decode as calls of the kernels' launchers, at the shapes of real models, on ``meta`` tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from kangaroo_kernels.cards import cards_of
from kangaroo_kernels.contract import AttentionBlock, DraftModel, DraftVocabulary, Layer, Mlp, TrainedConfidence
from kangaroo_kernels.draft_loop import DraftLoop
from kangaroo_kernels.launch_config import launch_config
from kangaroo_kernels.operation import EPS, OPERATIONS
from kangaroo_kernels.workloads import ModelShape, Settings, Workload, workloads

META = torch.device("meta")
SHORT_TEXT = 128
"""A text whose KV cache is not split."""

DRAFT_LAYERS = 2
"""The exit layer of a drafting step; the paper's for Vicuna-7B."""

CACHE_BLOCK = 16
"""Positions a block of a paged cache."""


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An operand; of one element, a number that kernels read from device memory."""
    return torch.empty(size, dtype=dtype, device=META)


LAYER, ATTENTION_BLOCK = 5, 3
"""Operations of a layer, and of its first half, which is all of an adapter."""

DRAFTING: dict[str, Any] = {"active": empty(1, dtype=torch.int32)}
"""The flag of a drafting step."""


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


def call(shape: ModelShape, settings: Settings, op: str, role: str, **more: Any) -> Call:
    """The call of the operation that reads such a matrix, with ``more`` arguments."""
    workload = next(each for each in workloads(shape) if (each.op, each.role) == (op, role))
    args, kwargs = workload.make(settings)
    return Call(op, role, args, kwargs | more, workload.bytes_moved(*settings[:2], settings.dtype.itemsize))


def layer(shape: ModelShape, settings: Settings, operations: int = LAYER, **more: Any) -> Calls:
    """The first ``operations`` of a layer."""
    for each in workloads(shape)[:operations]:
        yield call(shape, settings, each.op, each.role, **more)


def paged_layer(shape: ModelShape, settings: Settings) -> Calls:
    """The operations of a layer that see the cache, with the cache in blocks."""
    count = -(-settings.length // CACHE_BLOCK)
    blocks = empty(count, shape.kv_heads, CACHE_BLOCK, shape.head_dim, dtype=settings.dtype)
    cache = (shape.kv_heads, settings.length, shape.head_dim)
    for each in layer(shape, settings, 2, block_table=empty(count, dtype=torch.int32)):
        yield each._replace(args=tuple(blocks if given.shape == cache else given for given in each.args))


def head(
    shape: ModelShape,
    settings: Settings,
    op: str = "sample_head",
    *,
    filters: tuple[str, ...] = (),
    drafting: bool = False,
    rows: int | None = None,
    trained: bool = False,
) -> Calls:
    """A head, with the ``filters``, of so many ``rows``, or of all.

    That of a drafting step is also given the flag, which it may lower, and where the next step begins; it may have a
    ``trained`` confidence.
    """
    more: dict[str, Any] = {"temperature": empty(1)} if op == "sample_head" else {}
    more |= {name: empty(1, dtype=torch.int64 if name == "top_k" else torch.float32) for name in filters}
    if drafting:
        table = empty(shape.vocab_size, shape.hidden, dtype=settings.dtype)
        more |= {"threshold": empty(1), "embedding": table, "embedded": table[:1], **DRAFTING}
    if trained:
        more["trained"] = TrainedConfidence(empty(shape.hidden), empty(2))
    whole = call(shape, settings, op, "head", **more)
    if rows is None:
        yield whole
        return
    x, norm, table, *numbers = whole.args
    yield whole._replace(
        args=(x, norm, table[:rows], *numbers),
        kwargs=whole.kwargs | {"vocabulary": some_tokens(shape, rows)},
        bytes_moved=rows * shape.hidden * settings.dtype.itemsize,
    )


def some_tokens(shape: ModelShape, rows: int) -> DraftVocabulary:
    """The tokens of a head of so many rows."""
    return DraftVocabulary(empty(rows, dtype=torch.int32), shape.vocab_size)


def prompt_lookup(shape: ModelShape, settings: Settings) -> Calls:
    """What looks up drafts, and what chooses between them and the adapter's."""
    for op in ("look_up", "weigh"):
        yield from ending(shape, settings, op)


def tree(shape: ModelShape, settings: Settings) -> Calls:
    """What a tree of drafts needs besides: candidates, their rows, the walk through it, and its rows as a chain's."""
    for op in ("rank", "grow", "walk", "straighten"):
        yield from ending(shape, settings, op)


def tree_pass(shape: ModelShape, settings: Settings) -> Calls:
    """The operations that treat the rows of a tree otherwise than a chain's."""
    ancestors = empty(settings.rows, dtype=torch.int32)
    yield from layer(shape, settings, 2, ancestors=ancestors)
    yield call(shape, settings, "sample_head", "head", temperature=empty(1), ancestors=ancestors)


def ending(shape: ModelShape, settings: Settings, op: str) -> Calls:
    """An operation without a matrix, such as the end of a verification step of ``rows`` rows."""
    yield Call(op, "", *Workload(op, "", shape, shape.vocab_size, shape.hidden).make(settings), None)


def draft_step(shape: ModelShape, settings: Settings) -> Calls:
    """The shallow layers, the adapter and the head."""
    for _ in range(DRAFT_LAYERS):
        yield from layer(shape, settings, **DRAFTING)
    yield from layer(shape, settings, ATTENTION_BLOCK, **DRAFTING)
    yield from head(shape, settings, "top1_head", drafting=True)


def draft_loop(
    shape: ModelShape,
    settings: Settings,
    layers: int = DRAFT_LAYERS,
    most: int = 6,
    sampled: bool = False,
    rows: int | None = None,
    mlp: bool = False,
) -> Calls:
    """The drafting loop of one launch, its bytes those of one draft.

    The head has so many ``rows``, or all; with ``mlp`` the adapter is a whole layer.
    """
    qkv, attention, output, gate_up, down = whole = list(layer(shape, settings))
    (top,) = head(shape, settings, "top1_head", rows=rows)
    _, norm, weight, phases, k_cache, v_cache, _ = qkv.args
    block = AttentionBlock(norm, weight, output.args[1], k_cache, v_cache, phases, EPS, attention.kwargs["scale"])
    each = Layer(block, Mlp(gate_up.args[1], gate_up.args[2], down.args[1]))
    adapter = each if mlp else Layer(block, None)
    _, norm, weight = top.args
    table = empty(shape.vocab_size, shape.hidden, dtype=settings.dtype)
    model = DraftModel((each,) * layers, adapter, norm, weight, EPS, table, top.kwargs.get("vocabulary"))
    architecture = driver.active.get_current_target().arch
    config = launch_config("draft_loop", len(weight), shape.hidden, norm)
    loop = DraftLoop(model, most, programs=config.programs_per_sm * cards_of(architecture)[0].sms)
    flags, positions = empty(most + 1, dtype=torch.int32), empty(most + 3, dtype=torch.int64)
    states = empty(most + 2, shape.hidden, dtype=settings.dtype)
    numbers = {"threshold": empty(1), "seed": empty(1, dtype=torch.int64), "prepared": loop}
    numbers |= {"temperature": empty(1)} if sampled else {}
    moved = sum(each.bytes_moved or 0 for each in (*whole * layers, *whole[: LAYER if mlp else ATTENTION_BLOCK], top))
    yield Call("draft_loop", "", (model, flags, positions, states[:1], states), numbers, moved)


BOTH = "top_k", "top_p"
SOME_ROWS = partial(head, drafting=True, rows=8192)
TRAINED = partial(head, drafting=True, trained=True)

STEPS = (
    Step("layer", layer),
    Step("top-1 head", partial(head, op="top1_head")),
    Step("sampling head", head),
    Step("filtered head", partial(head, filters=BOTH)),
    Step("top-p head", partial(head, filters=("top_p",)), variant=True),
    Step("prompt lookup", prompt_lookup),
    Step("accept", partial(ending, op="accept")),
    Step("commit", partial(ending, op="commit")),
    Step("tree", tree),
    Step("tree, its rows", tree_pass, variant=True),
    Step("tree, its rows, short text", tree_pass, length=SHORT_TEXT, variant=True),
    Step("layer, short text", layer, length=SHORT_TEXT, variant=True),
    Step("layer, paged", paged_layer, variant=True),
    Step("draft step", draft_step, drafting=True, variant=True),
    Step("draft step, short text", draft_step, length=SHORT_TEXT, drafting=True, variant=True),
    Step("sampling draft head", partial(head, drafting=True), drafting=True, variant=True),
    Step("filtered draft head", partial(head, filters=BOTH, drafting=True), drafting=True, variant=True),
    Step("draft head, trained confidence", partial(TRAINED, op="top1_head"), drafting=True, variant=True),
    Step("filtered draft head, trained confidence", partial(TRAINED, filters=BOTH), drafting=True, variant=True),
    Step("draft loop", draft_loop, drafting=True, variant=True),
    Step("draft loop, 4 layers", partial(draft_loop, layers=4, most=15), drafting=True, variant=True),
    Step("draft loop, adapter with an MLP", partial(draft_loop, mlp=True), drafting=True, variant=True),
    Step("sampling draft loop", partial(draft_loop, sampled=True), drafting=True, variant=True),
    Step("draft head, 8192 rows", partial(SOME_ROWS, op="top1_head"), drafting=True, variant=True),
    Step("sampling draft head, 8192 rows", SOME_ROWS, drafting=True, variant=True),
    Step("filtered draft head, 8192 rows", partial(SOME_ROWS, filters=BOTH), drafting=True, variant=True),
    Step("draft loop, 8192 rows", partial(draft_loop, rows=8192), drafting=True, variant=True),
    Step("sampling draft loop, 8192 rows", partial(draft_loop, sampled=True, rows=8192), drafting=True, variant=True),
)
