"""GGUF files: logits, tokens and ends of text as transformers reads them from the same file, and refusals."""

import weakref
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import TOKENS, write_gguf
from pairs import make_target
from test_bad_input import refuse
from transformers import AutoModelForCausalLM

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.target.checkpoint import open_folder
from kangaroo_kernels.model.target.gguf import open_gguf
from kangaroo_kernels.model.target.gguf_file import GGUFFile
from kangaroo_kernels.model.training.teacher import Teacher

PROMPT = [7, 3, 66, 0, 1, 20, 41, 5, 13, 13, 60]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VALUES = [Kind.F32, Kind.F16, Kind.BF16]
BLOCKS_OF_32 = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.IQ4_NL]
BLOCKS_OF_256 = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS, Kind.IQ3_S]


def make(folder: Path, **settings: Any) -> Path:
    """A checkpoint whose sizes are multiples of a block of 32, and whose numbers are exact in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "rms_norm_eps": 2.0**-17}
    return make_target(folder, **(sizes | settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("gguf") / "llama")


@pytest.fixture(scope="module")
def file(checkpoint: Path) -> Path:
    return write_gguf(checkpoint.parent / "model.gguf", checkpoint)


def ours(path: Path) -> torch.Tensor:
    return Kangaroo.from_pretrained(path, device="cpu").logits(PROMPT)


def theirs(path: Path) -> torch.Tensor:
    """Transformers' own reading of a file or folder, in float32."""
    where, which = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **which)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def check_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# ---- the same logits


@pytest.mark.parametrize("kind", [*VALUES, *BLOCKS_OF_32, *BLOCKS_OF_256], ids=lambda kind: kind.name)
def test_logits_equal_transformers(kind: Kind, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256} if kind in BLOCKS_OF_256 else {}
    path = write_gguf(tmp_path / "model.gguf", make(tmp_path / "model", std=0.1, **sizes), kind)
    check_close(ours(path), theirs(path))


def test_a_file_gives_the_bits_of_its_folder(checkpoint: Path, file: Path) -> None:
    """The permuted rows of queries and keys come to lie where the folder's rows are brought."""
    assert torch.equal(ours(file), ours(checkpoint))


def test_qwen2s_rows_are_not_permuted(tmp_path: Path) -> None:
    """Their biases would show it, too."""
    folder = make(tmp_path / "model", family="qwen2")
    path = write_gguf(tmp_path / "model.gguf", folder, architecture="qwen2")
    assert torch.equal(ours(path), ours(folder))
    check_close(ours(path), theirs(path))


def test_a_folder_with_one_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "any.gguf").symlink_to(file)
    assert torch.equal(ours(tmp_path), ours(file))


@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"kv_heads": 4}, {"kv_heads": 1}],
    ids=str,
)
def test_shapes_that_only_tensors_tell(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = make(tmp_path / "model", **settings)
    path = write_gguf(tmp_path / "model.gguf", folder)
    assert open_gguf(path).config == replace(open_folder(folder).config, eos_token_ids=(2,))
    assert torch.equal(ours(path), ours(folder))


def test_llama3s_frequencies_come_ready_made(tmp_path: Path) -> None:
    """As llama.cpp's converter writes them: the unscaled frequency over the scaled one."""
    rope = LLAMA3 | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    folder = make(tmp_path / "model", rope_parameters=rope)
    plain = write_gguf(tmp_path / "plain.gguf", folder)
    divisors = open_gguf(plain).config.inv_freq(1) / open_folder(folder).config.inv_freq(1)
    assert divisors.max() == 8 and divisors.min() == 1
    path = write_gguf(tmp_path / "model.gguf", folder, tensors={"rope_freqs.weight": divisors.numpy()})
    check_close(ours(path), ours(folder))
    assert not torch.allclose(ours(plain), ours(folder), atol=0.01)


def test_linear_scaling(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0})
    for given in (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ):
        path = write_gguf(tmp_path / "model.gguf", folder, changed=given)
        assert torch.equal(ours(path), ours(folder))


