"""A model on a GPU that is not the current one: all of its work is launched where it lies, from any thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from drafters import with_backend
from pretended_gpus import pretended_gpus

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model import kangaroo as kangaroo_module
from kangaroo_kernels.model.backend import REFERENCES
from kangaroo_kernels.model.loop.threads import own_state
from kangaroo_kernels.operation import OPERATIONS

SECOND = torch.device("cuda:1")


def test_a_step_selects_its_gpu_and_gives_back_the_callers(monkeypatch):
    with pretended_gpus(monkeypatch) as current:
        with own_state(SECOND):
            assert current.index == 1
        assert current.index == 0
        with pytest.raises(KeyboardInterrupt), own_state(SECOND):
            raise KeyboardInterrupt
        assert current.index == 0
        with own_state(torch.device("cpu")):
            assert current.index == 0


def test_so_does_a_step_in_a_worker_thread(monkeypatch):
    seen = []

    def step() -> None:
        with own_state(SECOND):
            seen.append(current.index)
        seen.append(current.index)

    with pretended_gpus(monkeypatch, current=1) as current:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert seen == [1, 0]  # a new thread's own current GPU is the first


async def read(kangaroo: Kangaroo) -> None:
    async for _ in kangaroo.progress([1, 2, 3], max_new_tokens=4):
        pass


USES: dict[str, Callable[[Kangaroo], object]] = {
    "a text": lambda kangaroo: kangaroo.generate([1, 2, 3], max_new_tokens=4),
    "a sampled text": lambda kangaroo: kangaroo.generate([1, 2, 3], max_new_tokens=4, temperature=0.9, top_k=5),
    "a plain text": lambda kangaroo: kangaroo.generate([1, 2, 3], max_new_tokens=4, plain=True),
    "steps in threads": lambda kangaroo: asyncio.run(read(kangaroo)),
    "a session": lambda kangaroo: kangaroo.session(40).generate([1, 2, 3], max_new_tokens=4),
    "logits": lambda kangaroo: kangaroo.logits([1, 2, 3]),
    "draft logits": lambda kangaroo: kangaroo.draft_logits([1, 2, 3]),
}


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("use", USES)
def test_whatever_launches_has_selected_its_gpu(use, resident, pair, monkeypatch):
    inside, launched = threading.local(), []

    @contextmanager
    def watched(device: torch.device) -> Iterator[None]:
        assert device == kangaroo.target.device
        with own_state(device):
            inside.now = True
            yield
            inside.now = False

    def spy(work: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            launched.append(getattr(inside, "now", False))
            return work(*args, **kwargs)

        return launch

    spied = {name: spy(getattr(REFERENCES, name)) for name in (*OPERATIONS, "lm_head")}
    kangaroo = with_backend(pair.load(device="cpu"), replace(REFERENCES, resident=resident, **spied))
    monkeypatch.setattr(kangaroo_module, "own_state", watched)
    USES[use](kangaroo)
    assert launched and all(launched)
