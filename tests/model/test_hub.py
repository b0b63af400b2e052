"""Names of the hub: which of a repository's files are asked for, on a hub that is only a table here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Pair
from gguf_files import write_gguf
from test_bad_input import refuse

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.target.hub import find_folder, find_model

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
BINS = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
TEXT = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
BESIDE = ["README.md", ".gitattributes", "training_args.bin", "optimizer.bin", "runs/events", "onnx/model.onnx"]

REPOSITORIES: dict[str, tuple[list[str], list[str]]] = {
    "both formats": (
        ["model.safetensors.index.json", *SHARDS],
        ["pytorch_model.bin.index.json", *BINS],
    ),
    "both formats, whole": (["model.safetensors"], ["pytorch_model.bin", "model.fp16.safetensors"]),
    "bin alone": (["pytorch_model.bin.index.json", *BINS], []),
    "consolidated beside it": (
        ["model.safetensors.index.json", *SHARDS, "tokenizer.model"],
        ["consolidated.safetensors", "original/consolidated.00.pth", "original/params.json", "tokenizer.model.v3"],
    ),
    "an adapter": (["model.safetensors", "draft_vocabulary.safetensors"], []),
    "templates": (["model.safetensors", "chat_template.jinja", "special_tokens_map.json"], ["model-Q4.gguf"]),
}
"""What a repository holds beside ``TEXT`` and ``BESIDE``: what is to be fetched, and what is not."""


class Hub:
    """A hub whose repositories are lists of names, and which notes what is fetched.

    Attributes:
        files: every repository's.
        fetched: the patterns of each download.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.files, self.fetched = folder, dict[str, list[str]](), list[list[str]]()
        self.reachable = True
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda _, name: self.info(name))
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def info(self, name: str) -> SimpleNamespace:
        if not self.reachable:
            raise ConnectionError("no network")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files[name]])

    def download(self, name: str, allow_patterns: Any = None, local_files_only: bool = False) -> str:
        folder = self.folder / name
        if not local_files_only:
            assert self.reachable
            self.fetched.append(allow_patterns)
        elif not folder.is_dir():
            raise FileNotFoundError(name)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


@pytest.mark.parametrize("case", REPOSITORIES)
def test_only_files_that_are_read_are_fetched(case: str, hub: Hub) -> None:
    read, left = REPOSITORIES[case]
    hub.files["owner/name"] = sorted([*read, *left, *TEXT, *BESIDE])
    find_model("owner/name")
    assert [sorted(files) for files in hub.fetched] == [sorted([*TEXT, *read])]


def test_adapters_likewise(hub: Hub) -> None:
    hub.files["owner/adapter"] = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "training.json"]
    assert find_folder("owner/adapter", "adapter") == hub.folder / "owner/adapter"
    assert hub.fetched == [["config.json", "model.safetensors"]]


def test_a_repository_of_gguf_files(hub: Hub, pair: Pair) -> None:
    hub.files |= {"owner/one": ["model.gguf", "README.md"], "owner/two": ["a.gguf", "b.gguf"]}
    refuse(lambda: find_model("owner/two"), "owner/two", "2 GGUF files", "owner/two/a.gguf")
    (hub.folder / "owner/one").mkdir(parents=True)
    write_gguf(hub.folder / "owner/one/model.gguf", pair.target)
    wanted = pair.load().generate([7, 8, 9], max_new_tokens=9, plain=True).tokens
    for name in ("owner/one", "owner/one/model.gguf"):
        assert Kangaroo.from_pretrained(name).generate([7, 8, 9], max_new_tokens=9, plain=True).tokens == wanted
    assert hub.fetched == [["model.gguf"], ["model.gguf"]]


def test_a_repository_without_weights_fetches_nothing(hub: Hub) -> None:
    hub.files["owner/name"] = [*TEXT, *BESIDE]
    refuse(lambda: find_model("owner/name"), "owner/name", "no weights", "model.safetensors")
    assert hub.fetched == []


def test_without_the_hub_what_was_fetched_before_serves(hub: Hub) -> None:
    (hub.folder / "owner/name").mkdir(parents=True)
    hub.reachable = False
    assert find_model("owner/name") == hub.folder / "owner/name"
    refuse(lambda: find_model("owner/other"), "owner/other", "no network")
