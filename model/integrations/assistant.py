"""Kangaroo's drafter for transformers' assisted generation, without a second copy of the target.

``model.generate(..., assistant_model=assistant(model, adapter))`` drafts with the target's own first layers, embedding
and head: they are the same modules, so the adapter is all that is new in memory, beside the drafter's own KV cache.
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..drafters.adapter import AdapterConfig, load_adapter_config
from ..errors import KangarooError
from ..target.checkpoint import read_tensors
from ..target.config import LlamaConfig, load_config_values, parse_config
from ..target.hub import find_folder
from .stock_llama import assisted_settings, refuse_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TAKEN = ("llama", "mistral")
"""The types of models whose layers an ``AdapterLayer`` can stand behind."""


class AdapterLayer(nn.Module):
    """The adapter in the place of a decoder layer, with its own heads, RoPE and MLP, if any.

    Args:
        config: the adapter's, as transformers has it.
        mlp: whether an MLP follows the attention.
        index: of the layer, which says where its keys and values go in a cache.
        device: where the angles of RoPE are computed.
    """

    def __init__(self, config: Any, mlp: bool, index: int, device: torch.device) -> None:
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        self.input_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = llama.LlamaAttention(config, index)
        self.mlp = llama.LlamaMLP(config) if mlp else None
        if mlp:
            self.post_attention_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        with device:
            self.rotary_emb = llama.LlamaRotaryEmbedding(config)

    def forward(self, hidden_states: Tensor, position_ids: Tensor, position_embeddings: Any, **context: Any) -> Tensor:
        """``[B, T, hidden]`` to the same; the arguments are a decoder layer's. The target's angles are not used."""
        attended: Tensor = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            **context,
        )[0]
        hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def assistant(model: Any, adapter: str | Path, exit_layer: int | None = None) -> "PreTrainedModel":
    """Make a drafter for ``model.generate(assistant_model=...)`` from a loaded model and an adapter.

    It is a model of the target's class whose other modules are the target's own. The adapter's draft length and
    threshold are in its ``generation_config``, as ``num_assistant_tokens`` and ``assistant_confidence_threshold``, and
    can be changed there.

    Args:
        model: a Llama model, or a Mistral without sliding window, as transformers loads it.
        adapter: a folder or a hub name.
        exit_layer: overrides the adapter's own; needed for adapters that do not name it.

    Raises:
        KangarooError: another kind of model, or an adapter that does not load for it.
    """
    target = model_config(model)
    folder = find_folder(adapter, "adapter")
    found = load_adapter_config(folder, target, exit_layer)
    refuse_parts(found, folder)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = found.exit_layer + 1
    with torch.device("meta"):  # only a frame: each of its modules is replaced
        drafter: PreTrainedModel = type(model)(config)
    drafter.lm_head, inner, shared = model.lm_head, drafter.model, model.model
    inner.embed_tokens, inner.rotary_emb = shared.embed_tokens, shared.rotary_emb
    layer, inner.norm = _load_adapter(folder, found, model)
    inner.layers = nn.ModuleList([*shared.layers[: found.exit_layer], layer])
    drafter.generation_config = copy.deepcopy(model.generation_config)
    for name, value in assisted_settings(found).items():
        setattr(drafter.generation_config, name, value)
    drafter.eval()
    return drafter


def model_config(model: Any) -> LlamaConfig:
    """The shape of a model that transformers loaded.

    Raises:
        KangarooError: it is none that Kangaroo decodes.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in TAKEN or not hasattr(model, "lm_head"):
        raise KangarooError(
            f"the model is a {type(model).__name__} of the type {kind!r}; it must be a causal language "
            f"model of the type {' or '.join(TAKEN)}."
        )
    return parse_config(config.to_dict(), "the model's config")


def _load_adapter(folder: Path, found: AdapterConfig, model: Any) -> tuple[AdapterLayer, nn.Module]:
    """The adapter's layer and norm, on the device of the layer before it and in the model's dtype."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    config = AutoConfig.for_model(**load_config_values(folder, "adapter"))
    config._attn_implementation = model.config._attn_implementation  # it must read the mask that the target makes
    device = next(model.model.layers[found.exit_layer - 1].parameters()).device
    with torch.device("meta"):
        layer = AdapterLayer(config, found.llama.has_mlp, found.exit_layer, device)
        norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    tensors = {
        name: tensor.to(device, model.dtype)
        for name, tensor in read_tensors(folder)
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith("confidence.")
    }
    try:
        nn.ModuleDict({"layers": nn.ModuleList([layer]), "norm": norm}).load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise KangarooError(f"{folder}: its tensors are not those that its config.json asks for ({reason}).") from error
    return layer, norm
