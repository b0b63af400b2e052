"""What ``draft_loop`` needs of a model, prepared once: a launch then allocates nothing and never asks the host."""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from kangaroo_kernels.attention import query_tile
from kangaroo_kernels.contract import MAX_ROWS, WIDEST_HEAD, AttentionBlock, DraftModel, Layer, Top1
from kangaroo_kernels.draft_loop.stages import (
    DOWN_BIAS_AT,
    GATE_UP_BIAS_AT,
    KEYS_AT,
    MLP_NORM_AT,
    NORM_AT,
    OUTPUT_AT,
    OUTPUT_BIAS_AT,
    QKV_AT,
    QKV_BIAS_AT,
    TABLE_WORDS,
    VALUES_AT,
)
from kangaroo_kernels.launch_config import (
    DEFAULT_ARCHITECTURE,
    LaunchConfig,
    architecture_file,
    launch_config,
    pick,
)
from kangaroo_kernels.packed_weight import Weight
from kangaroo_kernels.qkv_rope import phases_of
from kangaroo_kernels.shared.attend import TILE_BYTES
from kangaroo_kernels.shared.cache_layout import cache_layout
from kangaroo_kernels.shared.grid import ERROR, STATE_WORDS
from kangaroo_kernels.shared.head import TileResults, check_top1, check_vocabulary
from kangaroo_kernels.shared.launch import UNFUSED, VECTOR_BYTES, check_operands, require_interpreter, weight_and_bias
from kangaroo_kernels.shared.splits import count_splits
from kangaroo_kernels.shared.tiles import K_STEP_BYTES

POLLS = 1 << 20
"""How often a waiting program reads the counter before it takes another program for lost. This lasts about a second,
while a stage takes microseconds."""

MOST_PASS_ROWS = 2
"""The most rows of a pass: the one before the newest token, which the adapter may have missed, and the newest. A pass
of the target has one, and shares the bound."""

SPARE_SHARED = 4096
"""Bytes of shared memory that a program takes beside its tiles: for reductions, and for the system."""

SPARING_FROM, MAX_REGISTERS, SPARING_REGISTERS = 90, 242, 255
"""The most registers per thread; with two programs per SM there are 256. From architecture ``SPARING_FROM`` on, the
assembler is told to be sparing with them and gets ``SPARING_REGISTERS``; on older ones that makes it spill. The limits
were found by trying: spills are no simple function of them."""


class BlockShape(NamedTuple):
    """The sizes of an attention block and the strides of its caches.

    Attributes:
        kv_heads: ``H_kv``.
        group: query heads per key-value head.
        head_dim: ``D``.
        room: positions that caches and phases hold.
        head_stride: of the caches, from head to head.
        row_stride: from position to position.
        scale: of the scores, times log2(e).
        eps: of the norm.
        itemsize: bytes of an element.
        phases: ``[T, 1, D / 2, 2]`` float32, the RoPE table.
    """

    kv_heads: int
    group: int
    head_dim: int
    room: int
    head_stride: int
    row_stride: int
    scale: float
    eps: float
    itemsize: int
    phases: Tensor

    @property
    def heads(self) -> int:
        """``H``."""
        return self.kv_heads * self.group

    @property
    def queries(self) -> int:
        """``H * D``."""
        return self.heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """``(H + 2 * H_kv) * D``."""
        return self.queries + 2 * self.kv_heads * self.head_dim

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the queries' tile: two rows would do, but the bits must be those of ``attention``."""
        return query_tile(self.group, self.head_dim, self.itemsize)

    def tiles(self, prefix: str = "") -> dict[str, int]:
        """The kernel's compile-time arguments for these heads; ``prefix`` goes before their names."""
        rows, cols = self.tile
        sizes = {"GROUP": self.group, "HEAD_DIM": self.head_dim, "BLOCK_D": cols, "BLOCK_R": rows}
        return {prefix + name: size for name, size in sizes.items()}


def refuse(sentence: str) -> ValueError:
    """The error to raise for a model or an argument that does not fit."""
    return ValueError(f"draft_loop: {sentence}")


