"""A user's mistakes: each gives one clear sentence, and nothing runs that a checkpoint brings."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_adapter, make_target, make_tokenizer
from safetensors.torch import load_file, save_file

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model import request
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter, check_persistent

NAN, INFINITY = float("nan"), float("inf")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
CONTEXT = 40


def refuse(action: Callable[[], object], *words: str) -> str:
    """Run ``action``; it must raise a ``KangarooError`` of one clear sentence that has all ``words``."""
    with pytest.raises(KangarooError) as caught:
        action()
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    assert re.search(r"[\w)\]']\.$", message), f"not a sentence: {message}"
    assert ".." not in message.replace("...", "").replace("../", "")
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer."""
    return make_target(tmp_path_factory.mktemp("bad") / "target", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def adapter(checkpoint: Path) -> Path:
    return make_adapter(checkpoint.parent / "adapter", checkpoint, exit_layer=2)


@pytest.fixture(scope="module")
def kangaroo(checkpoint: Path, adapter: Path) -> Kangaroo:
    return Kangaroo.from_pretrained(checkpoint, adapter, device="cpu")


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def adapter_folder(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to damage."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else tensors | {name: changed}, path)


def use_bin(folder: Path) -> Path:
    """Turn the checkpoint into ``pytorch_model.bin``."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


# ---- where the files are


def test_missing_folder(checkpoint: Path, tmp_path: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(tmp_path / "gone"), "model", "gone", "does not exist")
    refuse(lambda: Kangaroo.from_pretrained("./gone"), "model", "gone", "does not exist")
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, tmp_path / "gone"), "adapter", "gone", "does not exist")


def test_unknown_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("404 Client Error.\n\nRepository Not Found for url: https://...")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    refuse(lambda: Kangaroo.from_pretrained("someone/nothing"), "someone/nothing", "hub", "404 Client Error")


def test_file_instead_of_a_folder(checkpoint: Path, adapter: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(checkpoint / "config.json"), "model", "is a file", "folder")
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter / "model.safetensors"), "adapter", "is a file")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuse(lambda: Kangaroo.from_pretrained(folder), "config.json", str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuse(lambda: Kangaroo.from_pretrained(folder), "no weights", "model.safetensors", "pytorch_model.bin")


# ---- config.json


@pytest.mark.parametrize("text", [b"", b"{", b"not json", b"\xff\xfe\x00"])
def test_broken_json(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    refuse(lambda: Kangaroo.from_pretrained(folder), "config.json", "not readable JSON")


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"llama"'])
def test_json_that_describes_no_model(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refuse(lambda: Kangaroo.from_pretrained(folder), "config.json", "no JSON object")


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "own code": ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, ("auto_map", "own code")),
    "gpt2": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ("'gpt2'", "llama", "mistral")),
    "mixture": ({"model_type": "mixtral"}, ("'mixtral'", "not supported", "mixture of experts")),
    "norms of heads": ({"model_type": "qwen3"}, ("'qwen3'", "norms of each head's queries and keys", "qwen2")),
    "no such type": ({"model_type": 7}, ("model type 7",)),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantized", "float16")),
    "sliding window": ({"model_type": "mistral", "sliding_window": 4096}, ("sliding", "4096", "not supported")),
    "activation": ({"hidden_act": "gelu"}, ("'gelu'", "silu")),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ("RoPE", "yarn", "linear")),
    "old yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, ("RoPE", "yarn")),
    "no factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ("factor",)),
    "factor 0": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, ("factor", "above 0")),
    "factor nan": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": NAN}}, ("factor is nan",)),
    "factor text": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": "4"}}, ("factor",)),
    "theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ("rope_theta", "above 0")),
    "theta 0": ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ("rope_theta is 0", "above 0")),
    "llama3 alone": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, ("low_freq",)),
    "llama3 reversed": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 16,
            }
        },
        ("low_freq_factor", "below"),
    ),
    "RoPE is text": ({"rope_parameters": "linear"}, ("rope_parameters",)),
    "groups": ({"num_key_value_heads": 3}, ("4 attention heads", "3 key-value heads")),
    "heads and hidden": ({"num_attention_heads": 5, "head_dim": None}, ("48", "5")),
    "no heads": ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
    "odd head_dim": ({"head_dim": 3}, ("head_dim is 3", "even")),
    "negative head_dim": ({"head_dim": -12}, ("head_dim is -12",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
    "negative size": ({"hidden_size": -48}, ("hidden_size is -48",)),
    "size as text": ({"hidden_size": "48"}, ("hidden_size is '48'",)),
    "size as bool": ({"vocab_size": True}, ("vocab_size is True",)),
    "size as fraction": ({"intermediate_size": 80.5}, ("intermediate_size is 80.5",)),
    "no size": ({"vocab_size": None}, ("vocab_size",)),
    "context": ({"max_position_embeddings": 0}, ("max_position_embeddings is 0",)),
    "negative epsilon": ({"rms_norm_eps": -1e-6}, ("rms_norm_eps is -1e-06",)),
    "epsilon as text": ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
    "epsilon nan": ({"rms_norm_eps": NAN}, ("rms_norm_eps is nan",)),
    "end token as text": ({"eos_token_id": "</s>"}, ("eos_token_id",)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_cannot_serve(case: str, folder: Path) -> None:
    entries, words = CONFIGS[case]
    change_config(folder, **entries)
    refuse(lambda: Kangaroo.from_pretrained(folder), "config.json", *words)


def test_code_beside_a_checkpoint_is_not_imported(folder: Path) -> None:
    trace = folder / "trace"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')")
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    refuse(lambda: Kangaroo.from_pretrained(folder), "auto_map")
    assert not trace.exists()


# ---- weights


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(share: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(lambda: Kangaroo.from_pretrained(folder), "model.safetensors", "truncated")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_bin(legacy: bool, share: float, folder: Path) -> None:
    path = use_bin(folder)
    if legacy:
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refuse(lambda: Kangaroo.from_pretrained(folder), "pytorch_model.bin", "truncated")


def test_pointer_instead_of_weights(folder: Path) -> None:
    """What git leaves where its large-file storage was not fetched."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    refuse(lambda: Kangaroo.from_pretrained(folder), "model.safetensors", "not a safetensors file")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pointer)
    refuse(lambda: Kangaroo.from_pretrained(folder), "pytorch_model.bin", "not a checkpoint")


class Harmful:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickle_that_would_run_code(form: str, folder: Path) -> None:
    trace = folder / "trace"
    path = use_bin(folder)
    tensors = torch.load(path, weights_only=True) | {"harmful": Harmful(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"harmful": Harmful(trace)}, protocol=2))
        pickle.loads(path.read_bytes())
        assert trace.exists(), "the file does no harm: the test shows nothing"
        trace.rmdir()
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    refuse(lambda: Kangaroo.from_pretrained(folder), "pytorch_model.bin", "run code")
    assert not trace.exists()


def test_adapter_that_would_run_code(checkpoint: Path, adapter_folder: Path) -> None:
    trace = adapter_folder / "trace"
    torch.save({"norm.weight": Harmful(trace)}, use_bin(adapter_folder))
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder), "pytorch_model.bin", "run code")
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 5])
def test_bin_without_a_dictionary(content: object, folder: Path) -> None:
    torch.save(content, use_bin(folder))
    refuse(lambda: Kangaroo.from_pretrained(folder), "pytorch_model.bin", "dictionary")


