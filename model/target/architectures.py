"""The families of models that load, and what the runtime lacks for others.

Names are those of ``model_type`` in a ``config.json``, and of ``general.architecture`` in a GGUF file.
"""

from dataclasses import dataclass

from ..errors import KangarooError


@dataclass(frozen=True)
class Architecture:
    """How a family differs from Llama.

    Attributes:
        qkv_bias: whether queries, keys and values, and they alone, have biases; False leaves biases to the
            configuration's ``attention_bias``.
        adjacent_pairs: whether llama.cpp's files keep the two rows of a RoPE pair side by side (its ``NORM`` kind), as
            this runtime does, instead of half a head apart (``NEOX``).
    """

    qkv_bias: bool = False
    adjacent_pairs: bool = False


ARCHITECTURES = {
    "llama": Architecture(adjacent_pairs=True),
    "mistral": Architecture(adjacent_pairs=True),
    "qwen2": Architecture(qkv_bias=True),
}

EXPERTS = "a mixture of experts"
FUSED = "projections that are stored as one matrix"
LAYER_NORM = "LayerNorm in the place of RMSNorm"
NORMS_OF_HEADS = "norms of each head's queries and keys"

LACKING = {
    "bloom": LAYER_NORM,
    "cohere": LAYER_NORM,
    "command-r": LAYER_NORM,
    "deepseek2": "latent attention and a mixture of experts",
    "deepseek_v2": "latent attention and a mixture of experts",
    "deepseek_v3": "latent attention and a mixture of experts",
    "falcon": LAYER_NORM,
    "gemma": "scaled embeddings and GELU",
    "gemma2": "capped logits and norms behind each block",
    "gemma3": "sliding-window layers and norms behind each block",
    "gemma3_text": "sliding-window layers and norms behind each block",
    "glm4": "norms behind each block and RoPE on half of each head",
    "gpt2": "learned positions and LayerNorm",
    "gpt_oss": EXPERTS,
    "gpt-oss": EXPERTS,
    "gpt_neox": LAYER_NORM,
    "gptneox": LAYER_NORM,
    "granite": "scaled embeddings, residuals and logits",
    "llama4": EXPERTS,
    "mixtral": EXPERTS,
    "mpt": LAYER_NORM,
    "olmo": LAYER_NORM,
    "olmo2": "norms behind each block",
    "opt": "learned positions and LayerNorm",
    "phi": LAYER_NORM,
    "phi2": LAYER_NORM,
    "phi3": FUSED,
    "qwen": FUSED,
    "qwen2_moe": EXPERTS,
    "qwen2moe": EXPERTS,
    "qwen3": NORMS_OF_HEADS,
    "qwen3_moe": EXPERTS,
    "qwen3moe": EXPERTS,
    "smollm3": "layers without RoPE",
    "stablelm": LAYER_NORM,
    "starcoder2": LAYER_NORM,
}
"""What models of these families have that this runtime does not."""


def find_architecture(name: object, where: str) -> Architecture:
    """The architecture called ``name``; ``where`` begins the error's sentence.

    Raises:
        KangarooError: an architecture that is not supported, with what it has and the runtime lacks, where known.
    """
    if isinstance(name, str) and name in ARCHITECTURES:
        return ARCHITECTURES[name]
    lacking = LACKING.get(name) if isinstance(name, str) else None
    reason = f", since it has {lacking}" if lacking else ""
    raise KangarooError(
        f"{where}: model type {name!r} is not supported{reason}; supported are {', '.join(ARCHITECTURES)}."
    )
