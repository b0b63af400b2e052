"""What a run reads before its work: the target's and the adapter's configurations, the text, a stopped run's state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..drafters.adapter import check_exit_layer
from ..errors import KangarooError
from ..load import open_model
from ..named import find_pair
from ..target.config import LlamaConfig, parse_config
from .adapter_module import adapter_config_values
from .checkpoint import read_state
from .data import read_corpus
from .settings import TrainingSettings


@dataclass(frozen=True)
class Plan:
    """What a run works with; all of it was checked, and nothing was written yet.

    Attributes:
        folder: the target's.
        target: its configuration.
        values: the adapter's ``config.json``.
        config: the same, parsed.
        tokens: ``[N]`` int64, to train on.
        held_out: ``[N]`` int64, to measure on.
        saved: the state of the stopped run that goes on; None for a new run.
    """

    folder: Path
    target: LlamaConfig
    values: dict[str, Any]
    config: LlamaConfig
    tokens: Tensor
    held_out: Tensor
    saved: dict[str, Any] | None


def read_plan(settings: TrainingSettings) -> Plan:
    """Read and check everything that a run needs.

    Raises:
        KangarooError: for settings, files or folders that cannot be used.
    """
    checkpoint = open_model(find_pair(settings.model, None)[0])
    folder, target = checkpoint.path, checkpoint.config
    if folder.is_file():
        raise KangarooError(f"{folder} is a GGUF file; training reads folders, with safetensors or pytorch_model.bin.")
    check_exit_layer(settings.exit_layer, target)
    values = adapter_config_values(checkpoint.values, settings)
    config = parse_config(values)
    if settings.sequence_length > config.context_length:
        raise KangarooError(
            f"sequence_length is {settings.sequence_length}, the model's context holds {config.context_length}."
        )
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise KangarooError(f"{folder} holds no tokenizer; training on text needs one.")
    tokens, held_out = read_corpus(settings, tokenizer)
    return Plan(folder, target, values, config, tokens, held_out, read_state(settings))