def shape_of(block: AttentionBlock, x: Tensor) -> BlockShape:
    """The shape of an attention block, from its caches and the rows of its qkv weight."""
    keys = cache_layout("draft_loop", block.k_cache, None, x)
    values = cache_layout("draft_loop", block.v_cache, None, x)
    rows, head_dim = weight_and_bias(block.qkv)[0].shape[0], block.k_cache.shape[-1]
    heads = rows // head_dim - 2 * keys.kv_heads
    if keys != values or block.v_cache.shape[-1] != head_dim:
        raise refuse("the key cache and the value cache differ in shape or strides; they must be alike.")
    if rows % head_dim or heads < 1 or heads % keys.kv_heads:
        raise refuse(
            f"qkv has {rows} rows, a cache is {list(block.k_cache.shape)}; they must be (H + 2 * H_kv) * D rows and "
            "[H_kv, T, D], H a multiple of H_kv."
        )
    phases = phases_of("draft_loop", block.table, head_dim)
    return BlockShape(
        keys.kv_heads,
        heads // keys.kv_heads,
        head_dim,
        min(keys.capacity, phases.shape[0]),
        keys.head_stride,
        keys.row_stride,
        block.scale * math.log2(math.e),
        block.eps,
        x.element_size(),
        phases,
    )


def inner_size(layer: Layer) -> int:
    """``I`` of a layer's MLP; 0 without one."""
    return 0 if layer.mlp is None else weight_and_bias(layer.mlp.gate_up)[0].shape[0] // 2


