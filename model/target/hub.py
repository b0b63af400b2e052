"""Where a model's files are: a folder or a file of this machine, or a repository of the Hugging Face hub.

Of a repository only those files are downloaded that will be read.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import KangarooError, reason
from .checkpoint import DRAFT_VOCABULARY_FILE, FORMATS

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    DRAFT_VOCABULARY_FILE,
)
GGUF = ".gguf"


def find_model(name_or_path: str | Path) -> Path:
    """A model's folder, or its GGUF file, downloaded if necessary.

    Args:
        name_or_path: a folder, a GGUF file, or a hub name: ``owner/name`` or ``owner/name/file.gguf``. A folder or
            repository without ``config.json`` may hold one GGUF file.

    Raises:
        KangarooError: what does not exist, holds no model, or leaves open which of several files is meant.
    """
    path = Path(name_or_path)
    if path.suffix == GGUF and path.is_file():
        return path
    name = str(name_or_path)
    if name.endswith(GGUF) and not path.exists():
        repository, _, file = name.rpartition("/")
        if not _may_be_repository(repository) or "/" not in repository:
            raise KangarooError(f"model file {name!r} does not exist.")
        return _download(repository, "model", [file]) / file
    folder = find_folder(name_or_path, "model")
    if (folder / "config.json").is_file():
        return folder
    found = sorted(each.name for each in folder.glob(f"*{GGUF}"))
    return folder / _only(found, str(folder)) if found else folder


def find_folder(name_or_path: str | Path, what: str) -> Path:
    """The folder itself, or the local copy of a hub repository, downloaded if necessary.

    Raises:
        KangarooError: a name that is neither; ``what`` says whether a model or an adapter was looked for.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.exists():
        file = " or a GGUF file" if what == "model" else ""
        raise KangarooError(f"{what} {name!r} is a file; give the folder that holds it{file}.")
    if not _may_be_repository(name):
        raise KangarooError(f"{what} folder {name!r} does not exist.")
    return _download(name, what)


def _may_be_repository(name: str) -> bool:
    return bool(name.strip()) and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def files_to_read(files: Sequence[str], repository: str) -> list[str]:
    """Those of a repository's files that loading it reads: of weights in several formats, the first of ``FORMATS``.

    Raises:
        KangarooError: no weights, or several GGUF files and nothing else.
    """
    whole = [name for name in files if "/" not in name]
    ggufs = sorted(name for name in whole if name.endswith(GGUF))
    if ggufs and "config.json" not in whole:
        return [_only(ggufs, repository)]
    small = [name for name in whole if name in SMALL_FILES]
    for single, index in FORMATS:
        if single in whole:
            return [*small, single]
        if index in whole:
            stem, suffix = single.rsplit(".", 1)
            return [*small, index, *(name for name in whole if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name))]
    raise KangarooError(f"{repository} holds no weights; expected {' or '.join(single for single, _ in FORMATS)}.")


def _only(ggufs: Sequence[str], where: str) -> str:
    if len(ggufs) > 1:
        raise KangarooError(f"{where} holds {len(ggufs)} GGUF files; give one of them, as in {where}/{ggufs[0]}.")
    return ggufs[0]


def _download(name: str, what: str, files: list[str] | None = None) -> Path:
    """The local copy of the repository ``name``; without the hub, what an earlier download left."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        if files is None:
            siblings = HfApi().model_info(name).siblings or ()
            files = files_to_read([each.rfilename for each in siblings], name)
        return Path(snapshot_download(name, allow_patterns=files))
    except KangarooError:
        raise
    except Exception as error:  # the hub, its HTTP client and the file system raise their own kinds
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):  # no earlier download; why the hub failed says more
            raise KangarooError(
                f"{what} {name!r} is not a folder, and the hub does not provide it ({reason(error)})."
            ) from error
