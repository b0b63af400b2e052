"""Small GGUF files, written by the ``gguf`` package out of checkpoints that transformers wrote."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize
from safetensors.torch import load_file

from kangaroo_kernels.model.target.gguf import PARTS, WHOLE

TOKENS = ["<unk>", "<s>", "</s>", "<|eot|>", *(chr(code) for code in range(33, 95)), "AB"]
"""67 tokens of a byte-level vocabulary with one merge."""


def llama_cpp_name(name: str) -> str:
    """llama.cpp's name of transformers' tensor."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found:
        part = next(ours for ours, theirs in PARTS.items() if theirs == found[2])
        return f"blk.{found[1]}.{part}.{found[3]}"
    return next(ours for ours, theirs in WHOLE.items() if theirs == name)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as llama.cpp's converter writes them for Llama: the two halves of each head by turns."""
    size = len(rows) // heads
    order = np.arange(len(rows)).reshape(heads, 2, size // 2).swapaxes(1, 2).ravel()
    return rows[order]


def blocks(rows: int, columns: int, kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random bytes of a block format that the package only reads; below 16, each float16 of them is below 0.0005."""
    block, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 16, (rows, columns // block * size), dtype=np.uint8)


def write_gguf(
    path: Path,
    folder: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    changed: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The checkpoint in ``folder`` as a GGUF file.

    Args:
        kind: of all matrices; norms and biases stay float32.
        architecture: whether query and key rows are permuted depends on it, as in llama.cpp.
        changed: further metadata, or other values for it; None leaves a key out.
        tensors: further tensors.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    metadata: dict[str, Any] = {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{architecture}.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 4 + [1] * (len(TOKENS) - 4),
        "tokenizer.ggml.merges": ["A B"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    writer = GGUFWriter(path, architecture)
    for key, value in (metadata | (changed or {})).items():
        add = {str: writer.add_string, float: writer.add_float32, list: writer.add_array, bool: writer.add_bool}
        if value is not None:
            add.get(type(value), writer.add_uint32)(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for seed, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        values = tensor.float().numpy()
        part = name.split(".")[-2]
        if architecture == "llama" and part in heads:
            values = permuted(values, heads[part])
        if values.ndim == 1:
            writer.add_tensor(llama_cpp_name(name), values)
            continue
        try:
            stored = quantize(values, kind)
        except NotImplementedError:
            stored = blocks(*values.shape, kind, seed)
        writer.add_tensor(llama_cpp_name(name), stored, raw_dtype=kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