@pytest.mark.parametrize("content", [{}, {"state_dict": {"a": torch.zeros(2)}}, {"epoch": 3}])
def test_bin_with_other_things(content: object, folder: Path) -> None:
    torch.save(content, use_bin(folder))
    refuse(lambda: Kangaroo.from_pretrained(folder), "missing", "model.embed_tokens.weight")


def test_bin_with_numbered_tensors(folder: Path) -> None:
    torch.save({0: torch.zeros(2)}, use_bin(folder))
    refuse(lambda: Kangaroo.from_pretrained(folder), "unexpected tensor '0'")


def test_missing_shard(folder: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(lambda: Kangaroo.from_pretrained(folder), "1 of 2 shards", "missing", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}']
)
def test_broken_index(text: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(lambda: Kangaroo.from_pretrained(folder), "model.safetensors.index.json", "not a valid index")


TENSORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor | None], tuple[str, ...]]] = {
    "missing": (Q_PROJ, lambda _: None, ("missing", Q_PROJ)),
    "missing head": ("lm_head.weight", lambda _: None, ("missing", "lm_head.weight")),
    "fewer rows": (Q_PROJ, lambda w: w[:-1].contiguous(), (Q_PROJ, "[47, 48]", "[48, 48]")),
    "one more dimension": (Q_PROJ, lambda w: w[None], (Q_PROJ, "[1, 48, 48]")),
    "other vocabulary": ("lm_head.weight", lambda w: w[:60].contiguous(), ("lm_head.weight", "[60, 48]", "[67, 48]")),
    "NaN": (Q_PROJ, lambda w: w.index_fill(0, torch.tensor([3]), NAN), (Q_PROJ, "not finite")),
    "infinity": ("model.norm.weight", lambda w: w * INFINITY, ("model.norm.weight", "not finite")),
    "NaN in the embedding": ("model.embed_tokens.weight", lambda w: w * NAN, ("embed_tokens", "not finite")),
    "int8": (Q_PROJ, lambda w: w.to(torch.int8), (Q_PROJ, "int8")),
    "uint8": (Q_PROJ, lambda w: w.to(torch.uint8), (Q_PROJ, "uint8")),
    "bool": (Q_PROJ, lambda w: w > 0, (Q_PROJ, "bool")),
    "float8": (Q_PROJ, lambda w: w.to(torch.float8_e4m3fn), (Q_PROJ, "float8")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor_that_cannot_serve(case: str, folder: Path) -> None:
    name, change, words = TENSORS[case]
    change_tensor(folder, name, change)
    refuse(lambda: Kangaroo.from_pretrained(folder), str(folder), *words)


def test_unexpected_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)}, folder / "model.safetensors")
    refuse(lambda: Kangaroo.from_pretrained(folder), "unexpected tensor", "lora_A")


