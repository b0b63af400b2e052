"""Adapters: both formats, and the teacher-forced drafter against the formula written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_adapter, make_target
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.drafters.adapter import load_adapter_config
from kangaroo_kernels.model.target.checkpoint import open_folder

TOLERANCE = 1e-4
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "multi head": {"kv_heads": 4},
    "multi query": {"kv_heads": 1, "heads": 6},
    "wide heads": {"head_dim": 20},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear rope": {"rope_parameters": LINEAR},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on ``[H, T, D]`` in Hugging Face's order, where a pair lies half a head apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@torch.inference_mode()
def expected_draft_logits(target: Path, adapter: Path, exit_layer: int, tokens: list[int]) -> torch.Tensor:
    """``head(norm(f(h)))`` on transformers' own hidden states.

    ``f`` is ``h + attention(rms_norm(h))``, followed by ``h + swiglu(rms_norm(h))`` where the adapter has an MLP. Where
    it has a deep state, ``h`` is first the exit layer's plus a SwiGLU of the last layer's at the position before.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = AutoModelForCausalLM.from_pretrained(target).float()
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, given: last.append(given[0][0]))
    hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[exit_layer][0]
    config = AutoConfig.from_pretrained(adapter)
    weights = load_file(adapter / "model.safetensors")

    def project(name: str, x: torch.Tensor, part: str = "self_attn") -> torch.Tensor:
        prefix = f"layers.0.{part}.{name}_proj."
        return linear(x, weights[prefix + "weight"], weights.get(prefix + "bias"))

    def heads(name: str) -> torch.Tensor:
        return project(name, normed).unflatten(-1, (-1, config.head_dim)).transpose(0, 1)

    if "state_layernorm.weight" in weights:
        state = torch.cat((torch.zeros_like(hidden[:1]), last[0][:-1]))
        normed = rms_norm(state, weights["state_layernorm.weight"], config.rms_norm_eps)
        gate, up, down = (weights[f"state_mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        hidden = hidden + linear(silu(linear(normed, gate)) * linear(normed, up), down)
    normed = rms_norm(hidden, weights["layers.0.input_layernorm.weight"], config.rms_norm_eps)
    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(len(tokens))[None])
    q, k, v = rotate(heads("q"), cos[0], sin[0]), rotate(heads("k"), cos[0], sin[0]), heads("v")
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / config.head_dim**0.5
    later = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
    hidden = hidden + project("o", mixed.transpose(0, 1).flatten(1))
    mlp_norm = weights.get("layers.0.post_attention_layernorm.weight")
    if mlp_norm is not None:
        normed = rms_norm(hidden, mlp_norm, config.rms_norm_eps)
        inner = silu(project("gate", normed, "mlp")) * project("up", normed, "mlp")
        hidden = hidden + project("down", inner, "mlp")
    return linear(rms_norm(hidden, weights["norm.weight"], config.rms_norm_eps), model.lm_head.weight)


def random_tokens(count: int) -> list[int]:
    return torch.randint(67, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def assert_draft_parity(target: Path, adapter: Path, exit_layer: int, kangaroo: Kangaroo) -> None:
    for length in (1, 5, 100):
        tokens = random_tokens(length)
        wanted = expected_draft_logits(target, adapter, exit_layer, tokens)
        got = kangaroo.draft_logits(tokens)
        assert got.shape == wanted.shape
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_draft_logits_follow_the_formula(shape: str, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", std=0.15, **SHAPES[shape])
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=2, std=0.15)
    assert_draft_parity(target, adapter, 2, Kangaroo.from_pretrained(target, adapter, device="cpu"))


@pytest.mark.parametrize("shape", [{}, {"mlp_bias": True}])
def test_an_adapter_with_an_mlp(shape: dict[str, bool], tmp_path: Path) -> None:
    """The MLP counts where the configuration says so, and its tensors must be there then and only then."""
    target = make_target(tmp_path / "target", std=0.15, **shape)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=2, std=0.15, mlp=True)
    assert_draft_parity(target, adapter, 2, Kangaroo.from_pretrained(target, adapter, device="cpu"))
    for named, said, words in ((adapter, False, "unexpected tensor 'layers.0.mlp"), (adapter, "yes", "true or false")):
        values = json.loads((named / "config.json").read_text())
        (named / "config.json").write_text(json.dumps(values | {"mlp": said}))
        with pytest.raises(KangarooError, match=words):
            Kangaroo.from_pretrained(target, named, device="cpu")
    bare = make_adapter(tmp_path / "bare", target, exit_layer=2)
    (bare / "config.json").write_text(json.dumps(values | {"mlp": True}))
    with pytest.raises(KangarooError, match="tensors are missing"):
        Kangaroo.from_pretrained(target, bare, device="cpu")


@pytest.mark.parametrize("mlp", [False, True])
def test_an_adapter_with_a_deep_state(mlp: bool, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", std=0.15)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=2, std=0.15, mlp=mlp, deep_state_size=30)
    assert_draft_parity(target, adapter, 2, Kangaroo.from_pretrained(target, adapter, device="cpu"))
    values = json.loads((adapter / "config.json").read_text())
    for said, words in (
        (0, "unexpected tensor 'state_"),
        (-1, "a whole number"),
        (True, "a whole number"),
        (9, "shape"),
    ):
        (adapter / "config.json").write_text(json.dumps(values | {"deep_state_size": said}))
        with pytest.raises(KangarooError, match=words):
            Kangaroo.from_pretrained(target, adapter, device="cpu")


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("named", [True, False])
def test_exit_layer_from_the_file_or_the_caller(exit_layer: int, named: bool, tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", std=0.15)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=exit_layer if named else None, std=0.15)
    kangaroo = Kangaroo.from_pretrained(target, adapter, exit_layer=None if named else exit_layer, device="cpu")
    assert kangaroo.drafter is not None
    assert kangaroo.drafter.first_layer == exit_layer
    assert_draft_parity(target, adapter, exit_layer, kangaroo)


def test_the_caller_overrides_the_file(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target", std=0.15)
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=1, std=0.15)
    assert_draft_parity(target, adapter, 3, Kangaroo.from_pretrained(target, adapter, exit_layer=3))


def test_the_adapter_has_a_shape_of_its_own(tmp_path: Path) -> None:
    """Heads, epsilon and RoPE are the adapter's; only hidden size and vocabulary must be the target's."""
    target = make_target(tmp_path / "target", std=0.15, rms_norm_eps=1e-5)
    other = make_target(
        tmp_path / "other", std=0.15, heads=2, kv_heads=2, head_dim=8, rms_norm_eps=0.5, rope_parameters=LINEAR
    )
    adapter = make_adapter(tmp_path / "adapter", other, exit_layer=2, std=0.15)
    assert_draft_parity(target, adapter, 2, Kangaroo.from_pretrained(target, adapter, device="cpu"))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_authors_format(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    """``pytorch_model.bin`` with the same names, a rotary buffer besides, and a configuration of their time."""
    target = make_target(tmp_path / "target", std=0.15, dtype=dtype)
    ours = make_adapter(tmp_path / "ours", target, exit_layer=2, std=0.15)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tensors = load_file(ours / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(6.0)
    torch.save(tensors, theirs / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 80,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "vocab_size": 67,
    }
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(KangarooError, match="exit_layer"):
        Kangaroo.from_pretrained(target, theirs)
    tokens = random_tokens(30)
    wanted = Kangaroo.from_pretrained(target, ours, device="cpu")
    got = Kangaroo.from_pretrained(target, theirs, exit_layer=2, device="cpu")
    assert torch.equal(got.draft_logits(tokens), wanted.draft_logits(tokens))
    assert got.generate(tokens, max_new_tokens=20).tokens == wanted.generate(tokens, max_new_tokens=20).tokens


def test_calibrated_defaults(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    config = open_folder(target).config
    plain = load_adapter_config(make_adapter(tmp_path / "plain", target, exit_layer=2), config, None)
    assert (plain.num_speculative_tokens, plain.draft_confidence_threshold) == (6, 0.6)
    calibrated = load_adapter_config(
        make_adapter(
            tmp_path / "calibrated", target, exit_layer=2, num_speculative_tokens=3, draft_confidence_threshold=0.25
        ),
        config,
        None,
    )
    assert (calibrated.num_speculative_tokens, calibrated.draft_confidence_threshold) == (3, 0.25)


def test_calibrated_defaults_are_used(tmp_path: Path) -> None:
    """With a threshold of 0 nothing stops drafting but the adapter's own draft length."""
    target = make_target(tmp_path / "target")
    settings = {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.0}
    kangaroo = Kangaroo.from_pretrained(target, make_adapter(tmp_path / "a", target, exit_layer=2, **settings))

    def first_draft(**given: Any) -> int:
        return next(kangaroo.progress([1, 2], max_new_tokens=30, **given)).commit.drafted

    assert first_draft() == 3
    assert first_draft(num_speculative_tokens=5) == 5
    assert first_draft(draft_confidence_threshold=1.0) == 1


def test_draft_logits_leave_decoding_alone(pair: Any) -> None:
    kangaroo = pair.load()
    wanted = kangaroo.generate([1, 2, 3], max_new_tokens=12).tokens
    kangaroo.draft_logits(random_tokens(100))
    kangaroo.logits(random_tokens(90))
    assert kangaroo.generate([1, 2, 3], max_new_tokens=12).tokens == wanted
