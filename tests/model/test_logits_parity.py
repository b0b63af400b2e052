"""``Kangaroo.logits`` against transformers, over the shapes that Llama checkpoints come in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_target

from kangaroo_kernels import Kangaroo

TOLERANCE = 1e-4
LENGTHS = (1, 5, 100)
"""A single row, a verify pass, and more rows than it takes for prefill's own attention."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama1": {"kv_heads": 4, "rms_norm_eps": 1e-6},
    "llama2": {"kv_heads": 4, "rms_norm_eps": 1e-5, "layers": 3},
    "llama3.1": {
        "kv_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3,
        "max_position_embeddings": 512,
        "hidden_size": 128,
        "vocab_size": 128,
    },
    "llama3.2": {"tie_word_embeddings": True, "rope_parameters": {**LLAMA3, "factor": 32.0}, "hidden_size": 64},
    "grouped queries": {"heads": 8, "kv_heads": 2, "hidden_size": 64},
    "multi query": {"heads": 6, "kv_heads": 1, "hidden_size": 96},
    "one layer": {"layers": 1},
    "deep": {"layers": 12},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32, "hidden_size": 48, "heads": 4},
    "narrow heads": {"head_dim": 6, "hidden_size": 64, "heads": 8},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "kv_heads": 4},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "large epsilon": {"rms_norm_eps": 0.1},
    "odd vocabulary": {"vocab_size": 257, "intermediate_size": 75},
    "tiny": {"hidden_size": 4, "heads": 2, "kv_heads": 1, "intermediate_size": 3, "layers": 2},
    "large matrices": {"hidden_size": 256, "intermediate_size": 1024, "layers": 1, "heads": 8},
    "exact in half": {"dtype": torch.float16, "attention_bias": True},
    "exact in half, large matrices": {
        "hidden_size": 256,
        "intermediate_size": 2100,
        "layers": 1,
        "heads": 8,
        "mlp_bias": True,
        "dtype": torch.float16,
    },
}


def shaped(folder: Path, shape: dict[str, Any]) -> Path:
    """A checkpoint whose matrices neither swell nor shrink what passes through them: float32 then errs by some 1e-6."""
    return make_target(folder, std=shape.get("hidden_size", 48) ** -0.5, **shape)


def reference(folder: Path) -> torch.nn.Module:
    """The checkpoint in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


def random_tokens(count: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def assert_parity(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> None:
    model, kangaroo = reference(folder), Kangaroo.from_pretrained(folder, device="cpu")
    for length in lengths:
        tokens = random_tokens(length, kangaroo.target.config.vocab_size)
        wanted, got = reference_logits(model, tokens), kangaroo.logits(tokens)
        assert got.shape == wanted.shape
        assert got.dtype == torch.float32
        assert wanted.std() > 0.3, "logits near zero would make the tolerance meaningless"
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE, msg=lambda text, n=length: f"{n} rows: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    assert_parity(shaped(tmp_path, SHAPES[shape]))


def test_dynamic_rope_within_and_beyond_the_trained_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    folder = shaped(tmp_path, {"max_position_embeddings": 32, "rope_parameters": rope})
    assert Kangaroo.from_pretrained(folder).target.config.context_length == 128
    # rising, as transformers keeps the longest text's frequencies
    assert_parity(folder, (1, 31, 32, 33, 70, 128))


def test_dynamic_rope_comes_back_from_a_long_text(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    kangaroo = Kangaroo.from_pretrained(make_target(tmp_path, max_position_embeddings=32, rope_parameters=rope))
    tokens = random_tokens(100, 67)
    short = kangaroo.logits(tokens[:20])
    long = kangaroo.logits(tokens)
    assert not torch.allclose(long[:20], short, atol=0.01)
    assert torch.equal(kangaroo.logits(tokens[:20]), short)


@pytest.mark.parametrize(
    "shape", [{}, {"kv_heads": 1, "hidden_size": 96}, {"rms_norm_eps": 1e-5, "layers": 2}], ids=str
)
@pytest.mark.parametrize(("family", "settings"), [("mistral", {"sliding_window": None}), ("qwen2", {})])
def test_other_families(family: str, settings: dict[str, Any], shape: dict[str, Any], tmp_path: Path) -> None:
    folder = shaped(tmp_path, {"family": family} | settings | shape)
    assert type(reference(folder)).__name__.lower() == f"{family}forcausallm"
    assert_parity(folder)


@pytest.mark.parametrize("shape", ["llama1", "llama3.2", "multi query", "both biases, tied", "linear rope"])
def test_greedy_tokens_equal_transformers_generate(shape: str, tmp_path: Path) -> None:
    folder = make_target(tmp_path, **SHAPES[shape])
    kangaroo = Kangaroo.from_pretrained(folder, device="cpu")
    for length in (1, 7, 80):
        prompt = random_tokens(length, kangaroo.target.config.vocab_size)
        with torch.inference_mode():
            whole = reference(folder).generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length, dtype=torch.int64),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=0,
            )
        generation = kangaroo.generate(prompt, max_new_tokens=24, plain=True)
        assert generation.tokens == whole[0, length:].tolist()
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", ["llama1", "llama3.2", "both biases, tied", "wide heads"])
def test_on_a_cpu_the_dtype_rounds_the_weights_and_nothing_else(shape: str, dtype: str, tmp_path: Path) -> None:
    folder = shaped(tmp_path, SHAPES[shape])
    kangaroo = Kangaroo.from_pretrained(folder, device="cpu", dtype=dtype, kernels="reference")
    assert kangaroo.target.dtype == torch.float32
    tokens = random_tokens(100, kangaroo.target.config.vocab_size)
    model = reference(folder)
    exact = reference_logits(model, tokens)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    logits = kangaroo.logits(tokens)
    torch.testing.assert_close(logits, reference_logits(model, tokens), rtol=0, atol=TOLERANCE)
    assert (logits - exact).abs().max() > 2 * TOLERANCE
