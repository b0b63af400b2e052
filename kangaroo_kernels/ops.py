"""The operations as ``torch.ops.kangaroo.*``, for ``torch.compile``: importing this module registers them.

A thin layer, beside the plain functions and not under them: tensors and numbers in, new tensors out (``qkv_rope`` also
writes its caches), positions and seeds as tensors on the device. CUDA tensors go to the Triton kernels, CPU tensors to
the references. Each has a fake kernel (shapes and dtypes alone), so ``torch.compile(fullgraph=True)`` takes them whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels import (
    accept,
    attention,
    gate_up,
    linear_residual,
    qkv_rope,
    sample_head,
    top1_head,
)
from kangaroo_kernels.packed_weight import Layout, PackedWeight, Weight
from kangaroo_kernels.reference import accept as accept_ref
from kangaroo_kernels.reference import attention as attention_ref
from kangaroo_kernels.reference import gate_up as gate_up_ref
from kangaroo_kernels.reference import linear_residual as linear_residual_ref
from kangaroo_kernels.reference import qkv_rope as qkv_rope_ref
from kangaroo_kernels.reference import sample_head as sample_head_ref
from kangaroo_kernels.reference import top1_head as top1_head_ref

NAMESPACE = "kangaroo"
_library = torch.library.Library(NAMESPACE, "DEF")


def _weight(matrix: Tensor, bias: Tensor | None) -> Weight:
    return matrix if bias is None else PackedWeight(matrix, bias, Layout.ROWS)


def _register(schema: str, call: Callable[..., Any], kernel: Any, reference: Any, fake: Callable[..., Any]) -> None:
    """Define ``schema``; ``call(operation, ...)`` turns its arguments into the operation's own."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, lambda *args, **kwargs: call(kernel, *args, **kwargs), "CUDA")
    _library.impl(name, lambda *args, **kwargs: call(reference, *args, **kwargs), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _qkv_rope(
    operation: Any,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phases: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    eps: float,
    block_table: Tensor | None = None,
) -> Tensor:
    packed, table = _weight(weight, bias), torch.view_as_complex(phases)
    out: Tensor = operation(x, norm_weight, packed, table, k_cache, v_cache, position, eps=eps, block_table=block_table)
    return out.contiguous()  # the reference's is a view


def _fake_qkv_rope(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Any, phases: Tensor, k_cache: Tensor, *rest: Any
) -> Tensor:
    kv_heads, head_dim = k_cache.shape[-3], k_cache.shape[-1]
    return x.new_empty(x.shape[0], weight.shape[0] // head_dim - 2 * kv_heads, head_dim)


_register(
    "qkv_rope(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, Tensor phases, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor position, float eps, Tensor? block_table=None) -> Tensor",
    _qkv_rope,
    qkv_rope.qkv_rope,
    qkv_rope_ref.qkv_rope,
    _fake_qkv_rope,
)


def _attention(
    operation: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    scale: float,
    max_length: int | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    out: Tensor = operation(q, k_cache, v_cache, position, scale=scale, max_length=max_length, block_table=block_table)
    return out


_register(
    "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, float scale, int? max_length=None, "
    "Tensor? block_table=None) -> Tensor",
    _attention,
    attention.attention,
    attention_ref.attention,
    lambda q, *rest: q.new_empty(q.shape[0], q.shape[1] * q.shape[2]),
)

_register(
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    lambda operation, x, weight, bias, residual: operation(x, _weight(weight, bias), residual),
    linear_residual.linear_residual,
    linear_residual_ref.linear_residual,
    lambda x, weight, bias, residual: residual.new_empty(residual.shape),
)

_register(
    "gate_up(Tensor x, Tensor norm_weight, Tensor weight, Tensor? bias, float eps) -> Tensor",
    lambda operation, x, norm_weight, weight, bias, eps: operation(x, norm_weight, _weight(weight, bias), eps=eps),
    gate_up.gate_up,
    gate_up_ref.gate_up,
    lambda x, norm_weight, weight, bias, eps: x.new_empty(x.shape[0], weight.shape[0] // 2),
)


def _fake_head(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


_register(
    "top1_head(Tensor x, Tensor norm_weight, Tensor weight, float eps) -> (Tensor token, Tensor confidence)",
    lambda operation, x, norm_weight, weight, eps: tuple(operation(x, norm_weight, weight, eps=eps)),
    top1_head.top1_head,
    top1_head_ref.top1_head,
    _fake_head,
)


def _sample_head(
    operation: Any,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    position: Tensor,
    seed: Tensor,
    eps: float,
    temperature: float,
    stream: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    filters = {"top_k": top_k, "top_p": top_p}
    token, confidence = operation(
        x, norm_weight, weight, position, eps=eps, temperature=temperature, seed=seed, stream=stream, **filters
    )
    return token, confidence


_register(
    "sample_head(Tensor x, Tensor norm_weight, Tensor weight, Tensor position, Tensor seed, float eps, "
    "float temperature, int stream=0, int? top_k=None, float? top_p=None) -> (Tensor token, Tensor confidence)",
    _sample_head,
    sample_head.sample_head,
    sample_head_ref.sample_head,
    _fake_head,
)

_register(
    "accept(Tensor draft, Tensor target, Tensor stop_tokens, Tensor length, Tensor limit) -> Tensor",
    lambda operation, *args: operation(*args),
    accept.accept,
    accept_ref.accept,
    lambda draft, *rest: draft.new_empty(3),
)
