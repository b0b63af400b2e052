"""Folders for other engines: the drafter as a small stock Llama, or the target with our decoding in it."""

import json
import shutil
from pathlib import Path

from ..errors import KangarooError
from ..target.checkpoint import DRAFT_VOCABULARY_FILE
from ..target.config import GENERATION_CONFIG
from .stock_folder import (
    MODEL_FILES,
    dtype_name,
    generation_config,
    matching,
    write_checkpoint,
    write_json,
    write_stock_folder,
    write_tokenizer,
)
from .stock_llama import Pair, assisted_settings, check_exportable, drafter_config, drafter_tensors

ADAPTER_FILES = (*MODEL_FILES, DRAFT_VOCABULARY_FILE)

GENERATE = '''"""Kangaroo decoding for transformers' generate. `kangaroo export --transformers` wrote this file."""

from kangaroo_kernels.model.integrations.custom_generate import generate as decode

ADAPTER = {adapter!r}  # transformers runs a copy of this file, so the path is absolute: change it if the folder moves


def generate(inputs=None, *, model, **arguments):
    """Called by transformers in the place of its own loop; it binds the model by name."""
    return decode(model, ADAPTER, inputs, **arguments)
'''


def export_drafter(
    model: str | Path, adapter: str | Path | None, out: str | Path, exit_layer: int | None = None
) -> Pair:
    """Write the drafter as a ``LlamaForCausalLM`` checkpoint with the target's tokenizer; return what it was made of.

    Its ``generation_config.json`` names the adapter's draft length and threshold for transformers.

    Args:
        model: the target: a folder, a GGUF file, a hub name, or a model with a name of its own.
        adapter: its adapter's folder or hub name; None takes the model's own (``smollm2`` and ``demo`` have one).
        out: a new or empty folder.
        exit_layer: overrides the adapter's own.

    Raises:
        KangarooError: files that do not load; an adapter that a stock Llama cannot hold; a folder that is not empty.
    """
    pair = Pair.find(model, adapter, exit_layer)
    check_exportable(pair)
    folder, values = _new_folder(out), drafter_config(pair)
    tensors = drafter_tensors(pair)
    if pair.target.is_file():
        values["dtype"] = dtype_name(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    settings = generation_config(pair.checkpoint, values) | assisted_settings(pair.adapter_config)
    write_json(folder / GENERATION_CONFIG, settings)
    write_tokenizer(pair.checkpoint, folder)
    write_checkpoint(folder, tensors, values)
    return pair


def export_for_transformers(
    model: str | Path, adapter: str | Path | None, out: str | Path, exit_layer: int | None = None
) -> Pair:
    """Write the target's checkpoint with the adapter and a ``custom_generate`` folder, for transformers; return both.

    The target's files are hard links where the file system has them, and copies elsewhere; a GGUF file is written as a
    folder, dequantised. Arguments and errors are those of ``export_drafter``, but any adapter will do.
    """
    pair = Pair.find(model, adapter, exit_layer)
    folder = _new_folder(out).resolve()
    write_stock_folder(pair.checkpoint, folder)
    own = folder / "adapter"
    own.mkdir()
    for path in matching(pair.adapter, ADAPTER_FILES):
        shutil.copyfile(path, own / path.name)
    values = json.loads((own / "config.json").read_text(encoding="utf-8"))
    write_json(own / "config.json", values | {"exit_layer": pair.adapter_config.exit_layer})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(GENERATE.format(adapter=str(own)), encoding="utf-8")
    return pair


def _new_folder(out: str | Path) -> Path:
    """The path of a folder that may be made there.

    Raises:
        KangarooError: something is there already, other than an empty folder.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise KangarooError(f"{folder} is a file; give a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise KangarooError(f"{folder} is not empty; give a new folder.")
    return folder