def test_layers_that_config_does_not_name(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    refuse(lambda: Kangaroo.from_pretrained(folder), "unexpected tensor", "model.layers.3.")


def test_biases_that_config_does_not_name(tmp_path: Path) -> None:
    folder = make_target(tmp_path, attention_bias=True)
    change_config(folder, attention_bias=False)
    refuse(lambda: Kangaroo.from_pretrained(folder), "unexpected tensor", "bias")


def test_weights_too_large_for_the_dtype(folder: Path) -> None:
    change_tensor(folder, Q_PROJ, lambda weight: weight * 1e6)
    Kangaroo.from_pretrained(folder, dtype="float32")
    refuse(lambda: Kangaroo.from_pretrained(folder, dtype="float16"), Q_PROJ, "not finite", "float16")


# ---- the adapter


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"hidden_size": 64}, ("hidden_size is 64", "48", "another model")),
        ({"vocab_size": 68}, ("vocab_size is 68", "67", "another model")),
    ],
)
def test_adapter_of_another_model(
    shape: dict[str, int], words: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "adapter", make_target(tmp_path / "other", **shape), exit_layer=2)
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, other), "config.json", *words)


@pytest.mark.parametrize("exit_layer", [0, 4, -1, 99, 1.0, "2", True, [1]])
def test_exit_layer_out_of_range(exit_layer: Any, checkpoint: Path, adapter_folder: Path) -> None:
    words = ("exit_layer", repr(exit_layer), "1 to 3")
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder, exit_layer=exit_layer), *words)
    change_config(adapter_folder, exit_layer=exit_layer)
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder), *words)


def test_target_of_one_layer(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", layers=1)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1)
    refuse(lambda: Kangaroo.from_pretrained(target, adapter), "exit_layer")


def test_adapter_without_exit_layer(checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", checkpoint, exit_layer=None)
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter), "exit_layer", "config.json")


def test_exit_layer_without_adapter(checkpoint: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, exit_layer=2), "exit_layer", "adapter")


