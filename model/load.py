"""From names to a loaded model: devices, dtypes, and a target with its adapter and tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from kangaroo_kernels.reference.attention import rows_are_alike

from .backend import load_backend
from .drafters.adapter import Adapter, AdapterConfig, load_adapter_config
from .drafters.kangaroo import check_persistent
from .drafters.ways import Way, check_way, choose_way
from .errors import KangarooError
from .loop.threads import own_state
from .named import find_pair
from .target.checkpoint import Checkpoint, open_folder
from .target.config import DTYPES, LlamaConfig
from .target.hub import GGUF, find_folder, find_model
from .target.llama import Llama
from .target.weights import load_target


class Loaded(NamedTuple):
    """What a checkpoint and an adapter's folder hold.

    Attributes:
        target: the model.
        adapter: None where none was asked for.
        tokenizer: None where the checkpoint has none.
        way: how the adapter drafts; chains without one.
    """

    target: Llama
    adapter: Adapter | None
    tokenizer: Any
    way: Way


def open_model(name_or_path: str | Path) -> Checkpoint:
    """Find a model's files, download them if necessary, and read their configuration.

    Raises:
        KangarooError: as ``find_model``, ``open_folder`` and ``open_gguf``.
    """
    path = find_model(name_or_path)
    if path.suffix != GGUF:
        return open_folder(path)
    from .target.gguf import open_gguf

    return open_gguf(path)


class Opened(NamedTuple):
    """The files of a model and of an adapter for it, whose configurations were read and fit together.

    Attributes:
        checkpoint: the model's.
        folder: the adapter's; None where neither the caller nor the model's name gives one.
        adapter: what its ``config.json`` says; likewise.
    """

    checkpoint: Checkpoint
    folder: Path | None = None
    adapter: AdapterConfig | None = None


def open_pair(model: str | Path, adapter: str | Path | None = None, exit_layer: int | None = None) -> Opened:
    """Find a model and an adapter, and read their configurations; arguments as for ``Kangaroo.from_pretrained``.

    Raises:
        KangarooError: as ``find_pair``, ``open_model`` and ``load_adapter_config``; an exit layer without an adapter.
    """
    model, adapter = find_pair(model, adapter)
    if exit_layer is not None and adapter is None:
        raise KangarooError("exit_layer was given without an adapter; give both or neither.")
    checkpoint = open_model(model)
    if adapter is None:
        return Opened(checkpoint)
    folder = find_folder(adapter, "adapter")
    return Opened(checkpoint, folder, load_adapter_config(folder, checkpoint.config, exit_layer))


def load_pair(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    exit_layer: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    kernels: str | None = None,
    kv_dtype: str | torch.dtype | None = None,
    draft_tree: int | None = None,
    prompt_lookup: bool | None = None,
    persistent: bool = False,
) -> Loaded:
    """Load a checkpoint and perhaps an adapter for it; arguments and errors as for ``Kangaroo.from_pretrained``."""
    where = resolve_device(device)
    checkpoint, folder, trained = open_pair(model, adapter, exit_layer)
    config = checkpoint.config
    precision = resolve_dtype(dtype, where, config.dtype)
    backend = load_backend(kernels, where, precision)
    kept = kept_dtype(precision, where, backend.resident)
    keys_and_values = resolve_kv_dtype(kv_dtype, precision, kept, config)
    # what can fail quickly comes before the weights
    way = choose_way(None if trained is None else trained.way, draft_tree, prompt_lookup, persistent=persistent)
    if trained is not None:
        check_way(trained.parts, way, keys_and_values == kept)
    if trained is not None and persistent and where.type == "cuda":
        check_persistent(kept, config, trained.llama)
    tokenizer = checkpoint.tokenizer()
    weights = load_target(
        checkpoint.tensors(),
        config,
        where,
        kept,
        backend.layout,
        source=str(checkpoint.path),
        adjacent_pairs=checkpoint.adjacent_pairs,
        rounded_to=precision,
    )
    target = Llama(config, weights, backend, keys_and_values)
    loaded = None if folder is None else Adapter.load(folder, target, exit_layer)
    return Loaded(target, loaded, tokenizer, way)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU where there is one; ``cuda`` without a number is the current one.

    Raises:
        KangarooError: an unknown name, or a GPU that is not there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise KangarooError(f"device {device!r} is unknown; use 'cpu' or 'cuda'.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise KangarooError(f"device {device!r} is not supported; use 'cpu' or 'cuda'.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise KangarooError(f"device {str(device)!r} was asked for, but PyTorch sees no CUDA GPU here.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise KangarooError(
            f"device {device!r} does not exist; PyTorch sees {torch.cuda.device_count()} CUDA GPUs here."
        )
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype asked for; else float32 on a CPU and the checkpoint's own on a GPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else stored
    resolved = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise KangarooError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
    return resolved


def resolve_kv_dtype(
    dtype: str | torch.dtype | None, precision: torch.dtype, kept: torch.dtype, config: LlamaConfig
) -> torch.dtype:
    """What keys and values are kept in: what the model computes with (``kept``), unless float16 was asked for.

    Float16 is for a CPU and weights of that ``precision``. Such weights give a row the same bits in any pass, and so
    must attention: else a key could be rounded another way in a pass of many rows than in plain decoding.

    Raises:
        KangarooError: any other dtype, a model that it is not for, or a machine that does not keep a row's bits.
    """
    if dtype is None:
        return kept
    if dtype not in ("float16", torch.float16):
        raise KangarooError(f"kv_dtype {dtype!r} is not supported; use 'float16', or leave it out.")
    if kept != torch.float32:
        raise KangarooError(f"kv_dtype is for a CPU's float32 arithmetic, this model computes in {kept}; leave it out.")
    if precision != torch.float16:
        raise KangarooError("kv_dtype='float16' goes with weights that are rounded alike; give dtype='float16', too.")
    with own_state(torch.device("cpu")):
        alike = rows_are_alike(config.num_attention_heads // config.num_key_value_heads, config.head_dim)
    if not alike or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise KangarooError(
            "kv_dtype='float16' needs products that give a row the same bits in any pass, which this processor's "
            "libraries do not; leave it out."
        )
    return torch.float16


def kept_dtype(precision: torch.dtype, device: torch.device, resident: bool = False) -> torch.dtype:
    """What weights of a ``precision`` are computed with: float32 on a CPU, unless kernels are interpreted there.

    A processor's own arithmetic in fp16 or bf16 is slower and coarser, and ``PackedWeight`` keeps such numbers in half
    the bytes of a float32 all the same.
    """
    return torch.float32 if device.type == "cpu" and not resident else precision
