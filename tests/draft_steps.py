"""Small drafters, and what a drafting step is given and leaves: by the stages, or by all of them in one kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from kernel_inputs import drawer, same_bits
from torch import Tensor

from kangaroo_kernels.attention import attention
from kangaroo_kernels.contract import AttentionBlock, DraftModel, Layer, Mlp, Top1
from kangaroo_kernels.draft_loop import DraftLoop, draft_loop
from kangaroo_kernels.gate_up import gate_up
from kangaroo_kernels.linear_residual import linear_residual
from kangaroo_kernels.packed_weight import Layout, PackedWeight, Weight
from kangaroo_kernels.qkv_rope import qkv_rope
from kangaroo_kernels.reference import draft_loop as draft_loop_ref
from kangaroo_kernels.reference.qkv_rope import rope_table
from kangaroo_kernels.sample_head import sample_head
from kangaroo_kernels.top1_head import top1_head

HIDDEN, INNER, VOCAB, CAPACITY = 40, 56, 67, 320
NAN = float("nan")
FEW_POLLS: dict[str, Any] = {} if torch.cuda.is_available() else {"polls": 20}
"""A broken barrier is then an error at once; in the interpreter nobody has to wait for another."""


# ---- a drafter, and what a step begins with


def make_model(
    device: torch.device,
    dtype: torch.dtype | None = None,
    layers: int = 2,
    biases: tuple[str, ...] = ("qkv", "output", "gate_up", "down", "adapter's qkv", "head"),
    heads: tuple[int, int, int] = (4, 2, 8),
    adapter_heads: tuple[int, int, int] = (4, 2, 8),
    capacity: int = CAPACITY,
    adapter_capacity: int | None = None,
    adapter_inner: int | None = None,
) -> DraftModel:
    """A small drafter; no size is a multiple of a tile. Caches are NaN but for what is drawn.

    Args:
        biases: of which matrices; those of the adapter are called the adapter's.
        heads: H, H_kv, D.
        adapter_inner: the size of the adapter's MLP; None leaves it away.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    draw = drawer(layers, dtype, device)

    def weight(name: str, rows: int, columns: int) -> Weight:
        bias = draw(rows, scale=0.3) if name in biases else None
        return PackedWeight(draw(rows, columns, scale=columns**-0.5), bias, Layout.ROWS)

    def tables(head_dim: int, base: float, capacity: int = capacity) -> Tensor:
        return rope_table(base ** -torch.linspace(0, 1, head_dim // 2, device=device), capacity)

    def block(shape: tuple[int, int, int], table: Tensor, whose: str = "") -> AttentionBlock:
        query_heads, kv_heads, head_dim = shape
        caches = [draw(kv_heads, len(table), head_dim) for _ in range(2)]
        qkv = weight(f"{whose}qkv", (query_heads + 2 * kv_heads) * head_dim, HIDDEN)
        projection = weight(f"{whose}output", HIDDEN, query_heads * head_dim)
        return AttentionBlock(1 + draw(HIDDEN, scale=0.1), qkv, projection, *caches, table, 1e-5, head_dim**-0.5)

    def mlp(inner: int, whose: str = "") -> Mlp:
        norm = 1 + draw(HIDDEN, scale=0.1)
        return Mlp(norm, weight(f"{whose}gate_up", 2 * inner, HIDDEN), weight(f"{whose}down", HIDDEN, inner))

    table = tables(heads[2], 1e2)
    blocks = [Layer(block(heads, table), mlp(INNER)) for _ in range(layers)]
    own_table = tables(adapter_heads[2], 1e3, adapter_capacity or capacity)
    own_block = block(adapter_heads, own_table, "adapter's ")._replace(eps=1e-6)
    adapter = Layer(own_block, mlp(adapter_inner, "adapter's ") if adapter_inner else None)
    head = weight("head", VOCAB, HIDDEN)
    return DraftModel(tuple(blocks), adapter, 1 + draw(HIDDEN, scale=0.1), head, 1e-4, draw(VOCAB, HIDDEN))


class Step(NamedTuple):
    """What a drafting loop is given, and what it leaves."""

    flags: Tensor
    positions: Tensor
    newest: Tensor
    exit_hidden: Tensor
    out: Top1
    caches: list[Tensor]


def blocks_of(model: DraftModel) -> list[AttentionBlock]:
    return [layer.attention for layer in (*model.layers, model.adapter)]


def caches_of(model: DraftModel) -> list[Tensor]:
    return [cache for block in blocks_of(model) for cache in (block.k_cache, block.v_cache)]


def with_caches(model: DraftModel, caches: list[Tensor]) -> DraftModel:
    pairs = zip(caches[::2], caches[1::2], strict=True)
    *layers, adapter = (
        layer._replace(attention=layer.attention._replace(k_cache=k, v_cache=v))
        for layer, (k, v) in zip((*model.layers, model.adapter), pairs, strict=True)
    )
    return model._replace(layers=tuple(layers), adapter=adapter)


def begin(model: DraftModel, most: int, before: int) -> Step:
    """The newest token is at ``before + 1``; whatever is not to be read is NaN, whatever is to be written, too."""
    device, dtype = model.embedding.device, model.embedding.dtype
    draw = drawer(4, dtype, device)  # so that the third of six drafts is the least sure
    caches = [cache.clone() for cache in caches_of(model)]
    for cache in caches:
        cache[:, before + 1 :] = NAN
    if before >= 0:  # the adapter lags by one
        for cache in caches[-2:]:
            cache[:, before:] = NAN
    exit_hidden = draw(most + 2, HIDDEN)
    exit_hidden[1:] = NAN
    flags = torch.full((most + 1,), -7, dtype=torch.int32, device=device)
    flags[0] = 1
    out = Top1(torch.full((most,), -5, dtype=torch.int64, device=device), torch.full((most,), NAN, device=device))
    positions = torch.arange(before, before + most + 3, device=device)
    return Step(flags, positions, draw(1, HIDDEN), exit_hidden, out, caches)


def same(one: Step, other: Step) -> None:
    for name in ("flags", "newest", "exit_hidden"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert torch.equal(mine, theirs) if mine.dtype == torch.int32 else same_bits(mine, theirs), name
    assert torch.equal(one.out.token, other.out.token)
    assert same_bits(one.out.confidence, other.out.confidence)
    for index, (mine, theirs) in enumerate(zip(one.caches, other.caches, strict=True)):
        assert same_bits(mine, theirs), f"cache {index}"


# ---- three ways to draft


def by_stages(
    model: DraftModel, step: Step, *, threshold: float, temperature: float | None = None, **sampling: Any
) -> None:
    """The stage launchers one after the other, as a captured graph has them: each under the flag of its step."""
    model = with_caches(model, step.caches)
    most = len(step.flags) - 1

    def run(layer: Layer, x: Tensor, position: Tensor, active: Tensor) -> Tensor:
        block, mlp = layer
        caches = block.k_cache, block.v_cache
        q = qkv_rope(x, block.norm, block.qkv, block.table, *caches, position, eps=block.eps, active=active)
        mixed = attention(q, *caches, position, scale=block.scale, active=active)
        x = linear_residual(mixed, block.output, x, active=active)
        if mlp is None:
            return x
        inner = gate_up(x, mlp.norm, mlp.gate_up, eps=block.eps, active=active)
        return linear_residual(inner, mlp.down, x, active=active)

    for drafted in range(most + 1):
        # the row of a draft is computed where that draft was begun, for the last one is verified, too
        active = step.flags[max(drafted - 1, 0) :][:1]
        if not int(active):
            break
        hidden, position = step.newest, step.positions[drafted + 1 :][:1]
        for layer in model.layers:
            hidden = run(layer, hidden, position, active)
        step.exit_hidden[drafted + 1] = hidden[0]
        active = step.flags[drafted:][:1]
        if drafted == most or not int(active):
            break
        first = 0 if drafted == 0 else drafted + 1
        rows = step.exit_hidden[first : drafted + 2]
        hidden = run(model.adapter, rows, step.positions[first:][:1], active)[-1:]
        settings = {
            "eps": model.eps,
            "vocabulary": model.vocabulary,
            "threshold": threshold,
            "active": active,
            "sure": step.flags[drafted + 1 :][:1],
            "embedding": model.embedding,
            "embedded": step.newest,
            "out": Top1(step.out.token[drafted:][:1], step.out.confidence[drafted:][:1]),
        }
        if temperature is None:
            top1_head(hidden, model.norm, model.head, **settings)
        else:
            noise_at = step.positions[drafted + 2 :][:1]
            sample_head(hidden, model.norm, model.head, noise_at, temperature=temperature, **sampling, **settings)


def by(operation: Callable[..., Top1], model: DraftModel, step: Step, **settings: Any) -> None:
    """The operation itself, kernel or reference."""
    out = operation(with_caches(model, step.caches), *step[:4], out=step.out, **settings)
    assert out.token.data_ptr() == step.out.token.data_ptr()


def draft(model: DraftModel, most: int, before: int, **settings: Any) -> tuple[Step, int]:
    """A step of the kernel, its bits those of the stages, its tokens those of the reference; how many it drafted."""
    kernel, stages, reference = (begin(model, most, before) for _ in range(3))
    drafted_model = with_caches(model, kernel.caches)
    loop = DraftLoop(drafted_model, most, **FEW_POLLS)
    poison(loop)
    draft_loop(drafted_model, *kernel[:4], prepared=loop, out=kernel.out, **settings)
    assert not loop.state.any()  # as it began: a graph launches it again
    by_stages(model, stages, **settings)
    same(kernel, stages)
    by(draft_loop_ref.draft_loop, model, reference, **settings)
    assert torch.equal(kernel.flags, reference.flags)
    assert torch.equal(kernel.out.token, reference.out.token)
    close = {"rtol": 0, "atol": 2e-2 if model.embedding.dtype == torch.float16 else 1e-4, "equal_nan": True}
    torch.testing.assert_close(kernel.out.confidence, reference.out.confidence, **close)
    torch.testing.assert_close(kernel.exit_hidden, reference.exit_hidden, **close)
    for mine, theirs in zip(kernel.caches, reference.caches, strict=True):
        torch.testing.assert_close(mine, theirs, **close)
    return kernel, int((kernel.out.token >= 0).sum())


def poison(loop: DraftLoop) -> None:
    """NaN in every workspace: nothing is read before it is written."""
    for value in (loop.q, loop.sums, loop.stats, loop.mixed, loop.hidden, loop.inner, loop.adapted):
        value.fill_(NAN)
    for _, results in loop.heads:
        for tile in (results.scores, results.largest, results.sums):
            tile.fill_(NAN)
