"""The drafter as a stock Llama: the exported folder drafts as we do, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from pairs import make_adapter, make_target, with_vocabulary
from safetensors.torch import load_file, save_file
from smollm2 import real

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.integrations.export import export_drafter, export_for_transformers
from kangaroo_kernels.model.integrations.heads import Heads, common_heads
from kangaroo_kernels.model.target.gguf import open_gguf

TOLERANCE = 1e-4
TOKENS = torch.randint(67, (1, 40), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same heads": ({}, {}),
    "more heads": ({}, {"heads": 8, "kv_heads": 8}),
    "fewer heads": ({}, {"heads": 2, "kv_heads": 1}),
    "wider groups": ({"heads": 4, "kv_heads": 4}, {"heads": 6, "kv_heads": 1}),
    "uneven groups": ({"heads": 6, "kv_heads": 3}, {"heads": 8, "kv_heads": 4}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "biases everywhere": ({"attention_bias": True, "mlp_bias": True}, {"attention_bias": True, "heads": 8}),
    "biases of the target": ({"attention_bias": True}, {"heads": 8}),
    "biases of the adapter": ({}, {"attention_bias": True, "heads": 8}),
    "an MLP": ({}, {"mlp": True}),
    "a wider MLP and more heads": ({}, {"mlp": True, "intermediate_size": 100, "heads": 8}),
    "a narrower MLP, biases of the target": ({"mlp_bias": True}, {"mlp": True, "intermediate_size": 24}),
    "biases of an MLP": ({}, {"mlp": True, "intermediate_size": 100, "mlp_bias": True}),
    "llama3 rope": ({"rope_parameters": LLAMA3}, {"rope_parameters": LLAMA3}),
}
"""What a target and its adapter are made with; both have heads of 12."""


def made(folder: Path, target: dict[str, Any], adapter: dict[str, Any], exit_layer: int | None = 2) -> Pair:
    """A pair of a target and an adapter that was made for a target of another shape."""
    common = {"head_dim": 12, "std": 0.15}
    home = make_target(folder / "target", **common, **target)
    mlp = adapter.get("mlp", False)
    other = make_target(folder / "other", **common | {name: adapter[name] for name in adapter.keys() - {"mlp"}})
    return Pair(home, make_adapter(folder / "adapter", other, exit_layer=exit_layer, std=0.15, mlp=mlp))


def stock(folder: Path) -> torch.nn.Module:
    """The folder as transformers loads it, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    return model


