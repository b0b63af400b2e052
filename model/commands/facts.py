"""What runs on this machine, and how many bytes a model's steps read: ``kangaroo info``, without loading weights."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kangaroo_kernels import __version__
from kangaroo_kernels.packed_weight import Layout

from ..drafters.adapter import AdapterConfig
from ..drafters.ways import CHAINS
from ..load import kept_dtype, open_pair, resolve_device, resolve_dtype, resolve_kv_dtype
from ..request import LED_BY_HOST
from ..target.architectures import ARCHITECTURES
from ..target.config import DTYPES, SUPPORTED_ROPE_TYPES, LlamaConfig


@dataclass(frozen=True)
class Environment:
    """The machine and the software.

    Attributes:
        versions: of each package; None for one that is not installed.
        devices: PyTorch's name and a description of each.
        operations: what runs the operations, in general and on this machine.
        supported: the kinds of checkpoints that load, the settings whose loop the host leads on a GPU, too, and the
            layouts that packed weights can take on this CPU.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    operations: str
    supported: dict[str, list[str]]


def environment() -> Environment:
    """Find out about this machine and its software."""
    return Environment(
        versions={
            "kangaroo-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        },
        devices=_devices(),
        operations="Triton kernels on a GPU, PyTorch references on a CPU; by default here: " + _default_operations(),
        supported={
            "model_types": list(ARCHITECTURES),
            "rope_types": list(SUPPORTED_ROPE_TYPES),
            "dtypes": list(DTYPES),
            "led_by_host": list(LED_BY_HOST),
            "cpu_layouts": [layout.name.lower() for layout in Layout if _available(layout)],
        },
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _default_operations() -> str:
    return "Triton kernels" if torch.cuda.is_available() else "PyTorch references"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {"cpu": f"{_processor()}, {os.cpu_count()} cores, {capability}"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    return devices


def _processor() -> str:
    """The processor's name as Linux gives it; elsewhere, or where it has none, its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _available(layout: Layout) -> bool:
    if layout is Layout.FP16:
        return "fbgemm" in torch.backends.quantized.supported_engines
    return layout is not Layout.ONEDNN or torch.backends.mkldnn.is_available()


@dataclass(frozen=True)
class Footprint:
    """A model's shape, and the bytes of weights that each kind of step reads once.

    A CPU with FBGEMM reads two bytes of a weight that is stored in 16 bits or rounded to them; a matrix that does not
    fit into scaled fp16 (``PackedWeight``) takes four there, which only reading it would tell.

    Attributes:
        dtype: the one that the weights are rounded to.
        exit_layer: how many of ``layers`` run before the adapter; None without one, as is every field about drafting.
        adapter_parameters: of the adapter alone; unless it has one of its own, it shares the target's head.
        plain_step_bytes: all layers and the head.
        draft_vocab_size: how many tokens the adapter may draft, and rows its head has; None where it has all.
        draft_step_bytes: the first ``exit_layer`` layers, adapter and its head.
        verify_pass_bytes: the other layers and the head, whatever the number of drafts.
        kv_bytes_per_token: keys and values of all layers, the adapter's included.
        drafting: how long drafts are unless a caller says otherwise.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    device: str
    dtype: str
    target_parameters: int
    plain_step_bytes: int
    kv_bytes_per_token: int
    exit_layer: int | None = None
    adapter_parameters: int | None = None
    draft_vocab_size: int | None = None
    draft_step_bytes: int | None = None
    verify_pass_bytes: int | None = None
    drafting: str | None = None


def footprint(
    model: str | Path,
    adapter: str | Path | None = None,
    exit_layer: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> Footprint:
    """Read the configurations of a model and perhaps an adapter; arguments as for ``Kangaroo.from_pretrained``.

    Raises:
        KangarooError: as ``Kangaroo.from_pretrained`` does.
    """
    where = resolve_device(device)
    checkpoint, _, trained = open_pair(model, adapter, exit_layer)
    config = checkpoint.config
    loaded = resolve_dtype(dtype, where, config.dtype)
    kept = kept_dtype(loaded, where)
    size = _weight_size(torch.float32 if checkpoint.quantized else config.dtype, loaded, where)
    kv_size = resolve_kv_dtype(kv_dtype, loaded, kept, config).itemsize
    layer = config.attention_parameters + config.mlp_parameters
    norm, embedding = config.hidden_size, config.vocab_size * config.hidden_size
    head = norm + embedding
    layers = config.num_hidden_layers * layer
    kv_bytes = config.num_hidden_layers * _kv_values(config) * kv_size
    drafter: dict[str, Any] = {}
    if trained is not None:
        shallow = trained.exit_layer * layer
        own = trained.parameters
        own_size = _weight_size(trained.llama.dtype, loaded, where)
        kv_bytes += _kv_values(trained.llama) * kv_size
        drafted = None if trained.vocabulary is None else len(trained.vocabulary.tokens)
        rows, rank = drafted or config.vocab_size, trained.parts.draft_head_rank
        shared, unread = (0, (config.vocab_size - rows) * rank) if rank else (rows * config.hidden_size, 0)
        drafter = {
            "exit_layer": trained.exit_layer,
            "adapter_parameters": own,
            "draft_vocab_size": drafted,
            "draft_step_bytes": (shallow + shared) * size + (own - unread) * own_size,
            "verify_pass_bytes": (layers - shallow + head) * size,
            "drafting": _drafting(trained),
        }
    return Footprint(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        device=str(where),
        dtype=str(loaded).removeprefix("torch."),
        target_parameters=layers + head + (0 if config.tie_word_embeddings else embedding),
        plain_step_bytes=(layers + head) * size,
        kv_bytes_per_token=kv_bytes,
        **drafter,
    )


def _weight_size(stored: torch.dtype, rounded_to: torch.dtype, device: torch.device) -> int:
    """Bytes of a weight as it is packed: on a CPU, FBGEMM keeps all that 16 bits hold in two."""
    if device.type == "cpu" and _available(Layout.FP16):
        return min(stored.itemsize, rounded_to.itemsize)
    return kept_dtype(rounded_to, device).itemsize


def _drafting(adapter: AdapterConfig) -> str:
    drafts, block = adapter.num_speculative_tokens, adapter.parts.draft_block
    most = f"{min(drafts, block)} drafts in one pass" if block else f"{drafts} drafts"
    limits = f"up to {most}, threshold {adapter.draft_confidence_threshold:g}"
    limits = f"auto where the host leads the loop (a CPU), else {limits}" if adapter.calibrated else limits
    return limits if adapter.way == CHAINS else f"{adapter.way}; {limits}"


def _kv_values(config: LlamaConfig) -> int:
    """Numbers that one attention layer keeps of a token."""
    return 2 * config.num_key_value_heads * config.head_dim
