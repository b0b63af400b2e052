"""The adapter: the small trained network that turns the exit layer's hidden states into drafts.

``h + attention(rms_norm(h))``, a norm, then the target's own LM head (arXiv 2404.18911, section 3.1); where its
configuration says ``"mlp": true``, a layer's SwiGLU follows the attention. With a **deep state** its input is
``h + swiglu(rms_norm(s))``, where s is the target's last layer's output at the position before; for a position behind a
draft, which the target has not seen yet, the adapter's own output stands in (as EAGLE feeds back features, arXiv
2401.15077). ``parts.py`` has all that an adapter may have besides. The folder holds a ``config.json`` (a one-layer
Llama configuration with an added ``exit_layer``) and the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, DraftVocabulary, Mlp

from ..errors import KangarooError
from ..head import Head
from ..number import is_number, is_whole
from ..target.cache import KVCache, Place
from ..target.checkpoint import read_tensors
from ..target.config import LlamaConfig, load_config_values, parse_config
from ..target.llama import DecoderLayer, Llama
from .adapter_weights import AdapterWeights, BlockWeights, load_adapter
from .parts import PAPER_PARTS, Parts, read_parts
from .protocol import PAPER_DRAFT_CONFIDENCE_THRESHOLD, PAPER_NUM_SPECULATIVE_TOKENS
from .vocabulary import read_draft_vocabulary
from .ways import CHAINS, Way, read_way


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's shape and its calibrated defaults.

    Attributes:
        llama: the shape of its layer; ``intermediate_size`` is 0 where it is attention alone.
        exit_layer: how many of the target's layers run before it.
        num_speculative_tokens: the most drafts a step that suit the pair.
        draft_confidence_threshold: the confidence below which drafting should stop.
        calibrated: whether both were measured for this pair (``kangaroo calibrate --write``).
        vocabulary: the tokens that it may draft; None means all.
        parts: what it has besides its layer.
        way: how it drafts unless a caller says otherwise.
    """

    llama: LlamaConfig
    exit_layer: int
    num_speculative_tokens: int
    draft_confidence_threshold: float
    calibrated: bool = False
    vocabulary: DraftVocabulary | None = None
    parts: Parts = PAPER_PARTS
    way: Way = CHAINS

    @property
    def parameters(self) -> int:
        """Of the adapter alone; unless it has one of its own, it shares the target's head."""
        hidden, (size, rank, block, trained) = self.llama.hidden_size, self.parts
        state = hidden + 3 * hidden * size if size else 0
        head = rank * (1 + hidden + self.llama.vocab_size) if rank else hidden
        places = (block - 1) * hidden + hidden * hidden if block else 0
        confidence = (rank or hidden) + 2 if trained else 0
        return self.llama.attention_parameters + self.llama.mlp_parameters + state + head + places + confidence


def _number(values: dict[str, Any], name: str, default: float, low: float, high: float, path: Path) -> float:
    value = values.get(name, default)
    if not is_number(value) or not low <= value <= high:
        raise KangarooError(f"{path}: {name} is {value!r}; it must be a number from {low:g} to {high:g}.")
    return value


def parse_adapter_config(values: Mapping[str, Any], path: Path | str = "config.json") -> LlamaConfig:
    """The shape of an adapter's layer. Only ``"mlp": true`` gives a meaning to ``intermediate_size``.

    Raises:
        KangarooError: as for ``parse_config``, or an ``mlp`` that is neither true nor false.
    """
    config, mlp = parse_config(values, path), values.get("mlp", False)
    if not isinstance(mlp, bool):
        raise KangarooError(f"{path}: mlp is {mlp!r}; it must be true or false.")
    return config if mlp else replace(config, intermediate_size=0)


def load_adapter_config(folder: Path, target: LlamaConfig, exit_layer: int | None) -> AdapterConfig:
    """Read ``folder/config.json``, and the draft vocabulary that it may name, and check them against the target.

    Raises:
        KangarooError: another hidden size or vocabulary, no exit layer, or one out of the target's range; a draft
            vocabulary that cannot be used.
    """
    values = load_config_values(folder, "adapter")
    path = folder / "config.json"
    config = parse_adapter_config(values, path)
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(target, name)
        if ours != theirs:
            raise KangarooError(f"{path}: {name} is {ours}, the target's is {theirs}; this adapter is another model's.")
    exit_layer = values.get("exit_layer") if exit_layer is None else exit_layer
    if exit_layer is None:
        raise KangarooError(f"{path} names no exit_layer; give the one the adapter was trained with.")
    check_exit_layer(exit_layer, target)
    most = MAX_SPECULATIVE_TOKENS
    gamma = _number(values, "num_speculative_tokens", PAPER_NUM_SPECULATIVE_TOKENS, 1, most, path)
    if gamma != int(gamma):
        raise KangarooError(f"{path}: num_speculative_tokens is {gamma!r}; it must be a whole number.")
    eta = _number(values, "draft_confidence_threshold", PAPER_DRAFT_CONFIDENCE_THRESHOLD, 0, 1, path)
    calibrated = values.get("calibrated", False)
    if not isinstance(calibrated, bool):
        raise KangarooError(f"{path}: calibrated is {calibrated!r}; it must be true or false.")
    vocabulary = read_draft_vocabulary(folder, values, config.vocab_size)
    parts, way = read_parts(values, config.hidden_size, path), read_way(values, path)
    if parts.draft_block and way != CHAINS:
        raise KangarooError(f"{path}: an adapter that drafts blocks drafts nothing else; drop the entries of {way}.")
    return AdapterConfig(config, exit_layer, int(gamma), float(eta), calibrated, vocabulary, parts, way)