@pytest.mark.parametrize(
    "entries",
    [
        {"num_speculative_tokens": 0},
        {"num_speculative_tokens": 16},
        {"num_speculative_tokens": 2.5},
        {"num_speculative_tokens": True},
        {"num_speculative_tokens": "6"},
        {"draft_confidence_threshold": -0.1},
        {"draft_confidence_threshold": 1.5},
        {"draft_confidence_threshold": NAN},
        {"draft_confidence_threshold": True},
    ],
)
def test_calibrated_defaults_out_of_range(entries: dict[str, Any], checkpoint: Path, adapter_folder: Path) -> None:
    change_config(adapter_folder, **entries)
    name, value = next(iter(entries.items()))
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder), "config.json", f"{name} is {value!r}")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("norm.weight", lambda _: None, ("missing", "norm.weight")),
        ("norm.weight", lambda weight: weight * NAN, ("not finite",)),
        ("layers.0.self_attn.k_proj.weight", lambda weight: weight[:-2].contiguous(), ("k_proj", "[22, 48]")),
    ],
)
def test_damaged_adapter(
    name: str, change: Any, words: tuple[str, ...], checkpoint: Path, adapter_folder: Path
) -> None:
    change_tensor(adapter_folder, name, change)
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder), str(adapter_folder), *words)


def test_adapter_and_target_swapped(checkpoint: Path, adapter: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(adapter, checkpoint))


def test_adapter_with_its_own_code(checkpoint: Path, adapter_folder: Path) -> None:
    change_config(adapter_folder, auto_map={"AutoModel": "evil.Model"})
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, adapter_folder), "auto_map")


# ---- device and dtype


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "", "cpu:x", "meta"])
def test_unknown_device(device: str, checkpoint: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, device=device), "device", repr(device), "'cpu'", "'cuda'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_absent_gpu(device: Any, checkpoint: Path) -> None:
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, device=device), "cuda", "no CUDA GPU")


@pytest.mark.parametrize("dtype", ["int8", "fp16", "double", "", "half ", torch.float64, torch.int32, 16])
def test_unknown_dtype(dtype: Any, checkpoint: Path) -> None:
    words = ("dtype", repr(dtype), "float32", "float16", "bfloat16")
    refuse(lambda: Kangaroo.from_pretrained(checkpoint, device="cpu", dtype=dtype), *words)


# ---- the settings of a decode

NOT_WHOLE = (True, 2.5, "3", NAN, [3])
NOT_A_NUMBER = ("1", NAN, INFINITY, -INFINITY, [1.0])

SETTINGS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (0, -1, None, *NOT_WHOLE),
    "temperature": (-0.1, -1, 101, 1e9, True, None, *NOT_A_NUMBER),
    "top_k": (0, -1, *NOT_WHOLE),
    "top_p": (0, 0.0, -0.5, 1.5, True, *NOT_A_NUMBER),
    "seed": (-1, 2**64, *NOT_WHOLE),
    "num_speculative_tokens": (0, -1, 16, 10**9, *NOT_WHOLE),
    "draft_confidence_threshold": (-0.1, 1.1, *NOT_A_NUMBER),
    "acceptance": ("coupld", "", "Coupled", None, True, ["coupled"]),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name}={value}") for name, values in SETTINGS.items() for value in values],
)
def test_setting_out_of_range(name: str, value: Any, plain: bool, kangaroo: Kangaroo) -> None:
    settings = {"max_new_tokens": 3, "temperature": 1.0, "plain": plain, name: value}
    words = (f"{name} is {value!r}",)
    refuse(lambda: kangaroo.generate([1, 2], **settings), *words)
    refuse(lambda: kangaroo.progress([1, 2], **settings), *words)  # at the call, not at the first step
    refuse(lambda: kangaroo.stream([1, 2], **settings), *words)


def test_true_is_no_threshold(kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate([1], max_new_tokens=1, draft_confidence_threshold=True), "is True")


