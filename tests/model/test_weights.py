"""Every way a checkpoint's tensors lie on disk gives the same model, and none of them takes twice the memory."""

import json
import os
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import make_target
from safetensors.torch import load_file, save_file

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.target.checkpoint import read_tensors

Tensors = dict[str, torch.Tensor]
TOKENS = [7, 3, 66, 0, 1, 20, 41, 5]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("checkpoint"), attention_bias=True)


@pytest.fixture
def tensors(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint's configuration, without weights."""
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    return tmp_path


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> torch.Tensor:
    return logits(checkpoint)


def logits(folder: Path) -> torch.Tensor:
    return Kangaroo.from_pretrained(folder, device="cpu").logits(TOKENS)


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The tensors in two, with one layer's q, k and v apart."""
    names = sorted(tensors)
    first = {name for name in names[::2] if "layers.1" in name} | set(names[: len(names) // 3])
    return {n: tensors[n] for n in names if n in first}, {n: tensors[n] for n in names if n not in first}


def write_shards(folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]) -> None:
    weight_map = {}
    for number, shard in enumerate(halves(tensors), 1):
        name = f"{stem}-{number:05}-of-00002.{suffix}"
        save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def save_legacy(tensors: Tensors, path: Path) -> None:
    """As PyTorch wrote before 1.6."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, Callable[[Path, Tensors], None]] = {
    "safetensors": lambda folder, tensors: save_file(tensors, folder / "model.safetensors"),
    "sharded safetensors": lambda folder, tensors: write_shards(folder, tensors, "model", "safetensors", save_file),
    "bin": lambda folder, tensors: torch.save(tensors, folder / "pytorch_model.bin"),
    "ordered bin": lambda folder, tensors: torch.save(OrderedDict(tensors), folder / "pytorch_model.bin"),
    "parameters in bin": lambda folder, tensors: torch.save(
        {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin"
    ),
    "legacy bin": lambda folder, tensors: save_legacy(tensors, folder / "pytorch_model.bin"),
    "sharded bin": lambda folder, tensors: write_shards(folder, tensors, "pytorch_model", "bin", torch.save),
    "sharded legacy bin": lambda folder, tensors: write_shards(folder, tensors, "pytorch_model", "bin", save_legacy),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_logits(form: str, folder: Path, tensors: Tensors, wanted: torch.Tensor) -> None:
    FORMATS[form](folder, tensors)
    assert torch.equal(logits(folder), wanted)


def test_shards_as_transformers_writes_them(checkpoint: Path, tmp_path: Path, wanted: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(tmp_path), wanted)


def test_safetensors_come_before_bin(folder: Path, tensors: Tensors, wanted: torch.Tensor) -> None:
    FORMATS["safetensors"](folder, tensors)
    (folder / "pytorch_model.bin").write_bytes(b"an older copy, and not even whole")
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "bin", "legacy bin"])
def test_stored_dtypes_are_read_exactly(form: str, dtype: torch.dtype, folder: Path, tensors: Tensors) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    FORMATS[form](folder, rounded)
    got = logits(folder)
    for path in folder.glob("*.bin"):
        path.unlink()
    FORMATS["safetensors"](folder, {name: tensor.float() for name, tensor in rounded.items()})
    assert torch.equal(got, logits(folder))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_transposed_views_in_a_file(form: str, folder: Path, tensors: Tensors, wanted: torch.Tensor) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    if form == "bin":  # safetensors refuses what is not contiguous
        tensors[name] = tensors[name].t().contiguous().t()
    FORMATS[form](folder, tensors)
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_rotary_buffers_of_old_checkpoints_are_passed_over(
    form: str, folder: Path, tensors: Tensors, wanted: torch.Tensor
) -> None:
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((6,), torch.nan)
    FORMATS[form](folder, tensors)
    assert torch.equal(logits(folder), wanted)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tied_checkpoints_may_hold_the_head_too(form: str, tmp_path: Path) -> None:
    folder = make_target(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    wanted = logits(folder)
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    FORMATS[form](folder, tensors)
    assert torch.equal(logits(folder), wanted)


def test_tied_checkpoints_with_another_head_are_refused_or_untied(tmp_path: Path) -> None:
    """Where the two differ, transformers believes the file, not ``tie_word_embeddings``."""
    from transformers import AutoModelForCausalLM

    folder = make_target(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([TOKENS])).logits[0]
    try:
        ours = logits(folder)
    except KangarooError as error:
        assert "lm_head.weight" in str(error)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_loading_leaves_the_files_alone(folder: Path, tensors: Tensors) -> None:
    FORMATS["bin"](folder, tensors)  # mapped into memory, where writing would reach the file
    before = (folder / "pytorch_model.bin").read_bytes()
    logits(folder)
    assert (folder / "pytorch_model.bin").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_tensors_are_read_one_at_a_time(folder: Path, tensors: Tensors) -> None:
    FORMATS["sharded safetensors"](folder, tensors)
    reader = read_tensors(folder)
    seen = []
    for name, tensor in reader:
        seen.append((name, weakref.ref(tensor)))
        del tensor
        assert all(reference() is None for _, reference in seen[:-1]), "the reader holds on to what it gave out"
    assert sorted(name for name, _ in seen) == sorted(tensors)


LOAD_WITHIN = """
import resource, sys
import torch
from kangaroo_kernels import Kangaroo, KangarooError

def data():  # private writable memory, what RLIMIT_DATA counts: not the mapping of a file
    return int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) * 1024

small, folder, size, share = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
Kangaroo.from_pretrained(small, device="cpu")  # imports what there is to import
before = data()
limit = before + int(share * size)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    kangaroo = Kangaroo.from_pretrained(folder, device="cpu")
except (MemoryError, RuntimeError):
    sys.exit("out of memory")
print((data() - before) / size)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 MB in float32, in shards of at most 5 MB."""
    from transformers import AutoModelForCausalLM

    whole, shards = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("shards")
    make_target(whole, vocab_size=1000, hidden_size=512, intermediate_size=1024, layers=4, std=0.05)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(shards, max_shard_size="5MB")
    return shards


def load_within(share: float, small: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    arguments = [str(small), str(folder), str(size), str(share)]
    # no heap, whose freed memory lingers: every tensor is a mapping of its own
    plain_memory = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", LOAD_WITHIN, *arguments],
        env=os.environ | plain_memory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_no_second_copy(checkpoint: Path, large: Path) -> None:
    """Loading fits into 1.4 times the model's size, one shard's mapping included, and leaves 1.1 times behind."""
    done = load_within(1.4, checkpoint, large)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_limit_is_felt(checkpoint: Path, large: Path) -> None:
    done = load_within(0.8, checkpoint, large)
    assert done.returncode == 1
    assert "out of memory" in done.stderr
