"""Tiny random targets, adapters and tokenizers, written as the folders a user would have."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kangaroo_kernels.model.drafters.vocabulary import write_draft_vocabulary


def make_target(
    folder: Path,
    *,
    vocab_size: int = 67,
    hidden_size: int = 48,
    intermediate_size: int = 80,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    std: float = 0.25,
    seed: int = 0,
    quiet_from: int | None = None,
    quiet: float = 0.1,
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
    **config: Any,
) -> Path:
    """A random checkpoint in ``folder``, written by transformers; ``config`` goes to its configuration.

    Args:
        std: of every matrix but the embedding (1); from 0.15 on, greedy text does not fall into a loop at once.
        quiet_from: layers from here on add only ``quiet`` times what they would, so that the next token is nearly
            decided before them and a drafter can be right.
        dtype: the weights are drawn in float32 and stored in this one.
        family: transformers' ``model_type``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(settings | config))).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(noise if "embed_tokens" in name else std * noise)
        if quiet_from is not None:
            for layer in model.model.layers[quiet_from:]:
                layer.self_attn.o_proj.weight.mul_(quiet)
                layer.mlp.down_proj.weight.mul_(quiet)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    target: Path,
    *,
    exit_layer: int | None,
    copy_layer: int | None = None,
    mlp: bool = False,
    deep_state_size: int = 0,
    draft_head_rank: int = 0,
    draft_block: int = 0,
    trained_confidence: bool = False,
    std: float = 0.25,
    seed: int = 1,
    **config: Any,
) -> Path:
    """An adapter folder for the checkpoint in ``target`` (a single ``model.safetensors``).

    Args:
        exit_layer: written to its ``config.json``; None writes none, as the paper's authors do.
        copy_layer: takes this target layer's attention and the target's final norm, so that the adapter agrees with
            the target now and then; None draws everything at random.
        mlp: whether it has that layer's MLP, too.
        deep_state_size: the inner size of a SwiGLU over its deep state, drawn at random; 0 leaves it away.
        draft_head_rank: of a head of its own, the best factors of the target's; 0 leaves it away.
        draft_block: the most drafts of a block, whose places and correction are drawn at random; 0 leaves it away.
        trained_confidence: whether it has one, drawn at random.
        std: of the random matrices.
        config: further entries of ``config.json``, such as ``num_speculative_tokens``; they win.
    """
    tensors = load_file(target / "model.safetensors")
    source = f"model.layers.{copy_layer or 0}."
    generator = torch.Generator().manual_seed(seed)
    adapter = {"norm.weight": tensors["model.norm.weight"]}
    parts = ("self_attn.", "input_layernorm.", *(("mlp.", "post_attention_layernorm.") if mlp else ()))
    for name, tensor in tensors.items():
        if name.startswith(tuple(source + part for part in parts)):
            adapter["layers.0." + name.removeprefix(source)] = tensor
    if copy_layer is None:
        for name, tensor in adapter.items():
            noise = torch.randn(tensor.shape, generator=generator)
            adapter[name] = (1 + 0.2 * noise if "norm" in name else std * noise).to(tensor.dtype)
    hidden, dtype = len(adapter["norm.weight"]), adapter["norm.weight"].dtype
    if deep_state_size:
        shapes = {"gate": (deep_state_size, hidden), "up": (deep_state_size, hidden), "down": (hidden, deep_state_size)}
        for name, shape in shapes.items():
            adapter[f"state_mlp.{name}_proj.weight"] = (std * torch.randn(shape, generator=generator)).to(dtype)
        adapter["state_layernorm.weight"] = (1 + 0.2 * torch.randn(hidden, generator=generator)).to(dtype)
        config["deep_state_size"] = deep_state_size
    if draft_head_rank:
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).float()
        left, values, right = torch.linalg.svd(head * adapter["norm.weight"].float(), full_matrices=False)
        adapter["draft_head.up.weight"] = (left * values)[:, :draft_head_rank].to(dtype)
        adapter["draft_head.down.weight"] = right[:draft_head_rank].to(dtype)
        adapter["norm.weight"] = torch.ones(draft_head_rank, dtype=dtype)
        config["draft_head_rank"] = draft_head_rank
    if draft_block:
        for name, shape in {"places": (draft_block - 1, hidden), "correction.weight": (hidden, hidden)}.items():
            adapter[f"block.{name}"] = (std * torch.randn(shape, generator=generator)).to(dtype)
        config["draft_block"] = draft_block
    if trained_confidence:
        width = len(adapter["norm.weight"])
        adapter["confidence.weight"] = (std * torch.randn(1, width + 1, generator=generator)).to(dtype)
        adapter["confidence.bias"] = (std * torch.randn(1, generator=generator)).to(dtype)
        config["trained_confidence"] = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in adapter.items()}, folder / "model.safetensors")
    values = json.loads((target / "config.json").read_text())
    values.pop("architectures", None)
    values["num_hidden_layers"] = 1
    if mlp:
        values["mlp"] = True
    if exit_layer is not None:
        values["exit_layer"] = exit_layer
    (folder / "config.json").write_text(json.dumps(values | config, indent=2))
    return folder


def with_vocabulary(adapter: Path, out: Path, tokens: Sequence[int]) -> Path:
    """A copy of an adapter in ``out`` that drafts these tokens alone."""
    shutil.copytree(adapter, out)
    write_draft_vocabulary(out, torch.tensor(tokens))
    return out


CHAT_TEMPLATE = """@{% for message in messages -%}
{{ message['role'][0].upper() + ':' + message['content'] + ';' }}
{%- endfor %}{% if add_generation_prompt %}A:{% endif %}"""
"""Writes ``@S:be kind;U:hi;A:`` for a conversation whose answer comes next; ``@`` stands for the first token."""


TURN_TEMPLATE = (
    "{% for message in messages %}<{{ message.role[:1] | upper }}>{{ message.content }}@{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
"""Ends every turn by the end token: ``<U>question@<A>answer@``."""


def make_tokenizer(folder: Path, vocab_size: int = 67, **more: str) -> Path:
    """A character tokenizer beside a checkpoint: token 0 is unknown, then come the printable characters from '0' on.

    ``more`` goes to the tokenizer, such as ``chat_template`` and ``eos_token``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0} | {chr(ord("0") + index): index + 1 for index in range(vocab_size - 1)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **more).save_pretrained(folder)
    return folder
