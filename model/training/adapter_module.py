"""The adapter as PyTorch modules, and as the folder that the runtime loads."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import KangarooError
from ..files import write_text, write_whole
from ..target.checkpoint import read_tensors
from ..target.config import LlamaConfig, parse_config
from ..target.hub import find_folder
from .settings import TrainingSettings
from .unrolled import Seen, attend


def swiglu(hidden: int, inner: int) -> nn.ModuleDict:
    """A SwiGLU with the names of a layer's MLP; it begins as zero, so it changes nothing until it has learned."""
    parts = {
        "gate_proj": nn.Linear(hidden, inner, bias=False),
        "up_proj": nn.Linear(hidden, inner, bias=False),
        "down_proj": nn.Linear(inner, hidden, bias=False),
    }
    nn.init.zeros_(parts["down_proj"].weight)
    return nn.ModuleDict(parts)


def apply_swiglu(parts: nn.ModuleDict, normed: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))``."""
    change: Tensor = parts["down_proj"](F.silu(parts["gate_proj"](normed)) * parts["up_proj"](normed))
    return change


class AdapterBlock(nn.Module):
    """The adapter's layer, with the weights' names of the adapter format."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.input_layernorm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, q_rows, bias=False),
                "k_proj": nn.Linear(hidden, kv_rows, bias=False),
                "v_proj": nn.Linear(hidden, kv_rows, bias=False),
                "o_proj": nn.Linear(q_rows, hidden, bias=False),
            }
        )
        if config.has_mlp:
            self.post_attention_layernorm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
            self.mlp = swiglu(hidden, config.intermediate_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, earlier: Sequence[Seen] = ()) -> tuple[Tensor, Seen]:
        """``h + attention(rms_norm(h))``, then ``h + swiglu(rms_norm(h))`` with an MLP.

        ``[B, T, hidden]`` to the same, and the keys and values; ``cos`` and ``sin`` are ``[T, D]``, ``earlier`` are the
        keys and values of the passes before (``unrolled.py``).
        """
        normed = self.input_layernorm(hidden)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), dim=-1) * sin for x in (q, k))
        seen = Seen(k, v)
        mixed = attend(q, (*earlier, seen))
        hidden = hidden + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        if self.config.has_mlp:
            hidden = hidden + apply_swiglu(self.mlp, self.post_attention_layernorm(hidden))
        return hidden, seen


class TrainableAdapter(nn.Module):
    """An adapter as a PyTorch module: its ``state_dict`` is the adapter format (docs/architecture.md).

    Args:
        config: of its layer.
        sequence_length: the most positions.
        deep_state_size: the inner size of the SwiGLU over its deep state; 0 leaves it away.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, sequence_length: int, deep_state_size: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AdapterBlock(config)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_state = deep_state_size > 0
        if self.has_state:
            self.state_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.state_mlp = swiglu(config.hidden_size, deep_state_size)
        angles = torch.arange(sequence_length)[:, None] * config.inv_freq(sequence_length)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, exit_hidden: Tensor, final: Tensor | None = None, passes: int = 1) -> list[Tensor]:
        """The input of the target's head for the first draft of a step, for the second, and so on.

        Args:
            exit_hidden: ``[B, T, hidden]``.
            final: ``[B, T, hidden]``, the target's last layer's output, for an adapter with a deep state.
            passes: how many drafts in a row; without a deep state all are alike, and one is enough.

        Returns:
            ``[B, T, hidden]`` for each pass. In pass j, every position is the place of the draft j behind the text: of
            the j positions before, the adapter knows its own output and not the target's.
        """
        length = exit_hidden.shape[1]
        cos, sin, states = self.cos[:length], self.sin[:length], final
        guesses, earlier = list[Tensor](), list[Seen]()
        for _ in range(passes):
            hidden = exit_hidden
            if self.has_state:
                assert states is not None
                before = F.pad(states[:, :-1], (0, 0, 1, 0))
                hidden = hidden + apply_swiglu(self.state_mlp, self.state_layernorm(before))
            states, seen = self.layers[0](hidden, cos, sin, earlier)
            earlier.append(seen)
            guesses.append(self.norm(states))
        return guesses


def adapter_config_values(target_values: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """The adapter's ``config.json``: the target's, with one layer of Llama's architecture and without biases."""
    own: dict[str, Any] = {"mlp": settings.intermediate_size is not None}
    if settings.deep_state_size is not None:
        own["deep_state_size"] = settings.deep_state_size
    if settings.intermediate_size is not None:
        own["intermediate_size"] = settings.intermediate_size
    if settings.num_attention_heads is not None:
        heads, head_dim = settings.num_attention_heads, parse_config(target_values).head_dim
        own |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
    dropped = (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "torch_dtype",
        "id2label",
        "label2id",
        "layer_types",
    )
    kept = {name: value for name, value in target_values.items() if value is not None and name not in dropped}
    return {
        **kept,
        "architectures": ["KangarooAdapter"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "exit_layer": settings.exit_layer,
        **own,
    }


def read_weights(name_or_path: str, config: LlamaConfig, deep_state_size: int) -> dict[str, Tensor]:
    """An adapter's weights by name, float32, for a run to begin with; an MLP's or a deep state's may be missing.

    Raises:
        KangarooError: a folder without weights, or weights that do not fit the adapter that is to be trained.
    """
    folder = find_folder(name_or_path, "adapter")
    weights = {name: tensor.float() for name, tensor in read_tensors(folder)}
    found = {name: tensor.shape for name, tensor in weights.items()}
    fitting = (
        {name: tensor.shape for name, tensor in TrainableAdapter(layer, 1, size).state_dict().items()}
        for layer in (replace(config, intermediate_size=0), config)
        for size in (0, deep_state_size)
    )
    if found not in fitting:
        raise KangarooError(
            f"start_from: the adapter in {folder} has other tensors than the one to be trained; it must be made for "
            "this model, with the same --num-attention-heads, and have the same --intermediate-size or no MLP, and the "
            "same --deep-state-size or no deep state."
        )
    return weights


def save_adapter(out: Path, values: dict[str, Any], adapter: TrainableAdapter, dtype: torch.dtype) -> None:
    """Write the adapter format; ``config.json`` comes last, so a folder that has one is whole."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.state_dict().items()}
    write_whole(out / "model.safetensors", partial(save_file, state, metadata={"format": "pt"}))
    write_text(out / "config.json", json.dumps(values, indent=2) + "\n")
