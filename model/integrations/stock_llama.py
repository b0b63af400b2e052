"""A Kangaroo drafter as a stock Llama: its ``config.json`` and its tensors.

The layers are the target's first ones, then the adapter as one more; the MLP of an adapter of attention alone is zero
(``h + attention(rms_norm(h)) + 0``). The final norm is the adapter's, the head is the target's. Any engine's
``LlamaForCausalLM`` computes that without a change.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drafters.adapter import AdapterConfig
from ..errors import KangarooError
from ..load import open_pair
from ..named import find_pair
from ..target.checkpoint import Checkpoint, read_tensors
from ..target.config import LlamaConfig
from .heads import Heads, common_heads, spread
from .stock_folder import stock_config, stock_tensors

TARGETS_ALONE = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""Entries of a target's ``config.json`` that are null or count its layers."""


@dataclass(frozen=True)
class Pair:
    """A target's files, an adapter's folder, and what their configurations say."""

    checkpoint: Checkpoint
    adapter: Path
    adapter_config: AdapterConfig

    @classmethod
    def find(cls, model: str | Path, adapter: str | Path | None, exit_layer: int | None) -> "Pair":
        """Find both folders and check that they belong together; arguments as for ``Kangaroo.from_pretrained``.

        Raises:
            KangarooError: no adapter, one of another model, or an exit layer that the target does not have.
        """
        if find_pair(model, adapter)[1] is None:  # before anything is downloaded
            raise KangarooError("no adapter was given; give the folder or the hub name of one.")
        checkpoint, folder, trained = open_pair(model, adapter, exit_layer)
        assert folder is not None
        assert trained is not None
        return cls(checkpoint, folder, trained)

    @property
    def target(self) -> Path:
        """The target's folder or file."""
        return self.checkpoint.path

    @property
    def target_config(self) -> LlamaConfig:
        """The target's configuration."""
        return self.checkpoint.config

    @cached_property
    def heads(self) -> Heads:
        """What every layer of the drafter has."""
        target, adapter = self.target_config, self.adapter_config.llama
        return common_heads(target.hidden_size, _heads_of(target), _heads_of(adapter))

    @property
    def intermediate_size(self) -> int:
        """Of every layer's MLP."""
        return max(self.target_config.intermediate_size, self.adapter_config.llama.intermediate_size)


def check_exportable(pair: Pair) -> None:
    """Check that target and adapter agree in what a stock Llama has only once; heads and MLPs may differ in size.

    Raises:
        KangarooError: they do not.
    """
    target, adapter = pair.target_config, pair.adapter_config.llama
    refuse_parts(pair.adapter_config, pair.adapter)
    for name, ours, theirs in (
        ("head_dim", adapter.head_dim, target.head_dim),
        ("rms_norm_eps", _as_float32(adapter.rms_norm_eps), _as_float32(target.rms_norm_eps)),
        ("RoPE", adapter.rope, target.rope),
    ):
        if ours != theirs:
            raise KangarooError(
                f"{pair.adapter}: the adapter's {name} is {ours}, the target's is {theirs}; a stock Llama has one for "
                "all its layers and cannot hold this drafter exactly."
            )


def refuse_parts(adapter: AdapterConfig, folder: Path) -> None:
    """Raise for an adapter whose parts a drafter that is a model of its own cannot have.

    A trained confidence is left out: other engines hold the softmax's probability against their threshold.
    """
    parts = adapter.parts
    if parts.draft_head_rank or parts.draft_block:
        heads = "head of two factors", "--draft-head-rank"
        part, option = heads if parts.draft_head_rank else ("block", "--draft-block")
        raise KangarooError(
            f"{folder}: the adapter has a {part}, for which a stock Llama has no place. Train one without {option} "
            "for other engines."
        )
    if parts.deep_state_size:
        raise KangarooError(
            f"{folder}: the adapter has a deep state, which is the target's last layer's output; a drafter outside of "
            "the target cannot have it. Train one without --deep-state-size for other engines."
        )


def assisted_settings(adapter: AdapterConfig) -> dict[str, Any]:
    """An adapter's defaults in the terms of transformers' ``GenerationConfig``.

    transformers drafts as Kangaroo does: an unsure draft is the last one, and it is verified.
    """
    return {
        "num_assistant_tokens": adapter.num_speculative_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": adapter.draft_confidence_threshold,
    }


def drafter_config(pair: Pair) -> dict[str, Any]:
    """The drafter's ``config.json``: the target's own, as engines already read it, with other layers and heads."""
    values = stock_config(pair.checkpoint)
    configs = pair.target_config, pair.adapter_config.llama
    return {name: value for name, value in values.items() if name not in TARGETS_ALONE} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": pair.adapter_config.exit_layer + 1,
        "num_attention_heads": pair.heads.query,
        "num_key_value_heads": pair.heads.key_value,
        "head_dim": pair.target_config.head_dim,
        "intermediate_size": pair.intermediate_size,
        "attention_bias": any(config.qkv_bias or config.output_bias for config in configs),
        "mlp_bias": any(config.has_mlp and config.mlp_bias for config in configs),
    }


