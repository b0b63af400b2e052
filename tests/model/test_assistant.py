"""Our drafter in transformers' assisted generation: our tokens in as many passes, and nothing twice in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair
from pairs import make_adapter, make_target
from safetensors.torch import load_file, save_file

from kangaroo_kernels import Kangaroo, KangarooError, assistant
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.integrations.export import export_drafter

TOKENS = torch.randint(67, (1, 40), generator=torch.Generator().manual_seed(0))


def in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def exported(model: Any, adapter: Path, folder: Path) -> Any:
    export_drafter(bundled_pair().target, adapter, folder)
    return in_transformers(folder)


FIXED = {"num_speculative_tokens": 6, "draft_confidence_threshold": 0.6}  # the pair's own; auto would leave them


@pytest.mark.parametrize("drafter", [lambda model, adapter, _: assistant(model, adapter), exported])
def test_the_bundled_pair_writes_our_tokens_in_as_many_passes(drafter: Callable[..., Any], tmp_path: Path) -> None:
    """The early exit is carried over: with another draft length or threshold there would be other passes."""
    bundled, kangaroo = bundled_pair(), Kangaroo.from_pretrained("demo", device="cpu")
    model = in_transformers(bundled.target)
    helper = drafter(model, bundled.adapter, tmp_path / "drafter")
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for name in ("functools.py", "unittest/suite.py"):
        passes.clear()
        inputs = kangaroo.tokenizer(bundled.prompts()[name], return_tensors="pt")
        wanted = kangaroo.generate(inputs["input_ids"][0], max_new_tokens=64, **FIXED)
        whole = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=64,
            do_sample=False,
            assistant_model=helper,
        )
        assert whole[0, inputs["input_ids"].shape[1] :].tolist() == wanted.tokens
        assert len(passes) == wanted.stats.verification_steps
        assert wanted.stats.mean_acceptance_length > 1.5


def test_only_the_adapter_is_new(pair: Pair) -> None:
    model = in_transformers(pair.target)
    theirs = {id(parameter) for parameter in model.parameters()}
    helper = assistant(model, pair.adapter)
    own = {name for name, parameter in helper.named_parameters() if id(parameter) not in theirs}
    attention = {f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert own == attention | {"model.layers.2.input_layernorm.weight", "model.norm.weight"}
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert helper.generation_config.num_assistant_tokens == 6
    assert model.generation_config.num_assistant_tokens != 6


@pytest.mark.parametrize("mlp", [False, True])
def test_an_adapter_with_a_shape_of_its_own(mlp: bool, tmp_path: Path) -> None:
    """Its heads, epsilon, RoPE and MLP need not be the target's."""
    target = make_target(tmp_path / "target", std=0.15)
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 2, "head_dim": 8, "intermediate_size": 24, "rms_norm_eps": 0.5}
    other = make_target(tmp_path / "other", rope_parameters=rope, **shape)
    adapter = make_adapter(tmp_path / "adapter", other, exit_layer=None, std=0.15, mlp=mlp)
    wanted = Kangaroo.from_pretrained(target, adapter, exit_layer=3, device="cpu").draft_logits(TOKENS[0].tolist())
    with torch.inference_mode():
        got = assistant(in_transformers(target), adapter, exit_layer=3)(TOKENS).logits[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(pair: Pair, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=7))
    with pytest.raises(KangarooError, match=r"a GPT2LMHeadModel of the type 'gpt2'; it must be .* llama or mistral"):
        assistant(gpt, pair.adapter)
    model = in_transformers(pair.target)
    with pytest.raises(KangarooError, match="the model is a LlamaModel"):
        assistant(model.model, pair.adapter)
    with pytest.raises(KangarooError, match="this adapter is another model's"):
        assistant(model, bundled_pair().adapter)
    damaged = make_adapter(tmp_path / "damaged", pair.target, exit_layer=2)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(KangarooError, match=r"its tensors are not those that its config.json asks for \(Missing key"):
        assistant(model, damaged)
