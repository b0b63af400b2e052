"""Folders for other engines: the drafter as a small stock Llama, or the target with our decoding in it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import KangarooError
from ..target.config import GENERATION_CONFIG
from .stock_llama import Pair, assisted_settings, check_exportable, drafter_config, drafter_tensors

TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
MODEL_FILES = ("config.json", GENERATION_CONFIG, "model*.safetensors*", "pytorch_model*.bin*", *TOKENIZER_FILES)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

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
        model: the target, as for ``Kangaroo.from_pretrained``.
        adapter: its adapter's folder or hub name; None takes the bundled pair's own.
        out: a new or empty folder.
        exit_layer: overrides the adapter's own.

    Raises:
        KangarooError: files that do not load; an adapter that a stock Llama cannot hold; a folder that is not empty.
    """
    from safetensors.torch import save_file

    pair = Pair.find(model, adapter, exit_layer)
    check_exportable(pair)
    folder, values = _new_folder(out), drafter_config(pair)
    tensors = drafter_tensors(pair)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = pair.target / GENERATION_CONFIG
    ends = {name: values[name] for name in SPECIAL_TOKENS if values.get(name) is not None}
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ends
    _write_json(folder / GENERATION_CONFIG, generation | assisted_settings(pair.adapter_config))
    if pair.is_folder:
        for path in _matching(pair.target, TOKENIZER_FILES):
            shutil.copyfile(path, folder / path.name)
    elif (tokenizer := pair.checkpoint.tokenizer()) is not None:
        tokenizer.save_pretrained(folder)
    _write_json(folder / "config.json", values)  # last: a folder that has it is whole
    return pair


def export_for_transformers(
    model: str | Path, adapter: str | Path | None, out: str | Path, exit_layer: int | None = None
) -> Pair:
    """Write the target's checkpoint with the adapter and a ``custom_generate`` folder, for transformers; return both.

    The target's files are hard links where the file system has them, and copies elsewhere. Arguments and errors are
    those of ``export_drafter``, but any adapter will do.
    """
    pair = Pair.find(model, adapter, exit_layer)
    if not pair.is_folder:
        raise KangarooError(f"{pair.target} is a GGUF file; transformers needs the model's Hugging Face folder.")
    folder = _new_folder(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for path in _matching(pair.target, MODEL_FILES):
        _link(path, folder / path.name)
    own = folder / "adapter"
    own.mkdir()
    for path in _matching(pair.adapter, MODEL_FILES):
        shutil.copyfile(path, own / path.name)
    values = json.loads((own / "config.json").read_text(encoding="utf-8"))
    _write_json(own / "config.json", values | {"exit_layer": pair.adapter_config.exit_layer})
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


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The folder's own files that match any of the patterns."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _link(source: Path, place: Path) -> None:
    """The same file under a second name, which takes no space; a copy where the file system cannot."""
    try:
        os.link(source.resolve(), place)
    except OSError:
        shutil.copyfile(source, place)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
