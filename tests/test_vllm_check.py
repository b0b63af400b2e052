"""What tools/vllm_check.py does around vLLM: heads for tensor-parallel ranks, and passes as vLLM counts them."""

from pathlib import Path

import pytest
import torch
import vllm_check
from conftest import Pair
from pairs import make_target

from kangaroo_kernels import Kangaroo


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(3, 3, 2), (9, 3, 2), (4, 1, 4)])
def test_heads_for_ranks_change_nothing(heads: int, kv_heads: int, ranks: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 72, "heads": heads, "kv_heads": kv_heads, "head_dim": 8, "std": 0.15}
    source = make_target(tmp_path / "source", **shape)
    folder = vllm_check.with_heads_for(ranks, source, tmp_path / "spread")
    assert folder != source
    wide = Kangaroo.from_pretrained(folder, device="cpu")
    assert wide.target.config.num_attention_heads % ranks == wide.target.config.num_key_value_heads % ranks == 0
    tokens = list(range(1, 40))
    wanted = Kangaroo.from_pretrained(source, device="cpu").logits(tokens)
    torch.testing.assert_close(wide.logits(tokens), wanted, rtol=0, atol=1e-4)


def test_heads_that_the_ranks_divide_stay(tmp_path: Path) -> None:
    source = make_target(tmp_path / "source")
    assert vllm_check.with_heads_for(2, source, tmp_path / "spread") == source


def test_passes_as_vllm_counts_them(pair: Pair) -> None:
    """The first token is the prefill's, and the last pass drafts on behind the text's end."""
    kangaroo, prompt = pair.load(device="cpu"), [1, 2, 3]
    text = kangaroo.generate(prompt, max_new_tokens=vllm_check.NEW_TOKENS, **vllm_check.SETTINGS)
    passes, accepted = vllm_check.passes_here(kangaroo, prompt, text)
    rest = len(text.tokens) - 1
    assert rest <= passes + accepted <= rest + vllm_check.DRAFTS
    assert accepted > 5
