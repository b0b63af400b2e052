"""What a training run keeps in its folder, so that it can go on after it was stopped, or be extended."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import KangarooError, reason
from .settings import TrainingSettings

STATE_FILE = "training_state.pt"
REPORT_FILE = "training.json"
"""Written when all is done, scoring included."""


def read_state(settings: TrainingSettings) -> dict[str, Any] | None:
    """The state of the run in ``settings.out``; None where a new one may begin.

    Raises:
        KangarooError: the folder is a file, holds a run of other settings, one that is through, or an adapter alone.
    """
    out = settings.out
    if out.exists() and not out.is_dir():
        raise KangarooError(f"{out} is a file; give a folder for the adapter.")
    if not (out / STATE_FILE).exists():
        if (out / "config.json").exists():
            raise KangarooError(
                f"{out} holds an adapter and no state of its training; take a new folder, and --start-from {out} to "
                "begin with its weights."
            )
        return None
    try:
        saved: dict[str, Any] = torch.load(out / STATE_FILE, weights_only=True)
        before = json.loads(saved["fingerprint"])
    except Exception as error:  # a damaged file may raise anything
        raise KangarooError(f"{out / STATE_FILE} is damaged ({reason(error)}); take a new folder.") from error
    ours = json.loads(settings.fingerprint())
    if others := sorted(name for name in before.keys() | ours.keys() if before.get(name) != ours.get(name)):
        raise KangarooError(
            f"{out} holds a run with another {' and '.join(others)}. Give its settings to go on, or take a new folder."
        )
    if (out / REPORT_FILE).exists() and saved["step"] >= settings.last_step:
        raise KangarooError(f"{out} already holds an adapter of {saved['step']} steps; raise --steps to train it on.")
    return saved


@contextmanager
def stop_between_steps() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in two; a second Ctrl-C is the usual interruption.

    Outside of the main thread, where signals do not arrive, the event stays unset.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