@pytest.mark.parametrize("settings", [{"top_k": 10**9}, {"top_p": 1}, {"seed": 2**64 - 1}, {"temperature": 100}])
def test_the_ends_of_the_ranges_serve(settings: dict[str, Any], kangaroo: Kangaroo) -> None:
    settings = {"temperature": 1.0, **settings}
    assert len(kangaroo.generate([1, 2], max_new_tokens=4, **settings).tokens) == 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_temperatures_close_to_zero_are_refused_or_greedy(
    temperature: float, top_p: float | None, kangaroo: Kangaroo
) -> None:
    wanted = kangaroo.generate([1, 2], max_new_tokens=6).tokens
    try:
        got = kangaroo.generate([1, 2], max_new_tokens=6, temperature=temperature, top_p=top_p).tokens
    except KangarooError as error:
        assert "temperature" in str(error)
    else:
        assert got == wanted


@pytest.mark.parametrize("method", ["generate", "progress", "stream"])
def test_unknown_keywords(method: str, kangaroo: Kangaroo) -> None:
    call = getattr(kangaroo, method)
    for keyword in ("temprature", "max_length", "num_beams"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            call([1, 2], max_new_tokens=3, **{keyword: 1})
    with pytest.raises(TypeError, match="max_new_tokens is missing"):
        call([1, 2])
    with pytest.raises(TypeError, match="the prompt is given by position"):
        call(prompt=[1, 2], max_new_tokens=3)
    with pytest.raises(TypeError, match="positional"):
        call([1, 2], 3)


@pytest.mark.parametrize("name", ["", " ", None, 5])
def test_what_cannot_be_a_name(name: object, checkpoint: Path) -> None:
    with pytest.raises(KangarooError, match=r"the model is .*; give a folder"):
        Kangaroo.from_pretrained(name)  # type: ignore[arg-type]
    if name is not None:
        with pytest.raises(KangarooError, match=r"the adapter is .*; give a folder"):
            Kangaroo.from_pretrained(checkpoint, name)  # type: ignore[arg-type]


def test_unknown_keywords_of_loading(checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="trust_remote_code"):
        Kangaroo.from_pretrained(checkpoint, trust_remote_code=True)  # type: ignore[call-arg]


# ---- prompts and stops


@pytest.mark.parametrize("method", ["generate", "progress", "stream", "logits", "draft_logits"])
@pytest.mark.parametrize("token", [-1, 67, 10**20, True, 1.0, NAN, None, "a", [1]])
def test_tokens_out_of_range(token: Any, method: str, kangaroo: Kangaroo) -> None:
    settings = {} if "logits" in method else {"max_new_tokens": 3}
    refuse(lambda: getattr(kangaroo, method)([1, token, 2], **settings), "token", repr(token), "0 to 66")


@pytest.mark.parametrize("method", ["generate", "progress", "stream", "logits", "draft_logits"])
def test_empty_prompt(method: str, kangaroo: Kangaroo) -> None:
    settings = {} if "logits" in method else {"max_new_tokens": 3}
    refuse(lambda: getattr(kangaroo, method)([], **settings), "prompt is empty")


def test_empty_text(pair: Any) -> None:
    refuse(lambda: pair.load().generate("", max_new_tokens=3), "prompt is empty")


@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"ab"])
def test_prompt_that_is_neither_text_nor_tokens(prompt: Any, kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate(prompt, max_new_tokens=3), f"the prompt is {prompt!r}")
    refuse(lambda: kangaroo.logits(prompt), f"the prompt is {prompt!r}")


def test_text_that_is_not_unicode(pair: Any) -> None:
    refuse(lambda: pair.load().generate("a\ud800", max_new_tokens=3), "lone surrogate")


def test_text_without_a_tokenizer(kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate("hello", max_new_tokens=3), "no tokenizer", "tokens")


def test_tokens_of_numpy_and_torch_serve(kangaroo: Kangaroo) -> None:
    import numpy as np

    wanted = kangaroo.generate([1, 2, 3], max_new_tokens=5).tokens
    for prompt in (np.array([1, 2, 3]), torch.tensor([1, 2, 3]), [np.int64(1), np.int32(2), np.uint8(3)], (1, 2, 3)):
        assert kangaroo.generate(prompt, max_new_tokens=5).tokens == wanted
        assert torch.equal(kangaroo.logits(prompt), kangaroo.logits([1, 2, 3]))


@pytest.mark.parametrize("stop", [[-1], [67], [True], [1.5], [None]])
def test_stop_tokens_out_of_range(stop: Any, kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate([1, 2], max_new_tokens=3, stop=stop), repr(stop[0]), "0 to 66")


