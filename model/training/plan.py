"""What a run reads before its work: the target's and the adapter's configurations, the data, an earlier run's state."""

import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drafters.adapter import check_exit_layer, parse_adapter_config
from ..drafters.vocabulary import check_size
from ..errors import KangarooError
from ..load import open_model
from ..named import find_pair
from ..target.config import LlamaConfig
from .adapter_module import adapter_config_values, read_weights
from .checkpoint import read_state
from .data import Corpus, read_corpus
from .settings import TrainingSettings
from .teacher import bytes_per_token


@dataclass(frozen=True)
class TargetFiles:
    """A target before its weights.

    Attributes:
        path: its folder or GGUF file.
        values: its configuration in transformers' terms.
        config: the same, validated.
        tokenizer: transformers' own.
        ends: the tokens that end its texts.
    """

    path: Path
    values: dict[str, Any]
    config: LlamaConfig
    tokenizer: Any
    ends: set[int]

    @property
    def special(self) -> set[int]:
        """The ends and every token that the tokenizer calls special or added."""
        known = {*self.ends, *self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return {token for token in known if 0 <= token < self.config.vocab_size}


def find_target(model: str) -> TargetFiles:
    """Read a checkpoint's configuration and its tokenizer.

    Raises:
        KangarooError: a checkpoint that cannot be used, or one without a tokenizer.
    """
    checkpoint = open_model(find_pair(model, None)[0])
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise KangarooError(f"{checkpoint.path} holds no tokenizer; training on text needs one.")
    ends = {*checkpoint.config.eos_token_ids, tokenizer.eos_token_id} - {None}
    return TargetFiles(checkpoint.path, checkpoint.values, checkpoint.config, tokenizer, ends)


@dataclass(frozen=True)
class Plan:
    """What a run works with; all of it was checked, and nothing was written yet.

    Attributes:
        target: the model's files.
        values: the adapter's ``config.json``.
        config: the same, parsed.
        corpus: the windows to learn from and to measure on.
        saved: the state of the run that goes on; None for a new run.
        weights: what a new run begins with, by name; None for weights of its own.
        fingerprint: of the settings and of the windows to learn from.
    """

    target: TargetFiles
    values: dict[str, Any]
    config: LlamaConfig
    corpus: Corpus
    saved: dict[str, Any] | None
    weights: dict[str, Any] | None
    fingerprint: int


@dataclass(frozen=True)
class Cache:
    """A folder that keeps the target's states, and the bytes that all of them take."""

    folder: Path
    size: int


def read_plan(settings: TrainingSettings, corpus: Corpus | None = None) -> Plan:
    """Read and check everything that a run needs; ``corpus`` is that of another run on the same data.

    Raises:
        KangarooError: for settings, files or folders that cannot be used.
    """
    target = find_target(settings.model)
    check_exit_layer(settings.exit_layer, target.config)
    values = adapter_config_values(target.values, settings)
    config = parse_adapter_config(values)
    settings.parts.check(config.hidden_size)
    heads = settings.num_attention_heads
    if heads is not None and config.hidden_size % heads:
        raise KangarooError(
            f"num_attention_heads is {heads}; the model's hidden size, {config.hidden_size}, must be a multiple of it."
        )
    if settings.sequence_length > config.context_length:
        raise KangarooError(
            f"sequence_length is {settings.sequence_length}, the model's context holds {config.context_length}."
        )
    if settings.draft_vocabulary is not None:
        check_draft_vocabulary(settings.draft_vocabulary, target)
    saved = read_state(settings)
    weights = None if settings.start_from is None else read_weights(settings.start_from, config, settings.parts)
    corpus = corpus or read_corpus(settings, target.tokenizer, target.ends)
    fingerprint = zlib.crc32(settings.fingerprint().encode())
    for window in corpus.windows:
        fingerprint = zlib.crc32(window.tokens.numpy().tobytes(), fingerprint)
    if saved is not None and saved["corpus"] != fingerprint:
        raise KangarooError(f"the data has changed since the run in {settings.out} began; take a new folder.")
    return Plan(target, values, config, corpus, saved, weights, fingerprint)


def find_cache(runs: list[TrainingSettings], plans: list[Plan]) -> Cache | None:
    """Where the states that these runs share are kept on disk; None where they are not.

    Raises:
        KangarooError: the disk has no room for them.
    """
    if not runs[0].cache:
        return None
    out = runs[0].out if len(runs) == 1 else runs[0].out.parent
    tokens = sum(len(window.tokens) for window in plans[0].corpus.windows)
    size = tokens * bytes_per_token(plans[0].config.hidden_size, len(plans))
    fingerprint = plans[0].fingerprint
    for plan in plans[1:]:
        fingerprint = zlib.crc32(f"{plan.fingerprint:08x}".encode(), fingerprint)
    folder = out / f"states-{fingerprint:08x}"
    check_room(out, 0 if folder.exists() else size)
    return Cache(folder, size)


def check_draft_vocabulary(size: int, target: TargetFiles, name: str = "draft_vocabulary") -> None:
    """Raise unless a draft vocabulary may have that size: without the ends, no draft would reach a text's end."""
    check_size(size, target.config.vocab_size, name)
    special = len(target.special)
    if size <= special:
        raise KangarooError(
            f"{name} is {size}; it must be more than {special}, since the model's {special} special tokens "
            "are always among them."
        )


def check_room(out: Path, size: int) -> None:
    """Raise where the disk has fewer bytes left."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise KangarooError(
            f"the states take {size / 1e9:.2g} GB, and the disk of {out} has {free / 1e9:.2g} GB left; leave --cache "
            "out, or give less data."
        )