def check_exit_layer(exit_layer: int, target: LlamaConfig) -> None:
    """Raise unless at least one layer lies on either side of the exit."""
    highest = target.num_hidden_layers - 1
    if not is_whole(exit_layer) or not 1 <= exit_layer <= highest:
        raise KangarooError(f"exit_layer is {exit_layer!r}; this target allows 1 to {highest}.")


class DraftNetwork(Protocol):
    """What ``KangarooDrafter`` needs of an adapter, whatever layers it is made of.

    Attributes:
        config: its shape and its defaults.
        head: its norm and the target's head, or one of its own, or the rows that it may draft.
        state: the SwiGLU over the deep state; None where it has none.
        block: what drafts several tokens in one pass; None where it has none.
    """

    config: AdapterConfig
    head: Head
    state: Mlp | None
    block: BlockWeights | None

    def new_cache(self) -> KVCache:
        """An empty cache for its layers."""

    def run(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        reach: int | None = None,
        active: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Turn the exit layer's rows at ``position, ...`` into the input of the head: ``[M, hidden]``.

        ``position``, ``reach``, ``active`` and ``out`` are those of ``Llama.run``. ``states`` is ``[M, hidden]``, the
        last layer's output at the position before each row, for an adapter with a deep state; ``out`` may be ``states``
        itself.
        """

    def append(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        active: Tensor | None = None,
    ) -> None:
        """Do of ``run`` what later rows need: append the rows' keys and values to the cache."""


class Adapter:
    """A loaded adapter: the ``DraftNetwork`` of one layer that its folder holds."""

    def __init__(self, config: AdapterConfig, weights: AdapterWeights, target: Llama) -> None:
        self.config, self.target, self.state, self.block = config, target, weights.state, weights.block
        down, rows = weights.factors or (None, target.weights.head)
        vocabulary = config.vocabulary
        if vocabulary is not None:
            vocabulary = DraftVocabulary(vocabulary.tokens.to(target.device), vocabulary.size)
            rows = rows.select(vocabulary.tokens)
        self.head = Head(weights.norm, rows, config.llama.rms_norm_eps, vocabulary, down, weights.confidence)
        self.layer = DecoderLayer(config.llama, weights.layer, target.backend)

    @classmethod
    def load(cls, folder: Path, target: Llama, exit_layer: int | None = None) -> "Adapter":
        """Read an adapter folder for ``target``.

        Raises:
            KangarooError: a folder that is damaged or made for another target.
        """
        config = load_adapter_config(folder, target.config, exit_layer)
        weights = load_adapter(
            read_tensors(folder),
            config.llama,
            target.device,
            target.dtype,
            target.backend.layout,
            str(folder),
            target.weights.rounded_to,
            config.parts,
        )
        return cls(config, weights, target)

    def new_cache(self) -> KVCache:
        """An empty cache for the one layer."""
        return KVCache(self.config.llama, 1, self.target.device, self.target.kv_dtype)

    def run(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        reach: int | None = None,
        active: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As ``DraftNetwork.run``."""
        hidden = self._input(exit_hidden, states, active)
        return self.layer(hidden, cache, 0, position, reach=reach, active=active, out=out)

    def append(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        active: Tensor | None = None,
    ) -> None:
        """As ``DraftNetwork.append``."""
        self.layer.append(self._input(exit_hidden, states, active), cache, 0, position, active=active)

    def _input(self, exit_hidden: Tensor, states: Tensor | None, active: Tensor | None) -> Tensor:
        """What the layer reads."""
        if self.state is None:
            return exit_hidden
        assert states is not None
        operations, eps = self.target.backend.for_rows(exit_hidden.shape[0]), self.config.llama.rms_norm_eps
        inner = operations.gate_up(states, self.state.norm, self.state.gate_up, eps=eps, active=active)
        hidden: Tensor = operations.linear_residual(inner, self.state.down, exit_hidden, active=active)
        return hidden
