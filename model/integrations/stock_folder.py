"""A checkpoint as a stock Hugging Face folder: as it is, or written anew where it is a GGUF file."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kangaroo_kernels.reference.qkv_rope import separate_rope

from ..errors import KangarooError
from ..target.checkpoint import Checkpoint
from ..target.config import GENERATION_CONFIG

TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
MODEL_FILES = ("config.json", GENERATION_CONFIG, "model*.safetensors*", "pytorch_model*.bin*", *TOKENIZER_FILES)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
EMBEDDING = "model.embed_tokens.weight"


def stock_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's ``config.json``: its own, or what transformers would have written for a GGUF file.

    Raises:
        KangarooError: a GGUF file with divisors of RoPE's angles, for which a ``config.json`` has no entry.
    """
    path = checkpoint.path
    if path.is_dir():
        values: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return values
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if config.rope.divisors:
        raise KangarooError(
            f"{path}: the file divides the angles of RoPE by numbers of its own, for which a config.json has no entry; "
            "export from the model's Hugging Face folder."
        )
    kind = checkpoint.values["model_type"]
    values = {
        **checkpoint.values,
        "architectures": [CLASSES[kind]],
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias or config.output_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        "rope_theta": config.rope.theta,  # where transformers 4 looks for it
    }
    return AutoConfig.for_model(**values).to_dict()


def stock_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, with the rows of queries and keys in transformers' order."""
    for name, tensor in checkpoint.tensors():
        is_turned = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        turn = checkpoint.adjacent_pairs and is_turned
        yield name, separate_rope(tensor, checkpoint.config.head_dim) if turn else tensor


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write weights and their ``config.json``, which comes last: a folder that has it is whole."""
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", values)


def write_stock_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """The whole checkpoint in a new ``folder``; a folder's files are linked where the file system can, else copied."""
    values = stock_config(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint.path.is_dir():
        for path in matching(checkpoint.path, MODEL_FILES):
            _link(path, folder / path.name)
        return
    tensors = {name: tensor.contiguous() for name, tensor in stock_tensors(checkpoint)}
    write_tokenizer(checkpoint, folder)
    write_json(folder / GENERATION_CONFIG, generation_config(checkpoint, values))
    write_checkpoint(folder, tensors, values | {"dtype": dtype_name(tensors)})


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy a folder's tokenizer files, or write a GGUF file's tokenizer."""
    if checkpoint.path.is_dir():
        for path in matching(checkpoint.path, TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
    elif (tokenizer := checkpoint.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)


def generation_config(checkpoint: Checkpoint, values: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's ``generation_config.json``, or the special tokens of its configuration."""
    path = checkpoint.path / GENERATION_CONFIG
    if path.is_file():
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return settings
    return {name: values[name] for name in SPECIAL_TOKENS if values.get(name) is not None}


def dtype_name(tensors: dict[str, Tensor]) -> str:
    """The dtype that holds the weights, as a ``config.json`` calls it."""
    return str(tensors[EMBEDDING].dtype).removeprefix("torch.")


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The folder's own files that match any of the patterns."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _link(source: Path, place: Path) -> None:
    """The same file under a second name, which takes no space; a copy where the file system cannot."""
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file as transformers writes one."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
