"""Launch configurations are data: ``configs/`` holds a JSON file for each GPU name, and one for each architecture.

A file maps each operation to rules; the first whose conditions hold wins, the GPU's own rules before those of its
architecture. Conditions are ``n``, ``k`` and ``dtype`` (equal) and ``max_n`` (at most); a rule without any is the
operation's default. An entry ``launches`` says whether kernels are chained (``shared/chain.py``). ``tools/tune.py``
writes the files of GPUs. No setting in a file changes a bit of any result: whatever would (K steps, KV tiles and
splits) is fixed in the kernels, and the tuner refuses a candidate that gives other bits.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFAULT_ARCHITECTURE = 80


class LaunchConfig(NamedTuple):
    """How an operation is launched.

    Attributes:
        num_warps: warps of a program.
        num_stages: tiles of the software pipeline; one is in use while the others are being loaded.
        block_n: weight rows that a program owns (of each matrix, if there are two); 0 where there is no such choice.
        programs_per_sm: the most programs of ``draft_loop`` on a streaming multiprocessor; 0 for other operations.
        steps_ahead: steps along K of the next weight that ``draft_loop`` prefetches at a barrier; 0 for others.
        registers: the most registers of a thread of ``attention``; 0 leaves it to the assembler.
    """

    num_warps: int
    num_stages: int
    block_n: int = 0
    programs_per_sm: int = 0
    steps_ahead: int = 0
    registers: int = 0


def file_name(gpu: str) -> str:
    """The name of a GPU's file: ``NVIDIA_H200.json`` for ``NVIDIA H200``."""
    return "".join(char if char.isalnum() else "_" for char in gpu) + ".json"


@lru_cache(maxsize=16)
def rules(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rules of one file of ``configs/``; none where there is no such file."""
    file = resources.files("kangaroo_kernels").joinpath("configs").joinpath(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def pick(files: tuple[str, ...], op: str, n: int, k: int, dtype: str) -> LaunchConfig:
    """The first matching rule of ``files`` for an operation with ``n`` outputs and ``k`` inputs."""
    for name in files:
        for rule in rules(name).get(op, ()):
            exact = {"n": n, "k": k, "dtype": dtype}
            if all(rule.get(key, value) == value for key, value in exact.items()) and n <= rule.get("max_n", n):
                return LaunchConfig(**{field: rule[field] for field in LaunchConfig._fields if field in rule})
    raise LookupError(f"no launch configuration for {op} with n={n}, k={k}, {dtype} in {', '.join(files)}.")


def architecture_file(capability: int) -> str:
    """The file of an architecture, or of the nearest older one that has a file."""
    known = (90, DEFAULT_ARCHITECTURE)
    return f"sm_{next((arch for arch in known if capability >= arch), DEFAULT_ARCHITECTURE)}.json"


@lru_cache(maxsize=8)
def files_for(device: torch.device) -> tuple[str, ...]:
    """The files that hold for ``device``, in order; the interpreter on a CPU takes the oldest architecture's."""
    if device.type != "cuda":
        return (architecture_file(DEFAULT_ARCHITECTURE),)
    major, minor = torch.cuda.get_device_capability(device)
    return (file_name(torch.cuda.get_device_name(device)), architecture_file(10 * major + minor))


@lru_cache(maxsize=256)
def _pick_on(device: torch.device, op: str, n: int, k: int, dtype: torch.dtype) -> LaunchConfig:
    return pick(files_for(device), op, n, k, str(dtype).removeprefix("torch."))


Picker = Callable[[str, int, int, torch.dtype], LaunchConfig]
_pickers: list[Picker] = []


@contextmanager
def configured_by(picker: Picker) -> Iterator[None]:
    """Inside this context, ``picker(op, n, k, dtype)`` decides instead of the files.

    It is for the tuner's candidates, and for compiling for a GPU that is not here.
    """
    _pickers.append(picker)
    try:
        yield
    finally:
        _pickers.pop()


def launch_config(op: str, n: int, k: int, x: Tensor) -> LaunchConfig:
    """How to launch ``op`` with ``n`` outputs and ``k`` inputs on the device and in the dtype of ``x``."""
    return _pickers[-1](op, n, k, x.dtype) if _pickers else _pick_on(x.device, op, n, k, x.dtype)


_chained: list[bool] = []


@contextmanager
def chained(on: bool = True) -> Iterator[None]:
    """Inside this context, kernels are launched as programmatic dependents, or not, whatever the files say.

    Where the GPU has no such launches (before sm_90) it changes nothing. A captured graph keeps what it was captured
    with.
    """
    _chained.append(on)
    try:
        yield
    finally:
        _chained.pop()


@lru_cache(maxsize=8)
def _chained_on(device: torch.device) -> bool:
    settings = [rule for name in files_for(device) for rule in rules(name).get("launches", ())]
    return bool(settings and settings[0].get("chained", False))


def is_chained(device: torch.device) -> bool:
    """Whether to chain kernels on ``device``: the first file with ``"launches": [{"chained": ...}]`` decides."""
    return _chained[-1] if _chained else _chained_on(device)


def configs_folder() -> Path:
    """The folder that the tuner writes to."""
    return Path(str(resources.files("kangaroo_kernels").joinpath("configs")))
