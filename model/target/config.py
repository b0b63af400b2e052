"""Read a checkpoint's ``config.json`` into the few numbers the runtime needs; refuse what it would decode wrongly."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import KangarooError
from ..number import is_number, is_whole
from .architectures import find_architecture

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings, in transformers' terms.

    Attributes:
        rope_type: ``default``, ``linear``, ``dynamic`` (NTK) or ``llama3``.
        theta: the base of the frequencies.
        factor: by which the context was stretched; 1 for ``default``.
        parameters: the further settings of ``llama3``.
        divisors: ``head_dim / 2`` numbers that divide the frequencies, where a file holds them ready made (llama.cpp's
            ``rope_freqs``); empty for none.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama model; the names are transformers' own, whose ``attention_bias`` is two things here.

    An ``intermediate_size`` of 0 stands for layers without an MLP, which only an adapter may have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    @property
    def context_length(self) -> int:
        """The most tokens a text may have: linear and dynamic scaling stretch ``max_position_embeddings``."""
        stretch = self.rope.factor if self.rope.rope_type in ("linear", "dynamic") else 1.0
        return int(self.max_position_embeddings * stretch)

    def inv_freq(self, length: int) -> Tensor:
        """RoPE's inverse frequencies for texts of up to ``length`` tokens: ``[head_dim / 2]`` float32.

        ``length`` matters for ``dynamic`` alone: a text that outgrows ``max_position_embeddings`` has its base
        stretched once, for the longest it may become, so that every token sees the same angles (transformers stretches
        it again at every step and leaves older keys as they were).
        """
        rope, size = self.rope, self.head_dim
        theta = rope.theta
        if rope.rope_type == "dynamic" and length > self.max_position_embeddings:
            stretch = rope.factor * length / self.max_position_embeddings - (rope.factor - 1)
            theta *= stretch ** (size / (size - 2))
        exponents = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size
        frequencies = 1.0 / (theta**exponents)
        if rope.divisors:
            frequencies /= torch.tensor(rope.divisors, dtype=torch.float32, device="cpu")
        if rope.rope_type == "linear":
            frequencies /= rope.factor
        elif rope.rope_type == "llama3":
            low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
            original = rope.parameters["original_max_position_embeddings"]
            turns = original * frequencies / (2 * math.pi)
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            frequencies = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        return frequencies

    @property
    def attention_parameters(self) -> int:
        """Parameters of one attention block with its norm."""
        q_rows, kv_rows = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        biases = (q_rows + 2 * kv_rows) * self.qkv_bias + self.hidden_size * self.output_bias
        return 2 * self.hidden_size * (q_rows + kv_rows) + biases + self.hidden_size

    @property
    def has_mlp(self) -> bool:
        """Whether a layer's attention is followed by an MLP."""
        return self.intermediate_size > 0

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one MLP with its norm."""
        if not self.has_mlp:
            return 0
        biases = (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        return 3 * self.hidden_size * self.intermediate_size + biases + self.hidden_size


def _positive(value: object, name: str, path: Path | str) -> float:
    """A finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise KangarooError(f"{path}: {name} is {value!r}; it must be a number above 0.")
    return float(value)


def _size(value: object, name: str, path: Path | str) -> int:
    """A whole number of at least 1."""
    if not is_whole(value) or value < 1:
        raise KangarooError(f"{path}: {name} is {value!r}; it must be a whole number of at least 1.")
    return value


