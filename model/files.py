"""Files that are whole or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import KangarooError, reason


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` make a file beside ``path``, then give it that name.

    Whoever is killed meanwhile leaves the file that was there before.
    """
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """``write_whole`` of a text in UTF-8."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        KangarooError: it is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KangarooError(f"{path} is damaged ({reason(error)}); take a new folder.") from error
    if not isinstance(values, dict):
        raise KangarooError(f"{path} is damaged (it holds no object); take a new folder.")
    return values