def matrix_of(
    name: str, x: Tensor, norm: Tensor | None, weight: Weight, shape: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """The matrix of a weight of ``shape``, and its bias."""
    matrix, bias = weight_and_bias(weight)
    if matrix.shape != shape or not matrix.is_contiguous():
        raise refuse(
            f"{name} is {list(matrix.shape)} with strides {matrix.stride()}; it must be {list(shape)}, contiguous."
        )
    check_operands("draft_loop", x if norm is not None else x.new_empty(1, shape[1]), norm, matrix)
    return matrix, bias


def architecture_of(x: Tensor) -> int:
    """90 for sm_90; the interpreter's on a CPU."""
    return DEFAULT_ARCHITECTURE if x.device.type == "cpu" else int(driver.active.get_current_target().arch)


def tile_width(x: Tensor, op: str, n: int, k: int) -> int:
    """``block_n`` of an operation in the file of the architecture, whatever a GPU's own file says.

    A tuned rule was measured on the operation's own kernel. In this one, which has the tiles of all stages, it could
    take more shared memory or registers than leave room for two programs on an SM.
    """
    files = (architecture_file(architecture_of(x)),)
    return pick(files, op, n, k, str(x.dtype).removeprefix("torch.")).block_n


def resident_programs(x: Tensor, config: LaunchConfig, shapes: tuple[BlockShape, ...], weight_rows: int) -> int:
    """Programs of the grid: as many as fit at once, at most ``config.programs_per_sm``; one in the interpreter.

    ``weight_rows`` are those of the largest tile.
    """
    if x.device.type != "cuda":
        return 1
    device = torch.cuda.get_device_properties(x.device)
    # a pipeline stage holds a tile of the weight, 16 rows of x and the norm's weight; attention holds the queries and
    # two tiles each of keys and values
    weights = (config.num_stages - 1) * (weight_rows + MAX_ROWS + 1) * K_STEP_BYTES.value
    tiles = ((each.tile, each.itemsize) for each in shapes)
    caches = max((4 * TILE_BYTES.value + rows * itemsize) * cols for (rows, cols), itemsize in tiles)
    fit = device.shared_memory_per_multiprocessor // (max(weights, caches) + SPARE_SHARED)
    return int(device.multi_processor_count * max(1, min(config.programs_per_sm, fit)))


def gpu_options(x: Tensor) -> dict[str, Any]:
    """Options of the launch: it starts only if all programs can be resident, no register spills, no bit differs."""
    if x.device.type == "cpu":
        return {}
    sparing = architecture_of(x) >= SPARING_FROM
    registers = {"maxnreg": SPARING_REGISTERS, "ptx_options": "--register-usage-level 0"} if sparing else {}
    return {"launch_cooperative_grid": True, "maxnreg": MAX_REGISTERS, **UNFUSED, **registers}


class DraftLoop:
    """A model's drafting loop, ready to be launched.

    A captured graph holds the addresses of everything in it, the model's weights and caches too: when one of them is
    replaced, prepare and capture again.

    Attributes:
        model: as given.
        most: drafts a step, R.
        grid: programs that are launched; all must be resident at once.
        programs: how many programs a barrier waits for; only tests make it differ from ``grid``.
        error: ``[1]`` int32 on the device: 0, or 1 + the stage after which a program never came to the barrier. The
            results of that launch are worthless, and later launches do nothing until ``reset``.
        state: the barrier's words and, behind them, the counters of attention: what ``reset`` puts back.
    """

    def __init__(self, model: DraftModel, most: int, programs: int | None = None, polls: int = POLLS) -> None:
        x = model.embedding[:1]
        require_interpreter("draft_loop", x)
        if not 1 <= most < MAX_ROWS or not model.layers:
            raise refuse(
                f"got {len(model.layers)} layers and {most} drafts a step; there must be at least one layer, and 1 to "
                f"{MAX_ROWS - 1} drafts."
            )
        self.model, self.most, self.polls = model, most, polls
        K = x.shape[1]
        self.shape, self.adapter_shape = shape_of(model.layers[0].attention, x), shape_of(model.adapter.attention, x)
        inner, adapter_inner = self.inner_sizes = inner_size(model.layers[0]), inner_size(model.adapter)
        shapes = self.shape, self.adapter_shape
        widest = max(each.head_dim for each in shapes)
        if x.device.type != "cpu" and (x.dtype == torch.float32 or widest > WIDEST_HEAD):
            raise refuse(
                f"the weights are {x.dtype}, the heads {widest} wide; on a GPU this kernel takes float16 or bfloat16 "
                f"with heads of at most {WIDEST_HEAD}. Draft step by step instead."
            )
        for each in shapes:
            if MOST_PASS_ROWS * each.group > each.tile[0]:
                raise refuse(
                    f"{each.group} query heads share a key-value head; this kernel takes at most "
                    f"{each.tile[0] // MOST_PASS_ROWS} of {x.dtype}. Draft step by step instead."
                )
        vocab_size = len(model.embedding if model.vocabulary is None else model.vocabulary.tokens)
        self.head = matrix_of("the head", x, model.norm, model.head, (vocab_size, K))
        self.tokens = check_vocabulary("draft_loop", self.head[0], model.vocabulary, model.embedding)
        self._fill_table(x)

        self.config = launch_config("draft_loop", vocab_size, K, x)
        qkv_n = tile_width(x, "qkv_rope", self.shape.qkv_rows, K)
        linear_n, gate_up_n = tile_width(x, "linear_residual", K, inner), tile_width(x, "gate_up", inner, K)
        head_n = {op: tile_width(x, op, vocab_size, K) for op in ("top1_head", "sample_head")}
        self.constants = {
            **self.biased,
            **self.shape.tiles(),
            **self.adapter_shape.tiles("ADAPTER_"),
            "ADAPTER_MLP": model.adapter.mlp is not None,
            "QKV_N": qkv_n,
            "LINEAR_N": linear_n,
            "GATE_UP_N": gate_up_n,
        }
        self.gpu_options = gpu_options(x)
        weight_rows = max(qkv_n, linear_n, 2 * gate_up_n, *head_n.values())
        self.grid = self.programs = programs or resident_programs(x, self.config, shapes, weight_rows)

        def empty(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        queries, heads = max(each.queries for each in shapes), max(each.heads for each in shapes)
        splits = max(count_splits(each.room) for each in shapes)
        self.q, self.mixed, self.adapted = empty(2, queries), empty(2, queries), empty(2, K)
        self.hidden, self.inner = empty(1, K), empty(1, max(inner, adapter_inner))
        self.sums = empty(splits, 2, queries, dtype=torch.float32)
        self.stats = empty(splits, 2, heads, 2, dtype=torch.float32)
        self.heads = []
        for op, block_n in head_n.items():
            results = TileResults(1, triton.cdiv(vocab_size, block_n), x.device, sampled=op == "sample_head")
            self.heads.append((block_n, results))
        kv_heads = max(each.kv_heads for each in shapes)
        self.state = torch.zeros(STATE_WORDS + kv_heads, dtype=torch.int32, device=x.device)
        self.error, self.arrivals = self.state[ERROR.value : ERROR.value + 1], self.state[STATE_WORDS:]

    def _fill_table(self, x: Tensor) -> None:
        """Set ``base``, ``table`` and ``biased``: where the tensors of each block lie, the adapter's last."""
        model, K = self.model, x.shape[1]
        first = model.layers[0].attention
        rows = []
        for layer in model.layers:
            block = layer.attention
            if shape_of(block, x)[:-1] != self.shape[:-1] or block.table.data_ptr() != first.table.data_ptr():
                raise refuse("the layers differ in shape, strides, eps, scale or RoPE table; they must be alike.")
            rows.append(self._tensors_of(layer, self.shape, self.inner_sizes[0], x))
        rows.append(self._tensors_of(model.adapter, self.adapter_shape, self.inner_sizes[1], x))
        biases = {
            "QKV_BIAS": (QKV_BIAS_AT,),
            "LINEAR_BIAS": (OUTPUT_BIAS_AT, DOWN_BIAS_AT),
            "GATE_UP_BIAS": (GATE_UP_BIAS_AT,),
        }
        self.biased = {
            name: any(row[word.value] is not None for row in rows for word in words) for name, words in biases.items()
        }
        # where only some blocks have a bias, the others get one of -0.0, which changes no bit of any sum
        longest = max(self.shape.qkv_rows, self.adapter_shape.qkv_rows, 2 * max(self.inner_sizes), K)
        self.blank = x.new_full((longest,), -0.0)
        tensors = [[self.blank if tensor is None else tensor for tensor in row] for row in rows]
        self.base = min((tensor for row in tensors for tensor in row), key=Tensor.data_ptr)
        start = self.base.data_ptr()
        offsets = [[tensor.data_ptr() - start for tensor in row] for row in tensors]
        if any(offset % VECTOR_BYTES for row in offsets for offset in row) or start % VECTOR_BYTES:
            raise refuse(f"a weight or cache begins at an address that is not a multiple of {VECTOR_BYTES} bytes.")
        words = [[offset // VECTOR_BYTES for offset in row] for row in offsets]
        self.table = torch.tensor(words, dtype=torch.int64, device=x.device)

    def _tensors_of(self, layer: Layer, shape: BlockShape, inner: int, x: Tensor) -> list[Tensor | None]:
        """A block's row of the table."""
        row: list[Tensor | None] = [None] * TABLE_WORDS.value
        block, mlp, K = layer.attention, layer.mlp, x.shape[1]
        row[NORM_AT.value] = block.norm
        row[QKV_AT.value : QKV_BIAS_AT.value + 1] = matrix_of("qkv", x, block.norm, block.qkv, (shape.qkv_rows, K))
        output = matrix_of("the output projection", x, None, block.output, (K, shape.queries))
        row[OUTPUT_AT.value : OUTPUT_BIAS_AT.value + 1] = output
        row[KEYS_AT.value], row[VALUES_AT.value] = block.k_cache, block.v_cache
        if mlp is not None:
            matrices = (
                *matrix_of("gate_up", x, mlp.norm, mlp.gate_up, (2 * inner, K)),
                *matrix_of("the down projection", x, None, mlp.down, (K, inner)),
            )
            row[MLP_NORM_AT.value : DOWN_BIAS_AT.value + 1] = [mlp.norm, *matrices]
        return row

    def reset(self) -> None:
        """Make the loop usable again after an error."""
        self.state.zero_()

    def check(
        self, model: DraftModel, flags: Tensor, positions: Tensor, newest: Tensor, exit_hidden: Tensor, out: Top1 | None
    ) -> Top1:
        """``out``, or a new one if it is None; raises where a launch's arguments do not fit what was prepared."""
        if model is not self.model or len(flags) != self.most + 1:
            raise refuse(
                f"it was prepared for another model, or for {self.most} drafts and not for {len(flags) - 1}; "
                "prepare it again."
            )
        x = model.embedding
        rows = {"newest": (newest, (1, x.shape[1])), "exit_hidden": (exit_hidden, (self.most + 2, x.shape[1]))}
        for name, (tensor, shape) in rows.items():
            fits = tensor.shape == shape and (tensor.dtype, tensor.device) == (x.dtype, x.device)
            if not fits or not tensor.is_contiguous() or tensor.data_ptr() % VECTOR_BYTES:
                raise refuse(
                    f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}; it must be {list(shape)} "
                    f"{x.dtype} on {x.device}, contiguous, at a multiple of {VECTOR_BYTES} bytes."
                )
        dtypes, devices = (flags.dtype, positions.dtype), {flags.device, positions.device}
        if dtypes != (torch.int32, torch.int64) or devices != {x.device}:
            raise refuse(
                f"flags are {flags.dtype} on {flags.device}, positions {positions.dtype} on {positions.device}; they "
                f"must be int32 and int64 on {x.device}."
            )
        return check_top1("draft_loop", out, self.most, x.device)
