"""A GGUF file, llama.cpp's format, as a checkpoint: configuration, weights, tokenizer and chat template are in it.

Weights are dequantised as they are read. The keys and tensors are those of llama.cpp's ``gguf-py/gguf/constants.py``.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType
from torch import Tensor

from ..errors import KangarooError, reason
from .architectures import find_architecture
from .checkpoint import Checkpoint
from .config import LlamaConfig, parse_config
from .gguf_file import VALUES, GGUFFile

CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
}
"""Keys that every file must have, behind the architecture's name, and transformers' words for them."""

OPTIONAL_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
OTHER_KEYS = {
    "vocab_size",  # the embedding's rows are counted instead: a file may hold more of them
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "tensor_data_layout",
}
"""Keys that are read elsewhere, or that change nothing."""

NEUTRAL = {"attention.causal": True}
"""What further keys may be without changing the model, where that is not 0."""

PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""llama.cpp's names of a layer's parts and of the other tensors, and transformers'."""

EMBEDDING, ROPE_DIVISORS = "token_embd.weight", "rope_freqs.weight"
END_TOKENS = ("eos", "eot", "eom")
"""The ends of a text, of a turn and of a message."""

BOS_UNLESS_TOLD = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Kinds of byte-level vocabularies that llama.cpp begins with BOS where the file leaves it open."""


def open_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file as far as its configuration.

    Raises:
        KangarooError: a file that is damaged, one part of several, or of a model that is not supported.
    """
    file = GGUFFile(path)
    count = file.metadata.get("split.count", 1)
    if count not in (0, 1):
        raise KangarooError(f"{path} is one of {count} parts; join them with llama.cpp's llama-gguf-split --merge.")
    name = file.metadata.get("general.architecture")
    architecture = find_architecture(name, str(path))
    values = _config_values(file, str(name))
    return Checkpoint(
        path=path,
        values=values,
        config=_config(file, values),
        tensors=partial(_tensors, file),
        tokenizer=partial(_tokenizer, file),
        adjacent_pairs=architecture.adjacent_pairs,
        quantized=not _kinds(file) <= set(VALUES),
    )


def _config_values(file: GGUFFile, name: str) -> dict[str, Any]:
    """The file's configuration in transformers' terms."""
    given = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    for key in CONFIG_KEYS:
        if key not in given:
            raise KangarooError(f"{file.path} has no {name}.{key} in its metadata; it holds no whole model.")
    if given.get("expert_count"):
        raise KangarooError(f"{file.path}: a mixture of {given['expert_count']} experts is not supported.")
    values = {word: given[key] for key, word in (CONFIG_KEYS | OPTIONAL_KEYS).items() if key in given}
    for key, value in given.items():
        known = key in CONFIG_KEYS or key in OPTIONAL_KEYS or key in OTHER_KEYS or key.startswith("rope.scaling.")
        if not known and value != NEUTRAL.get(key, 0):
            raise KangarooError(f"{file.path}: {key!r} is {value!r}; models with this setting are not supported.")
    if EMBEDDING not in file.tensors:
        raise KangarooError(f"{file.path} has no tensor {EMBEDDING!r}; it holds no whole model.")
    values |= {
        "model_type": name,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_values(given),
        "eos_token_id": _end_tokens(file.metadata),
        "dtype": _stored_dtype(file),
    }
    if not values.get("sliding_window"):
        values["sliding_window"] = None
    return values


def _rope_values(given: dict[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` in transformers' terms; ``parse_config`` refuses types that are not supported."""
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    kind = given.get("rope.scaling.type", "none" if factor in (None, 1.0) else "linear")
    values = {"rope_theta": given.get("rope.freq_base", 10000.0), "rope_type": "default" if kind == "none" else kind}
    return values if kind == "none" else values | {"factor": factor}


def _end_tokens(metadata: dict[str, Any]) -> list[int]:
    found = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in END_TOKENS)
    return list(dict.fromkeys(token for token in found if token is not None))


def _kinds(file: GGUFFile) -> set[GGMLQuantizationType]:
    """What the matrices are stored in."""
    return {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}


def _stored_dtype(file: GGUFFile) -> str:
    """In which a GPU keeps the weights: the file's own; bfloat16 for blocks, whose range fits every model."""
    kinds = _kinds(file)
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F64}:
        return "float32"
    return "float16" if kinds <= set(VALUES) and GGMLQuantizationType.BF16 not in kinds else "bfloat16"


def _config(file: GGUFFile, values: dict[str, Any]) -> LlamaConfig:
    """The configuration, with what only the tensors tell."""
    config = parse_config(values, file.path)
    for key in ("attention.value_length", "rope.dimension_count"):
        size = file.metadata.get(f"{values['model_type']}.{key}", config.head_dim)
        if size != config.head_dim:
            raise KangarooError(
                f"{file.path}: {values['model_type']}.{key} is {size}, but a head has {config.head_dim} values; such "
                "models are not supported."
            )
    divisors: tuple[float, ...] = ()
    if ROPE_DIVISORS in file.tensors:
        divisors = tuple(file.read(ROPE_DIVISORS).flatten().tolist())
        if len(divisors) != config.head_dim // 2 or not all(divisor > 0 for divisor in divisors):
            raise KangarooError(f"{file.path}: {ROPE_DIVISORS!r} must hold {config.head_dim // 2} numbers above 0.")
    return replace(
        config,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        rope=replace(config.rope, divisors=divisors),
    )


def _tensors(file: GGUFFile) -> Iterator[tuple[str, Tensor]]:
    for name in file.tensors:
        if name != ROPE_DIVISORS:
            yield transformers_name(name), file.read(name)


def transformers_name(name: str) -> str:
    """Transformers' name of llama.cpp's tensor; one that is not known stays as it is."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in PARTS:
        return f"model.layers.{found[1]}.{PARTS[found[2]]}.{found[3]}"
    return WHOLE.get(name, name)


def _tokenizer(file: GGUFFile) -> Any:
    """The tokenizer through transformers; None where the file holds none."""
    if file.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        return None
    from transformers import PreTrainedTokenizerFast

    settings: dict[str, Any] = {"gguf_file": file.path.name}
    if file.metadata.get("tokenizer.ggml.pre") in BOS_UNLESS_TOLD:
        settings["add_bos_token"] = True
    try:
        return PreTrainedTokenizerFast.from_pretrained(file.path.parent, **settings)
    except Exception as error:  # each tokenizer library raises its own kinds
        raise KangarooError(f"{file.path}: the tokenizer cannot be loaded ({reason(error)}).") from error
