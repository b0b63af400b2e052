"""What every test shares: one thread, and one small pair of target and adapter."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import row_by_row
from drafters import on_the_device
from lost_gpu import pytest_runtest_makereport  # noqa: F401 (a hook)
from pairs import make_adapter, make_target, make_tokenizer

from kangaroo_kernels import Kangaroo

if TYPE_CHECKING:
    from report.job import Job

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# started in a shell's background, by nohup or by some CI systems, children would inherit that Ctrl-C is ignored
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
row_by_row.install()
hypothesis.settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cpu" and "GPU_TESTS_ON_CPU" not in os.environ:  # tools/ goes through them without a GPU
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU if there is one, else the CPU, in Triton's interpreter."""
    return DEVICE


@pytest.fixture
def guarded_workspaces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN between guards: what is read before it was written is seen, and what is written beside."""
    empty, made = torch.empty, []

    def guarded(*args, **settings):
        like = empty(*args, **settings)
        made.append(like.new_full((like.numel() + 128,), float("nan") if like.is_floating_point() else -77))
        return made[-1][64:-64].view(like.shape)

    monkeypatch.setattr(torch, "empty", guarded)
    yield
    for flat in made:
        for guard in (flat[:64], flat[-64:]):
            assert (guard.isnan() if flat.is_floating_point() else guard == -77).all()


class Pair(NamedTuple):
    """Folders of a target and of an adapter made for it."""

    target: Path
    adapter: Path

    def load(self, exit_layer: int | None = None, **settings: object) -> Kangaroo:
        """The pair as a user would load it."""
        return Kangaroo.from_pretrained(self.target, self.adapter, exit_layer=exit_layer, **settings)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Four layers, exit after two, an adapter that is right now and then, and a character tokenizer. Read-only."""
    folder = tmp_path_factory.mktemp("pair")
    target = make_tokenizer(make_target(folder / "target", quiet_from=2, quiet=0.2))
    return Pair(target, make_adapter(folder / "adapter", target, exit_layer=2, copy_layer=2))


@pytest.fixture
def resident(pair: Pair) -> Kangaroo:
    """The pair with the loop on the device, on the references."""
    return on_the_device(pair.load(device="cpu"))


@pytest.fixture
def job(tmp_path: Path) -> "Job":
    """A part of the GPU's report, tiny."""
    from report.job import Job

    return Job(tmp_path / "piece.json", tmp_path, 60.0, smoke=True)