def test_a_vocabulary_with_more_rows_than_tokens(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", vocab_size=70)
    path = write_gguf(tmp_path / "model.gguf", folder, changed={"llama.vocab_size": len(TOKENS)})
    assert torch.equal(ours(path), ours(folder))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, "float32"), (Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q4_0, "bfloat16")]
)
def test_the_dtype_for_a_gpu(kind: Kind, dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    assert open_gguf(write_gguf(tmp_path / "model.gguf", checkpoint, kind)).config.dtype == getattr(torch, dtype)


# ---- text


def test_tokenizer_template_and_ends(checkpoint: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 40}
    path = write_gguf(tmp_path / "model.gguf", checkpoint, changed=ends | {"tokenizer.chat_template": template})
    kangaroo = Kangaroo.from_pretrained(path, device="cpu")
    assert kangaroo.target.config.eos_token_ids == (2, 3, 40)
    assert kangaroo.tokenizer.chat_template == template
    assert kangaroo.tokenizer("<s>AC<|eot|>")["input_ids"] == [1, TOKENS.index("A"), TOKENS.index("C"), 3]
    assert kangaroo.tokenizer.decode([TOKENS.index("A"), 3], skip_special_tokens=True) == "A"


@pytest.mark.parametrize(
    ("changed", "begins"),
    [({}, False), ({"tokenizer.ggml.add_bos_token": True}, True), ({"tokenizer.ggml.pre": "llama-bpe"}, True)],
    ids=str,
)
def test_whether_a_prompt_begins_with_bos(changed: dict[str, Any], begins: bool, file: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", file.parent / "llama", changed=changed)
    assert (open_gguf(path).tokenizer()("A")["input_ids"][0] == 1) == begins


def test_a_file_without_a_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", checkpoint, changed={"tokenizer.ggml.model": None})
    assert open_gguf(path).tokenizer() is None


# ---- refusals


METADATA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no size": ({"llama.block_count": None}, ("llama.block_count", "metadata")),
    "experts": ({"llama.expert_count": 8}, ("mixture of 8 experts",)),
    "scaled logits": ({"llama.logit_scale": 16.0}, ("'logit_scale' is 16.0",)),
    "both directions": ({"llama.attention.causal": False}, ("'attention.causal' is False",)),
    "sliding window": ({"llama.attention.sliding_window": 4096}, ("sliding-window", "4096")),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ("'yarn'", "linear")),
    "half a head": ({"llama.rope.dimension_count": 8}, ("llama.rope.dimension_count is 8", "16")),
    "one of several": ({"split.count": 3}, ("one of 3 parts", "merge")),
    "heads": ({"llama.attention.head_count": 3}, ("3 attention heads", "2 key-value heads")),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_serve(case: str, checkpoint: Path, tmp_path: Path) -> None:
    changed, words = METADATA[case]
    path = write_gguf(tmp_path / "model.gguf", checkpoint, changed=changed)
    refuse(lambda: Kangaroo.from_pretrained(path), str(path), *words)


@pytest.mark.parametrize(
    ("name", "words"), [("gemma2", ("'gemma2'", "capped logits", "qwen2")), ("wavenet", ("'wavenet'", "llama"))]
)
def test_other_architectures(name: str, words: tuple[str, ...], checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", checkpoint, architecture=name)
    refuse(lambda: Kangaroo.from_pretrained(path), str(path), *words)


def test_tensors_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", checkpoint, tensors={"blk.0.attn_q_norm.weight": np.ones(16, "f4")})
    refuse(lambda: Kangaroo.from_pretrained(path), "unexpected tensor", "attn_q_norm")
    path = write_gguf(tmp_path / "model.gguf", checkpoint, tensors={"rope_freqs.weight": np.ones(3, "f4")})
    refuse(lambda: Kangaroo.from_pretrained(path), "rope_freqs.weight", "8 numbers")


def test_every_truncation(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "model.gguf"
    data = min(stored.start for stored in GGUFFile(file).tensors.values())
    for end in (*range(0, data, 97), data, (data + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        refuse(lambda: Kangaroo.from_pretrained(path), str(path))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, b"GGML", "not a GGUF file"),
        (0, b"version https://git-lfs", "not a GGUF file"),
        (4, b"\x09", "version 9"),
        (4, b"\x00\x00\x00\x03", "big-endian"),
        (8, b"\xff" * 8, "damaged"),
        (16, b"\xff" * 8, "damaged"),
        (24, b"\xff" * 8, "damaged"),
    ],
)
def test_damaged_headers(place: int, value: bytes, words: str, file: Path, tmp_path: Path) -> None:
    content, path = bytearray(file.read_bytes()), tmp_path / "model.gguf"
    content[place : place + len(value)] = value
    path.write_bytes(content)
    refuse(lambda: Kangaroo.from_pretrained(path), str(path), words)


def test_changed_bytes_are_read_or_refused(file: Path, tmp_path: Path) -> None:
    content, path, random = file.read_bytes(), tmp_path / "model.gguf", Random(0)
    data = min(stored.start for stored in GGUFFile(file).tensors.values())
    refused = 0
    for _ in range(400):
        changed = bytearray(content)
        changed[random.randrange(4, data)] = random.choice((0, 255, random.randrange(256)))
        path.write_bytes(changed)
        try:
            list(open_gguf(path).tensors())
        except KangarooError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 400


def test_a_tensor_without_values(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", checkpoint, tensors={"blk.0.attn_q.bias": np.ones((0, 16), "f4")})
    refuse(lambda: Kangaroo.from_pretrained(path), "blk.0.attn_q.bias", "shape")


def test_tensors_are_read_one_at_a_time(file: Path) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    for _, tensor in open_gguf(file).tensors():
        seen.append(weakref.ref(tensor))
        del tensor
        assert all(reference() is None for reference in seen[:-1])
    assert len(seen) == 21


def test_training_reads_the_same_target(file: Path) -> None:
    """Its teacher is transformers' model of the file, whose states are the runtime's."""
    kangaroo, teacher = Kangaroo.from_pretrained(file, device="cpu"), Teacher(file, torch.device("cpu"))
    with torch.no_grad():
        logits = teacher.model(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(kangaroo.logits(PROMPT), logits, rtol=0, atol=1e-4)


def test_which_file(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(file)
    refuse(lambda: Kangaroo.from_pretrained(tmp_path), "2 GGUF files", "a.gguf")
    for gone in (tmp_path / "gone.gguf", "gone.gguf", "folder/gone.gguf"):
        refuse(lambda gone=gone: Kangaroo.from_pretrained(gone), "gone.gguf", "does not exist")
