"""A Kangaroo drafter as a stock Llama: its ``config.json`` and its tensors.

The layers are the target's first ones, then the adapter in the place of a decoder layer whose MLP is zero
(``h + attention(rms_norm(h)) + 0``); the final norm is the adapter's, the head is the target's. Any engine's
``LlamaForCausalLM`` computes that without a change.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafters.adapter import AdapterConfig, load_adapter_config
from ..errors import KangarooError
from ..load import open_model
from ..named import find_pair
from ..target.checkpoint import Checkpoint, read_tensors
from ..target.config import LlamaConfig
from ..target.hub import GGUF, find_folder
from .heads import Heads, common_heads, separate_pairs, spread

TARGETS_ALONE = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
"""Entries of a target's ``config.json`` that are null or count its layers."""


@dataclass(frozen=True)
class Pair:
    """The files of a target and the folder of an adapter, and what their configurations say."""

    checkpoint: Checkpoint
    adapter: Path
    adapter_config: AdapterConfig

    @classmethod
    def find(cls, model: str | Path, adapter: str | Path | None, exit_layer: int | None) -> "Pair":
        """Find both and check that they belong together; arguments as for ``Kangaroo.from_pretrained``.

        Raises:
            KangarooError: no adapter, one of another model, or an exit layer that the target does not have.
        """
        model, adapter = find_pair(model, adapter)
        if adapter is None:
            raise KangarooError("no adapter was given; give the folder or the hub name of one.")
        checkpoint = open_model(model)
        adapter_folder = find_folder(adapter, "adapter")
        return cls(checkpoint, adapter_folder, load_adapter_config(adapter_folder, checkpoint.config, exit_layer))

    @property
    def target(self) -> Path:
        """The target's folder or GGUF file."""
        return self.checkpoint.path

    @property
    def target_config(self) -> LlamaConfig:
        """What its configuration says."""
        return self.checkpoint.config

    @property
    def is_folder(self) -> bool:
        """Whether the target is a Hugging Face folder."""
        return self.target.suffix != GGUF

    @cached_property
    def heads(self) -> Heads:
        """What every layer of the drafter has."""
        target, adapter = self.target_config, self.adapter_config.llama
        return common_heads(target.hidden_size, _heads_of(target), _heads_of(adapter))


def check_exportable(pair: Pair) -> None:
    """Check that target and adapter agree in what a stock Llama has only once; head counts may differ.

    Raises:
        KangarooError: they do not.
    """
    target, adapter = pair.target_config, pair.adapter_config.llama
    if target.rope.divisors:
        raise KangarooError(
            f"{pair.target} names its RoPE frequencies one by one, which a stock Llama cannot; export from the model's "
            "Hugging Face folder."
        )
    for name, ours, theirs in (
        ("head_dim", adapter.head_dim, target.head_dim),
        ("rms_norm_eps", adapter.rms_norm_eps, target.rms_norm_eps),
        ("RoPE", adapter.rope, target.rope),
    ):
        if ours != theirs:
            raise KangarooError(
                f"{pair.adapter}: the adapter's {name} is {ours}, the target's is {theirs}; a stock Llama has one for "
                "all its layers and cannot hold this drafter exactly."
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
    """The drafter's ``config.json``: the target's own, as engines already read it, with other layers and heads.

    What a GGUF file holds in blocks is written in the float32 that they stand for.
    """
    if pair.is_folder:
        values: dict[str, Any] = json.loads((pair.target / "config.json").read_text(encoding="utf-8"))
    else:
        values = pair.checkpoint.values | {"dtype": "float32", "bos_token_id": None}
    return {name: value for name, value in values.items() if name not in TARGETS_ALONE} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": pair.adapter_config.exit_layer + 1,
        "num_attention_heads": pair.heads.query,
        "num_key_value_heads": pair.heads.key_value,
        "head_dim": pair.target_config.head_dim,
        "attention_bias": any(
            config.qkv_bias or config.output_bias for config in (pair.target_config, pair.adapter_config.llama)
        ),
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
    head_dim, adjacent = pair.target_config.head_dim, pair.checkpoint.adjacent_pairs
    for name, tensor in pair.checkpoint.tensors():
        layer = _layer(name)
        if (layer is None and name != "model.norm.weight") or (layer is not None and layer < exit_layer):
            if adjacent and any(part in name for part in ("q_proj", "k_proj")):
                tensor = separate_pairs(tensor, head_dim)  # noqa: PLW2901
            yield name, _with_heads(name, tensor, pair.target_config, pair)
    for name, tensor in read_tensors(pair.adapter):
        renamed = f"model.{name}".replace("model.layers.0.", f"model.layers.{exit_layer}.")
        yield renamed, _with_heads(renamed, tensor, pair.adapter_config.llama, pair)


def _layer(name: str) -> int | None:
    number = name.removeprefix("model.layers.").partition(".")[0]
    return int(number) if number.isdigit() else None


def _is_zero(name: str, pair: Pair) -> bool:
    """Whether a tensor is one that its layer has not, though a stock layer has it."""
    is_adapter = _layer(name) == pair.adapter_config.exit_layer
    if is_adapter and (".mlp." in name or "post_attention_layernorm" in name):
        return True
    config = pair.adapter_config.llama if is_adapter else pair.target_config
    has_bias = config.output_bias if ".o_proj." in name else config.qkv_bias
    return name.endswith("_proj.bias") and ".self_attn." in name and not has_bias


def _with_heads(name: str, tensor: Tensor, config: LlamaConfig, pair: Pair) -> Tensor:
    """A tensor of a layer of ``config``, where it is one of attention with the drafter's heads."""
    part = name.partition(".self_attn.")[2].partition("_proj.")[0]
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


def _heads_of(config: LlamaConfig) -> Heads:
    return Heads(config.num_attention_heads, config.num_key_value_heads)
