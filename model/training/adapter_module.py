"""The adapter as PyTorch modules, and as the folder that the runtime loads."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..drafters.parts import PAPER_PARTS, Parts
from ..errors import KangarooError
from ..files import write_text, write_whole
from ..target.checkpoint import read_tensors
from ..target.config import LlamaConfig, parse_config
from ..target.hub import find_folder
from .losses import log_odds
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


class TrainableBlock(nn.Module):
    """What drafts a block besides the layer; the correction begins as zero."""

    def __init__(self, hidden: int, drafts: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.1 * torch.randn(drafts - 1, hidden))
        self.correction = nn.Linear(hidden, hidden, bias=False)
        nn.init.zeros_(self.correction.weight)


class TrainableAdapter(nn.Module):
    """An adapter as a PyTorch module: its ``state_dict`` is the adapter format (docs/architecture.md).

    Args:
        config: of its layer.
        sequence_length: the most positions.
        parts: what it has besides. A head of its own begins as any matrix does (``factorize``), a trained confidence as
            the softmax's probability.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, sequence_length: int, parts: Parts = PAPER_PARTS) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        width = parts.draft_head_rank or hidden
        self.parts = parts
        self.layers = nn.ModuleList([AdapterBlock(config)])
        self.norm = nn.RMSNorm(width, eps=eps)
        if parts.deep_state_size:
            self.state_layernorm = nn.RMSNorm(hidden, eps=eps)
            self.state_mlp = swiglu(hidden, parts.deep_state_size)
        if parts.draft_head_rank:
            down, up = nn.Linear(hidden, width, bias=False), nn.Linear(width, config.vocab_size, bias=False)
            self.draft_head = nn.ModuleDict({"down": down, "up": up})
        if parts.draft_block:
            self.block = TrainableBlock(hidden, parts.draft_block)
        self.confidence = nn.Linear(width + 1, 1) if parts.trained_confidence else None
        if self.confidence is not None:
            nn.init.zeros_(self.confidence.bias)
            nn.init.zeros_(self.confidence.weight).data[:, -1] = 1
        angles = torch.arange(sequence_length, device="cpu")[:, None] * config.inv_freq(sequence_length)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @property
    def matrices(self) -> list[nn.Parameter]:
        """Those of its parameters that are products' matrices."""
        others = "block.places", "confidence.weight"
        return [each for name, each in self.named_parameters() if each.ndim == 2 and name not in others]

    @property
    def own_head(self) -> nn.Parameter | None:
        """``[V, r]``: the matrix of a head of its own; None where it drafts with the target's."""
        return self.get_parameter("draft_head.up.weight") if self.parts.draft_head_rank else None

    @torch.no_grad()
    def factorize(self, head: Tensor, norm: Tensor) -> None:
        """Let a head of its own begin as the best factors of a head ``[V, hidden]`` behind a norm ``[hidden]``."""
        scaled = head.float() * norm.to(head.device, torch.float32)
        directions = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -self.parts.draft_head_rank :]
        self.get_parameter("draft_head.down.weight").copy_(directions.T)
        self.get_parameter("draft_head.up.weight").copy_(scaled @ directions)

    def confidences(self, guesses: Tensor, likeliest: Tensor) -> Tensor:
        """What is held against the threshold, ``[P]``, from the head's inputs ``[P, width]`` and the probabilities."""
        if self.confidence is None:
            return likeliest
        told: Tensor = self.confidence(torch.cat((guesses, log_odds(likeliest)[:, None]), dim=-1))
        return told[:, 0].sigmoid()

    def forward(
        self,
        exit_hidden: Tensor,
        final: Tensor | None = None,
        passes: int = 1,
        embedded: Tensor | None = None,
    ) -> list[Tensor]:
        """The input of the head's matrix for the first draft of a step, for the second, and so on.

        Args:
            exit_hidden: ``[B, T, hidden]``.
            final: ``[B, T, hidden]``, the target's last layer's output, for an adapter with a deep state.
            passes: how many drafts in a row; without a deep state or a block all are alike, and one is enough.
            embedded: ``[B, T, hidden]``, the tokens' embeddings, for an adapter with a block.

        Returns:
            ``[B, T, hidden]`` for each pass, or ``[B, T, r]`` for a head of rank r. In pass j, every position is the
            place of the draft j behind the text: of the j positions before, the adapter knows its own output and not
            the target's, or nothing but the token at its own position.
        """
        length = exit_hidden.shape[1]
        cos, sin, states = self.cos[:length], self.sin[:length], final
        guesses, earlier = list[Tensor](), list[Seen]()
        for number in range(passes):
            hidden = exit_hidden
            blind = self.parts.draft_block and number
            if blind:
                hidden = self.block.places[number - 1].expand_as(exit_hidden)
            if self.parts.deep_state_size:
                assert states is not None
                before = F.pad(states[:, :-1], (0, 0, 1, 0))
                hidden = hidden + apply_swiglu(self.state_mlp, self.state_layernorm(before))
            states, seen = self.layers[0](hidden, cos, sin, earlier)
            earlier.append(seen)
            read = states
            if blind:
                assert embedded is not None
                read = read + self.block.correction(embedded)
            if self.parts.draft_head_rank:
                read = self.draft_head["down"](read).float()
            guesses.append(self.norm(read))
        return guesses


def adapter_config_values(target_values: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """The adapter's ``config.json``: the target's, with one layer of Llama's architecture and without biases."""
    own: dict[str, Any] = {"mlp": settings.intermediate_size is not None}
    own |= {name: value for name, value in settings.parts._asdict().items() if value}
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


def read_weights(name_or_path: str, config: LlamaConfig, parts: Parts) -> dict[str, Tensor]:
    """An adapter's weights by name, float32, for a run to begin with; an MLP's or a part's may be missing.

    Where a head of its own is missing, the norm is that before the target's.

    Raises:
        KangarooError: a folder without weights, or weights that do not fit the adapter that is to be trained.
    """
    folder = find_folder(name_or_path, "adapter")
    weights = {name: tensor.float() for name, tensor in read_tensors(folder)}
    found = {name: tensor.shape for name, tensor in weights.items()}
    with_and_without: Any = product(*({value, type(value)()} for value in parts))  # 0 and False leave a part out
    with torch.device("meta"):
        fitting = [
            {name: tensor.shape for name, tensor in TrainableAdapter(layer, 1, Parts(*some)).state_dict().items()}
            for some in with_and_without
            for layer in (replace(config, intermediate_size=0), config)
        ]
    if found not in fitting:
        raise KangarooError(
            f"start_from: the adapter in {folder} has other tensors than the one to be trained; it must be made for "
            "this model, with the same --num-attention-heads, and have no part that this one lacks "
            "(--intermediate-size, --deep-state-size, --draft-head-rank, --draft-block, --trained-confidence), and "
            "each in the same size."
        )
    if parts.draft_head_rank and "draft_head.up.weight" not in weights:  # a confidence reads the head's input
        return {name: tensor for name, tensor in weights.items() if not name.startswith("confidence.")}
    return weights


def save_adapter(out: Path, values: dict[str, Any], adapter: TrainableAdapter, dtype: torch.dtype) -> None:
    """Write the adapter format; ``config.json`` comes last, so a folder that has one is whole."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.state_dict().items()}
    write_whole(out / "model.safetensors", partial(save_file, state, metadata={"format": "pt"}))
    write_text(out / "config.json", json.dumps(values, indent=2) + "\n")