@pytest.mark.parametrize("stop", [None, 5, 1.5, b"ab", {1: 2}])
def test_stop_that_is_no_list(stop: Any, kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate([1, 2], max_new_tokens=3, stop=stop), "stop")


def test_more_stop_tokens_than_are_looked_for(kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "MAX_STOPS", 5)
    assert kangaroo.generate([1, 2], max_new_tokens=3, stop=[3, 4, 5, 6, 3]).tokens
    refuse(lambda: kangaroo.generate([1, 2], max_new_tokens=3, stop=range(6)), "6 stop tokens", "at most 5")


@pytest.mark.parametrize("stop", ["x", ["x"], [3, "x"]])
def test_stop_strings_without_a_tokenizer(stop: Any, kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.generate([1, 2], max_new_tokens=3, stop=stop), "stop", "tokenizer")


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_empty_stop_strings(stop: Any, pair: Any) -> None:
    refuse(lambda: pair.load().generate([1, 2], max_new_tokens=3, stop=stop), "stop string is empty")


def test_drafting_without_a_drafter(kangaroo: Kangaroo) -> None:
    alone = Kangaroo(kangaroo.target)
    refuse(lambda: alone.generate([1, 2], max_new_tokens=3), "no drafter", "plain=True")
    refuse(lambda: alone.progress([1, 2], max_new_tokens=3), "no drafter", "plain=True")
    refuse(lambda: alone.draft_logits([1, 2]), "adapter")
    assert len(alone.generate([1, 2], max_new_tokens=3, plain=True).tokens) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"draft_tree": 4}, "draft_tree needs an adapter; give one, or leave draft_tree out"),
        ({"persistent": True}, "persistent needs an adapter; give one, or leave persistent out"),
        ({"prompt_lookup": False}, "without an adapter prompt lookup alone drafts"),
        ({"prompt_lookup": "yes"}, "prompt_lookup is 'yes'; it must be True or False"),
        ({"persistent": 1}, "persistent is 1; it must be True or False"),
    ],
)
def test_ways_to_draft_that_need_an_adapter(given: dict[str, Any], words: str, pair: Any) -> None:
    refuse(lambda: Kangaroo.from_pretrained(pair.target, **given), words)


@pytest.mark.parametrize("length", [-5, "x", 1.5, CONTEXT + 1])
def test_a_session_for_a_length_that_no_text_has(length: Any, kangaroo: Kangaroo) -> None:
    refuse(lambda: kangaroo.session(length), f"length is {length!r}", f"at most {CONTEXT}")


@pytest.mark.parametrize("method", ["logits", "draft_logits"])
def test_logits_of_a_text_that_nobody_encoded(method: str, kangaroo: Kangaroo) -> None:
    refuse(lambda: getattr(kangaroo, method)("abc"), "the prompt is a text", "encode it")


def test_drafting_in_one_kernel_takes_16_bits(kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kangaroo.target, "device", torch.device("cuda"))
    parts = kangaroo.target, kangaroo.drafter.adapter
    KangarooDrafter(*parts)
    refuse(lambda: KangarooDrafter(*parts, persistent=True), "float16 or bfloat16", "torch.float32")
    monkeypatch.setattr(kangaroo.target, "dtype", torch.float16)
    KangarooDrafter(*parts, persistent=True)
    check_persistent(torch.float16, replace(kangaroo.target.config, num_attention_heads=32, num_key_value_heads=1))
    crowded = replace(kangaroo.target.config, num_attention_heads=33, num_key_value_heads=1)
    refuse(lambda: check_persistent(torch.float16, crowded), "at most 32 share a key-value head", "33 that share one")


def test_what_cannot_be_drafted_is_refused_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: Any
) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were loaded")

    adapter = make_adapter(tmp_path / "deep", pair.target, exit_layer=1, deep_state_size=24)
    monkeypatch.setattr("kangaroo_kernels.model.load.load_target", load)
    refuse(lambda: Kangaroo.from_pretrained(pair.target, adapter, device="cpu", draft_tree=4), "deep state")
    halves = {"dtype": "float16", "kv_dtype": "float16"}
    refuse(lambda: pair.load(device="cpu", draft_tree=4, **halves), "leave kv_dtype or draft_tree out")
    monkeypatch.setattr("kangaroo_kernels.model.load.resolve_device", lambda _: torch.device("cuda"))
    refuse(lambda: pair.load(persistent=True), "persistent=True drafts in float16 or bfloat16", "torch.float32")


