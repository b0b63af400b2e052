"""Whatever state of torch a caller has set, the tokens are the same, on both loops, and the state is left as it was."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from drafters import on_the_device
from pairs import make_adapter, make_target

from kangaroo_kernels import Kangaroo

PROMPT = [7, 3, 5]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.9},
    "shaped": {"temperature": 0.9, "seed": 5, "min_p": 0.01, "repetition_penalty": 1.2, "logit_bias": {3: 1.5}},
    "rejection": {"temperature": 0.9, "seed": 5, "acceptance": "rejection"},
}


@contextmanager
def changed(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    """A global of torch's with another value, which must still be there at the end."""
    before = get()
    put(value)
    try:
        yield
        assert get() == value
    finally:
        put(before)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dtype float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "dtype bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "device meta": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad in inference": lambda: torch.inference_mode(False),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 3),
    "precision": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kangaroo]:
    """The same pair on each loop: led by the host, resident on the references, resident on the kernels."""
    folder = tmp_path_factory.mktemp("state")
    target = make_target(folder / "target", hidden_size=40, intermediate_size=56, layers=3, quiet_from=1, quiet=0.2)
    adapter = make_adapter(folder / "adapter", target, exit_layer=1, copy_layer=1)

    def load_on(loop: str) -> Kangaroo:
        kernels = "triton" if loop == "kernels" else "reference"
        kangaroo = Kangaroo.from_pretrained(target, adapter, device="cpu", dtype="float32", kernels=kernels)
        return on_the_device(kangaroo) if loop == "resident" else kangaroo

    return load_on


@pytest.mark.parametrize("loop", ["host", "resident", "kernels"])
@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_no_token(load, loop, state):
    count, names = (24, [*SETTINGS]) if loop != "kernels" else (2, ["sampled"])  # the interpreter is slow
    wanted = {
        name: load("host").generate(PROMPT, max_new_tokens=count, **settings).tokens
        for name, settings in SETTINGS.items()
        if name in names
    }
    kangaroo = load(loop)
    for name in names:
        settings = SETTINGS[name] | {"num_speculative_tokens": 2}
        for plain in (False, True):
            with STATES[state]():
                text = kangaroo.progress(PROMPT, max_new_tokens=count, plain=plain, **settings)
                tokens = [token for step in text for token in step.commit.tokens]
            if not (plain and name == "rejection"):
                assert tokens == wanted[name], (name, plain)