@torch.inference_mode()
def assert_the_same_drafts(model: torch.nn.Module, kangaroo: Kangaroo, tokens: torch.Tensor = TOKENS) -> None:
    wanted = kangaroo.draft_logits(tokens[0].tolist())
    assert wanted.std() > 0.3
    torch.testing.assert_close(model(tokens).logits[0], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_its_logits_are_draft_logits(shape: str, tmp_path: Path) -> None:
    pair = made(tmp_path, *SHAPES[shape])
    export_drafter(pair.target, pair.adapter, tmp_path / "out")
    assert_the_same_drafts(stock(tmp_path / "out"), pair.load(device="cpu"))


def test_the_bundled_pair(tmp_path: Path) -> None:
    """Eight heads of its adapter, three of its target; an engine finds tokenizer and settings, too."""
    from transformers import AutoTokenizer, GenerationConfig

    out = tmp_path / "new" / "out"
    export_drafter("demo", None, out)
    kangaroo, prompt = Kangaroo.from_pretrained("demo", device="cpu"), bundled_pair().prompts()["functools.py"]
    tokens = AutoTokenizer.from_pretrained(out)(prompt, return_tensors="pt")["input_ids"]
    assert tokens[0].tolist() == kangaroo.tokenizer(prompt)["input_ids"]
    assert_the_same_drafts(stock(out), kangaroo, tokens)
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.num_assistant_tokens, settings.assistant_confidence_threshold) == (6, 0.6)
    assert settings.eos_token_id == 0


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_gguf_target(architecture: str, kind: Kind, tmp_path: Path) -> None:
    """Its rows of queries and keys return to transformers' order, and its tokenizer and ends become files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "std": 0.15, "head_dim": 16}
    home = make_target(tmp_path / "home", family=architecture, **sizes)
    target = write_gguf(tmp_path / "model.gguf", home, kind, architecture=architecture)
    adapter = make_adapter(tmp_path / "adapter", make_target(tmp_path / "other", **sizes), exit_layer=2, std=0.15)
    kangaroo = Kangaroo.from_pretrained(target, adapter, device="cpu")
    export_drafter(target, adapter, tmp_path / "out")
    assert_the_same_drafts(stock(tmp_path / "out"), kangaroo)
    export_for_transformers(target, adapter, tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    with torch.inference_mode():
        wanted = kangaroo.logits(TOKENS[0].tolist())
        torch.testing.assert_close(model(TOKENS).logits[0], wanted, rtol=0, atol=TOLERANCE)
    for folder in ("out", "whole"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("ABBA")["input_ids"] == kangaroo.tokenizer("ABBA")["input_ids"]
        ends = GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id
        assert set(ends if isinstance(ends, list) else [ends]) == set(open_gguf(target).config.eos_token_ids) != set()
        stored = load_file(tmp_path / folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
        assert stored.dtype == (torch.float16 if kind == Kind.F16 else torch.float32)


@real
def test_smollm2(tmp_path: Path) -> None:
    """A GGUF file and an adapter with an MLP and a head of some tokens; the export has the head of all."""
    export_drafter("smollm2", None, tmp_path / "out")
    kangaroo = Kangaroo.from_pretrained("smollm2", device="cpu")
    tokens = kangaroo.tokenizer("The capital of France is Paris, and", return_tensors="pt")["input_ids"]
    wanted = kangaroo.draft_logits(tokens[0].tolist())
    there = wanted.isfinite()
    assert there[0].sum() == len(kangaroo.drafter.adapter.head.vocabulary.tokens)
    with torch.inference_mode():
        found = stock(tmp_path / "out")(tokens).logits[0]
    torch.testing.assert_close(found[there], wanted[there], rtol=0, atol=TOLERANCE)


def test_angles_without_a_name_are_refused(tmp_path: Path) -> None:
    home = make_target(tmp_path / "home")
    divisors = {"rope_freqs.weight": np.array([1, 1, 2, 4, 8, 8], np.float32)}
    target = write_gguf(tmp_path / "model.gguf", home, tensors=divisors)
    adapter = make_adapter(tmp_path / "adapter", home, exit_layer=2)
    with pytest.raises(KangarooError, match=r"divides the angles of RoPE .* Hugging Face folder"):
        export_for_transformers(target, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_exit_layer_of_the_caller(tmp_path: Path) -> None:
    pair = made(tmp_path, {}, {}, exit_layer=None)
    with pytest.raises(KangarooError, match="names no exit_layer"):
        export_drafter(pair.target, pair.adapter, tmp_path / "out")
    export_drafter(pair.target, pair.adapter, tmp_path / "out", exit_layer=3)
    assert_the_same_drafts(stock(tmp_path / "out"), pair.load(exit_layer=3, device="cpu"))


def test_tensors_keep_the_dtype_that_they_are_stored_in(tmp_path: Path) -> None:
    pair = made(tmp_path, {"dtype": torch.bfloat16}, {})
    export_drafter(pair.target, pair.adapter, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.self_attn.q_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"head_dim": 8}, "the adapter's head_dim is 8, the target's is 12; a stock Llama has one"),
        ({"rms_norm_eps": 0.125}, "the adapter's rms_norm_eps is 0.125"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "the adapter's RoPE is"),
        ({"hidden_size": 64}, "this adapter is another model's"),
    ],
)
def test_what_a_stock_llama_cannot_hold_is_refused(shape: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    pair = made(tmp_path, {}, shape)
    with pytest.raises(KangarooError, match=sentence):
        export_drafter(pair.target, pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "name", "change", "sentence"),
    [
        ("target", "model.layers.1.mlp.up_proj.weight", None, "'model.layers.1.mlp.up_proj.weight' is in neither"),
        ("adapter", "norm.weight", None, "'model.norm.weight' is in neither"),
        ("adapter", "layers.0.self_attn.q_proj.weight", (36, 48), "4 attention heads on 2 key-value heads of 12"),
        ("adapter", "layers.0.mlp.up_proj.weight", (70, 48), "its config.json asks for an MLP of 80"),
        ("adapter", "layers.0.mlp.up_proj.weight", None, "'model.layers.2.mlp.up_proj.weight' is in neither"),
        ("adapter", "norm.weight", (47,), r"has the shape \[47\]; their config.json ask for \[48\]"),
    ],
)
def test_damaged_files_are_refused(
    folder: str, name: str, change: tuple[int, ...] | None, sentence: str, tmp_path: Path
) -> None:
    pair = made(tmp_path, {}, {"mlp": "mlp" in name and folder == "adapter"})
    path = tmp_path / folder / "model.safetensors"
    tensors = load_file(path)
    old = tensors.pop(name)
    if change is not None:
        tensors[name] = old[tuple(slice(size) for size in change)].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(KangarooError, match=sentence):
        export_drafter(pair.target, pair.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_mlp_that_the_configuration_does_not_know_is_refused(tmp_path: Path) -> None:
    pair = made(tmp_path, {}, {"mlp": True})
    path = pair.adapter / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp": False}))
    with pytest.raises(KangarooError, match=r"holds an MLP, of which its config.json says nothing"):
        export_drafter(pair.target, pair.adapter, tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(KangarooError, match="is not empty; give a new folder"):
        export_drafter(pair.target, pair.adapter, tmp_path)
    with pytest.raises(KangarooError, match=r"notes.txt is a file"):
        export_drafter(pair.target, pair.adapter, tmp_path / "notes.txt")
    with pytest.raises(KangarooError, match="no adapter was given"):
        export_drafter(pair.target, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([(3, 3), (8, 8)], (8, 8)),
        ([(32, 8), (32, 32)], (32, 32)),
        ([(32, 8), (8, 8)], (32, 8)),
        ([(6, 3), (8, 4)], (8, 4)),
        ([(5, 5)], (6, 6)),
    ],
)
def test_the_fewest_heads_that_divide_the_hidden_size(layers: list[tuple[int, int]], wanted: tuple[int, int]) -> None:
    assert common_heads(96, *(Heads(*layer) for layer in layers)) == wanted


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KangarooError, match="3 on 3 and 2 on 2 heads cannot be written with one number of heads"):
        common_heads(2, Heads(3, 3), Heads(2, 2))


def test_a_mistral_becomes_a_llama(tmp_path: Path) -> None:
    pair = made(tmp_path, {}, {})
    path = pair.target / "config.json"
    values = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": None}
    path.write_text(json.dumps(values | {"architectures": ["MistralForCausalLM"]}))
    export_drafter(pair.target, pair.adapter, tmp_path / "out")
    assert_the_same_drafts(stock(tmp_path / "out"), pair.load(device="cpu"))


def test_a_draft_vocabulary_is_left_out(pair: Pair, tmp_path: Path) -> None:
    """A stock Llama's head is whole; transformers' own drafter has the target's."""
    adapter = with_vocabulary(pair.adapter, tmp_path / "some", range(9))
    export_drafter(pair.target, adapter, tmp_path / "out")
    assert_the_same_drafts(stock(tmp_path / "out"), pair.load(device="cpu"))