@pytest.mark.parametrize("plain", [False, True])
def test_one_text_at_a_time_in_a_session(plain: bool, kangaroo: Kangaroo) -> None:
    """A text that goes on after another was begun in its session would read the other's keys and values."""
    session = kangaroo.session()
    first = session.progress([1, 2], max_new_tokens=20, plain=plain)
    next(first)
    wanted = session.generate([4, 5], max_new_tokens=8).tokens
    refuse(lambda: next(first), "another text was begun", "one at a time")
    assert session.generate([4, 5], max_new_tokens=8).tokens == wanted


def test_a_refused_call_leaves_the_next_one_alone(kangaroo: Kangaroo) -> None:
    wanted = kangaroo.generate([1, 2, 3], max_new_tokens=8).tokens
    refuse(lambda: kangaroo.generate([1, 2, 99], max_new_tokens=8))
    refuse(lambda: kangaroo.generate([1] * (CONTEXT + 1), max_new_tokens=8))
    assert kangaroo.generate([1, 2, 3], max_new_tokens=8).tokens == wanted


# ---- the end of the context


@pytest.mark.parametrize("method", ["generate", "progress", "stream", "logits", "draft_logits"])
def test_prompt_longer_than_the_context(method: str, kangaroo: Kangaroo) -> None:
    settings = {} if "logits" in method else {"max_new_tokens": 3}
    words = ("prompt", str(CONTEXT + 1), str(CONTEXT), "context")
    refuse(lambda: getattr(kangaroo, method)([1] * (CONTEXT + 1), **settings), *words)


def test_text_longer_than_the_context(tmp_path: Path) -> None:
    folder = make_tokenizer(make_target(tmp_path, max_position_embeddings=8))
    refuse(lambda: Kangaroo.from_pretrained(folder).generate("A" * 9, max_new_tokens=1, plain=True), "9 tokens", "8")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2, 7])
def test_decoding_stops_at_the_end_of_the_context(left: int, plain: bool, kangaroo: Kangaroo) -> None:
    prompt = [index % 67 for index in range(CONTEXT - left)]
    for asked in (left + 1, left + 50, 10**12):
        generation = kangaroo.generate(prompt, max_new_tokens=asked, plain=plain, draft_confidence_threshold=0.0)
        assert len(generation.tokens) == left
        assert generation.finish_reason == "context"
        assert generation.stats.new_tokens == left
    if left:
        whole = kangaroo.generate(prompt, max_new_tokens=left, plain=plain)
        assert whole.tokens == generation.tokens
        assert whole.finish_reason == "length"


def test_streaming_a_full_context_yields_nothing(kangaroo: Kangaroo) -> None:
    assert list(kangaroo.progress([1] * CONTEXT, max_new_tokens=5)) == []
    assert list(kangaroo.stream([1] * CONTEXT, max_new_tokens=5)) == []


def test_the_last_row_of_the_context_is_right(checkpoint: Path, kangaroo: Kangaroo) -> None:
    """The token before the limit is the one that teacher forcing gives."""
    generation = kangaroo.generate([5, 6, 7], max_new_tokens=1000)
    text = [5, 6, 7, *generation.tokens]
    assert len(text) == CONTEXT
    assert kangaroo.logits(text[:-1]).argmax(dim=-1)[2:].tolist() == generation.tokens


def test_dynamic_scaling_reaches_the_stretched_context(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    kangaroo = Kangaroo.from_pretrained(make_target(tmp_path, max_position_embeddings=16, rope_parameters=rope))
    generation = kangaroo.generate([1] * 10, max_new_tokens=100, plain=True)
    assert len(generation.tokens) == 22
    assert generation.finish_reason == "context"
    refuse(lambda: kangaroo.logits([1] * 33), "33", "32")