def drafter_tensors(pair: Pair) -> dict[str, Tensor]:
    """The drafter's tensors under transformers' names, each in the dtype that it is stored in.

    Raises:
        KangarooError: a tensor is missing or has another shape than its ``config.json`` asks for.
    """
    from transformers import LlamaConfig as StockConfig
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        stock = LlamaForCausalLM(StockConfig(**drafter_config(pair))).state_dict()
    if pair.target_config.tie_word_embeddings:
        stock.pop("lm_head.weight", None)
    tensors = {name: tensor for name, tensor in _given(pair) if name in stock}
    for name, like in stock.items():
        if name not in tensors and _is_zero(name, pair):
            tensors[name] = torch.zeros(like.shape, dtype=pair.target_config.dtype)
        if name not in tensors:
            raise KangarooError(f"{pair.target} and {pair.adapter}: the drafter's tensor {name!r} is in neither.")
        if tensors[name].shape != like.shape:
            raise KangarooError(
                f"{pair.target} and {pair.adapter}: the drafter's tensor {name!r} has the shape "
                f"{list(tensors[name].shape)}; their config.json ask for {list(like.shape)}."
            )
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _given(pair: Pair) -> Iterator[tuple[str, Tensor]]:
    """What the checkpoints hold of the drafter, under its names and with its heads."""
    exit_layer = pair.adapter_config.exit_layer
    for name, tensor in stock_tensors(pair.checkpoint):
        layer = _layer(name)
        if (layer is None and name != "model.norm.weight") or (layer is not None and layer < exit_layer):
            yield name, _fitted(name, tensor, pair.target_config, pair)
    for name, tensor in read_tensors(pair.adapter):
        renamed = f"model.{name}".replace("model.layers.0.", f"model.layers.{exit_layer}.")
        yield renamed, _fitted(renamed, tensor, pair.adapter_config.llama, pair)


def _layer(name: str) -> int | None:
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if number.isdigit() else None


def _is_zero(name: str, pair: Pair) -> bool:
    """Whether a tensor is one that its layer has not, though a stock layer has it."""
    is_adapter = _layer(name) == pair.adapter_config.exit_layer
    config = pair.adapter_config.llama if is_adapter else pair.target_config
    if ".mlp." in name or "post_attention_layernorm" in name:
        return not config.has_mlp or (name.endswith("bias") and not config.mlp_bias)
    has_bias = config.output_bias if ".o_proj." in name else config.qkv_bias
    return name.endswith("_proj.bias") and ".self_attn." in name and not has_bias


def _fitted(name: str, tensor: Tensor, config: LlamaConfig, pair: Pair) -> Tensor:
    """A tensor of a layer of ``config`` with the drafter's heads and MLP, where it is one of these."""
    part = name.rpartition("_proj.")[0].rpartition(".")[2]
    if ".mlp." in name:
        return _widened(part, name, tensor, config, pair)
    if part not in ("q", "k", "v", "o"):
        return tensor
    own = _heads_of(config)
    rows = config.head_dim * (own.query if part in "qo" else own.key_value)
    if tensor.shape[1 if part == "o" else 0 :][:1] != (rows,) and not (part == "o" and tensor.dim() == 1):
        raise KangarooError(
            f"{pair.target} and {pair.adapter}: the drafter's tensor {name!r} has the shape {list(tensor.shape)}; its "
            f"config.json asks for {own.query} attention heads on {own.key_value} key-value heads of {config.head_dim}."
        )
    return spread(part, tensor, own, pair.heads)


def _widened(part: str, name: str, tensor: Tensor, config: LlamaConfig, pair: Pair) -> Tensor:
    """A tensor of an MLP with the drafter's inner size; what is new is zero, of which ``silu(0) * 0`` stays zero."""
    if not config.has_mlp:
        raise KangarooError(
            f"{pair.adapter} holds an MLP, of which its config.json says nothing; with one, it has mlp true."
        )
    if part == "down" and tensor.dim() == 1:
        return tensor
    axis, own = int(part == "down"), config.intermediate_size
    if tensor.shape[axis : axis + 1] != (own,):
        raise KangarooError(
            f"{pair.target} and {pair.adapter}: the drafter's tensor {name!r} has the shape {list(tensor.shape)}; its "
            f"config.json asks for an MLP of {own}."
        )
    missing = pair.intermediate_size - own
    return F.pad(tensor, (0, missing) if axis or tensor.dim() == 1 else (0, 0, 0, missing))


def _as_float32(number: float) -> float:
    """As GGUF files store it and as it is computed with."""
    return torch.tensor(number, dtype=torch.float32).item()


def _heads_of(config: LlamaConfig) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads)
