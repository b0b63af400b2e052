"""Loading: before the weights comes what fails quickly, and nothing of the caller's torch state changes them."""

import sys
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Pair
from gguf_files import write_gguf
from pairs import make_target, make_tokenizer
from pretended_gpus import pretended_gpus
from sentencepiece import SentencePieceTrainer
from test_bad_input import refuse

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model import load

TOKENS = [7, 3, 66, 0, 1, 20, 41, 5]


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf"])
def test_torch_state_of_the_caller(form: str, state: str, pair: Pair, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    folder = make_tokenizer(make_target(tmp_path / "model", attention_bias=True, rope_parameters=rope))
    if form == "gguf":
        divisors = torch.linspace(1, 4, 6).numpy()
        folder = write_gguf(tmp_path / "model.gguf", folder, tensors={"rope_freqs.weight": divisors})
    elif form == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    wanted = Kangaroo.from_pretrained(folder).logits(TOKENS)
    context: AbstractContextManager[object] = STATES[state]()
    with context:
        kangaroo = Kangaroo.from_pretrained(folder)
    assert torch.equal(kangaroo.logits(TOKENS), wanted)


def test_the_tokenizer_comes_before_the_weights(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tokenizer(make_target(tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(load, "load_target", lambda *_, **__: pytest.fail("the weights were loaded"))
    refuse(lambda: Kangaroo.from_pretrained(folder), str(folder), "tokenizer cannot be loaded")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the first Llamas and Vicuna come: ``tokenizer.model`` and no ``tokenizer.json``."""
    folder = make_target(tmp_path_factory.mktemp("old"), bos_token_id=1, eos_token_id=2)
    (folder / "text").write_text("the cat sat on the mat\n" * 50)
    settings = {"vocab_size": 20, "model_type": "bpe", "minloglevel": 3}
    SentencePieceTrainer.Train(input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), **settings)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    return folder


def test_a_tokenizer_of_sentencepiece_alone(old: Path) -> None:
    tokenizer = Kangaroo.from_pretrained(old).tokenizer
    tokens = tokenizer("the cat sat")["input_ids"]
    assert tokens[0] == 1 and 0 not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the cat sat"


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_what_sentencepiece_needs_is_named(missing: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refuse(lambda: Kangaroo.from_pretrained(old), "tokenizer.model", "pip install sentencepiece protobuf")


def test_devices_are_named_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(lambda: load.resolve_device("cuda:1"), "'cuda:1'", "no CUDA GPU")
    refuse(lambda: load.resolve_device(torch.device("cuda")), "'cuda'", "no CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse(lambda: load.resolve_device("cuda:1"), "'cuda:1'", "sees 1 CUDA")


@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")])
def test_a_gpu_without_a_number_is_the_current_one(
    device: str | torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpus(monkeypatch, current=1):
        assert load.resolve_device(device) == torch.device("cuda:1")
        assert load.resolve_device("cuda:0") == torch.device("cuda:0")


def test_repr_says_what_was_loaded(pair: Pair) -> None:
    said = repr(pair.load(device="cpu"))
    for word in (str(pair.target), "4 layers", "hidden size 48", "67 tokens", "KangarooDrafter", "float32 on cpu"):
        assert word in said
    assert "PromptLookup" in repr(Kangaroo.from_pretrained(pair.target))
