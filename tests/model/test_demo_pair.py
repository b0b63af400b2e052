"""The bundled pair: small enough, whole, lossless with a trained drafter, and worth its drafts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.demo import DemoPair, bundled_pair
from kangaroo_kernels.packed_weight import exact_in_fp16

NEW_TOKENS = 160


@pytest.fixture(scope="module")
def bundled() -> DemoPair:
    return bundled_pair()


@pytest.fixture(scope="module")
def kangaroo() -> Kangaroo:
    return Kangaroo.from_pretrained("demo")


def test_size_and_contents(bundled: DemoPair) -> None:
    files = [file for file in bundled.folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert len(bundled.prompts()) >= 8
    for folder in (bundled.target, bundled.adapter):
        record = (folder / "training.json").read_text()
        assert "held_out" in record and "/root" not in record and "/home" not in record


def test_weights_are_exact_in_both_halves(bundled: DemoPair) -> None:
    for folder in (bundled.target, bundled.adapter):
        for tensor in load_file(folder / "model.safetensors").values():
            assert tensor.dtype == torch.bfloat16
            assert exact_in_fp16(tensor.float())


def test_calibrated_defaults_are_used(bundled: DemoPair, kangaroo: Kangaroo) -> None:
    values = json.loads((bundled.adapter / "config.json").read_text())
    assert kangaroo.drafter is not None
    config = kangaroo.drafter.adapter.config
    assert config.num_speculative_tokens == values["num_speculative_tokens"]
    assert config.draft_confidence_threshold == values["draft_confidence_threshold"]
    best = json.loads((bundled.adapter / "calibration.json").read_text())[0]
    assert best["num_speculative_tokens"] == values["num_speculative_tokens"]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "seed": 2},
        {"acceptance": "rejection"},
    ],
)
def test_held_out_prompts_are_decoded_identically(
    sampling: dict[str, object], bundled: DemoPair, kangaroo: Kangaroo
) -> None:
    for prompt in bundled.prompts().values():
        settings = {"max_new_tokens": NEW_TOKENS, **sampling}
        wanted = kangaroo.generate(prompt, plain=True, **settings)
        got = kangaroo.generate(prompt, **settings)
        assert got.tokens == wanted.tokens
        assert got.text == wanted.text
        assert "".join(kangaroo.stream(prompt, **settings)) == wanted.text


def test_settings_around_the_defaults_change_nothing(bundled: DemoPair, kangaroo: Kangaroo) -> None:
    prompt = bundled.prompts()["functools.py"]
    wanted = kangaroo.generate(prompt, max_new_tokens=NEW_TOKENS, plain=True).tokens
    for length, threshold in ((1, 0.0), (3, 0.9), (6, 0.6), (15, 0.0), (15, 1.0)):
        got = kangaroo.generate(
            prompt,
            max_new_tokens=NEW_TOKENS,
            num_speculative_tokens=length,
            draft_confidence_threshold=threshold,
        )
        assert got.tokens == wanted


def test_mean_acceptance_length(bundled: DemoPair, kangaroo: Kangaroo) -> None:
    tokens = steps = 0
    for prompt in bundled.prompts().values():
        stats = kangaroo.generate(prompt, max_new_tokens=NEW_TOKENS, draft_confidence_threshold=0.6).stats
        tokens, steps = tokens + stats.new_tokens, steps + stats.verification_steps
    assert tokens / steps >= 2.2