def _rope_config(values: Mapping[str, Any], path: Path | str) -> RopeConfig:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (transformers 4 and before)."""
    scaling = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    named = (scaling.get("rope_theta"), values.get("rope_theta"), 10000.0)
    theta = _positive(next(theta for theta in named if theta is not None), "rope_theta", path)
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise KangarooError(
            f"{path}: RoPE type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}."
        )
    if rope_type == "default":
        return RopeConfig(theta=theta)
    factor = _positive(scaling.get("factor"), "the RoPE scaling's factor", path)
    if rope_type != "llama3":
        return RopeConfig(rope_type, theta, factor)
    further = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    parameters = {name: _positive(scaling.get(name), f"the RoPE scaling's {name}", path) for name in further}
    if parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        raise KangarooError(f"{path}: the RoPE scaling's low_freq_factor must be below its high_freq_factor.")
    return RopeConfig(rope_type, theta, factor, parameters)


def load_config_values(folder: Path, what: str) -> dict[str, Any]:
    """``folder/config.json`` as transformers' ``AutoConfig`` reads it, refusing checkpoints that bring code."""
    from transformers import AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        raise KangarooError(f"{what} folder {folder} has no config.json; it should hold a Hugging Face checkpoint.")
    raw = _read_object(path, "a model's configuration")
    if raw.get("auto_map"):
        raise KangarooError(f"{path} asks to run the checkpoint's own code (auto_map), which is never done.")
    model_type = raw.get("model_type", "llama")
    find_architecture(model_type, str(path))
    if raw.get("quantization_config"):
        raise KangarooError(
            f"{path}: quantized checkpoints are not supported; use one in float32, float16 or bfloat16."
        )
    for name in SIZES:  # transformers computes with them before it checks them
        if raw.get(name) is not None:
            _size(raw[name], name, path)
    raw["model_type"] = model_type
    try:
        values = AutoConfig.for_model(**raw).to_dict()
    except Exception as error:  # transformers' validators raise many kinds, some over several lines
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise KangarooError(f"{path} is not a valid configuration ({reason}).") from error
    # where transformers renames fields between versions, the file's own name is kept beside the new one
    return {**raw, **values}


def parse_config(values: Mapping[str, Any], path: Path | str = "config.json") -> LlamaConfig:
    """The runtime's view of a transformers configuration, validated.

    Raises:
        KangarooError: another architecture or activation, sliding window, impossible sizes, unknown RoPE types.
    """

    def size(name: str, default: int | None = None) -> int:
        value = values.get(name)
        return _size(default if value is None else value, name, path)

    if values.get("sliding_window") is not None and values.get("use_sliding_window", True):
        raise KangarooError(
            f"{path}: sliding-window attention ({values['sliding_window']} tokens) is not supported; use a checkpoint "
            "whose sliding_window is null."
        )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise KangarooError(f"{path}: activation {values['hidden_act']!r} is not supported; Llama models use 'silu'.")
    heads = size("num_attention_heads")
    kv_heads = size("num_key_value_heads", heads)
    hidden = size("hidden_size")
    head_dim = size("head_dim", hidden // heads)
    if heads % kv_heads:
        raise KangarooError(f"{path}: {heads} attention heads are not a multiple of {kv_heads} key-value heads.")
    if head_dim % 2:
        raise KangarooError(f"{path}: head_dim is {head_dim}; rotary embeddings need an even one.")
    attention_bias = bool(values.get("attention_bias", False))
    qkv_bias = find_architecture(values.get("model_type", "llama"), str(path)).qkv_bias
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    return LlamaConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive(values.get("rms_norm_eps", 1e-6), "rms_norm_eps", path),
        max_position_embeddings=size("max_position_embeddings", 2048),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias or attention_bias,
        output_bias=attention_bias and not qkv_bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
        rope=_rope_config(values, path),
        eos_token_ids=_end_tokens(values, path),
        dtype=DTYPES.get(dtype, torch.float32),
    )


def _end_tokens(values: Mapping[str, Any], path: Path | str) -> tuple[int, ...]:
    eos = values.get("eos_token_id")
    tokens = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not all(is_whole(token) for token in tokens):
        raise KangarooError(f"{path}: eos_token_id is {eos!r}; it must be a token id or a list of them.")
    return tokens


def add_generation_config(config: LlamaConfig, folder: Path) -> LlamaConfig:
    """Add the end tokens of ``folder/generation_config.json``, where there is one.

    Some checkpoints name the end of a turn there alone, so what either of the two files names ends a text. Where
    ``config.json`` names none, transformers' default for the architecture holds only if this file names none either.

    Raises:
        KangarooError: a file that is no JSON object, or that names something else than tokens.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return config
    values = _read_object(path, "generation settings")
    further = _end_tokens(values, path)
    own = () if further and "eos_token_id" not in _read_object(folder / CONFIG, "a model") else config.eos_token_ids
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*own, *further))))


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KangarooError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(values, dict):
        raise KangarooError(f"{path} holds no JSON object; it should hold {what}.")
    return values
