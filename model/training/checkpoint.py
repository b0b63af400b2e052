"""What a training run keeps in its folder, so that it can go on after it was stopped."""

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import KangarooError
from .settings import TrainingSettings

STATE_FILE = "training_state.pt"
GENERATED_FILE = "self_generated.pt"


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` that leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def read_state(settings: TrainingSettings) -> dict[str, Any] | None:
    """The state of the stopped run in ``settings.out``; None where a new one may begin.

    Raises:
        KangarooError: the folder is a file, holds a run with other settings, or holds a finished adapter.
    """
    out = settings.out
    if out.exists() and not out.is_dir():
        raise KangarooError(f"{out} is a file; give a folder for the adapter.")
    if (out / STATE_FILE).exists():
        saved: dict[str, Any] = torch.load(out / STATE_FILE, weights_only=True)
        if saved["fingerprint"] != settings.fingerprint():
            raise KangarooError(f"{out} holds a stopped run with other settings; finish it or take a new folder.")
        return saved
    if (out / "config.json").exists():
        raise KangarooError(f"{out} already holds an adapter; take a new folder.")
    return None


def drop_state(out: Path) -> None:
    """Remove what only a stopped run needs."""
    for leftover in (STATE_FILE, GENERATED_FILE):
        (out / leftover).unlink(missing_ok=True)
