"""A target whose logits are not finite ends its text with one sentence, and never with a token."""

from typing import Any

import pytest
import torch
from drafters import Scripted, on_the_device, oracle, with_drafter

from kangaroo_kernels import Kangaroo, KangarooError

PROMPT = [7, 3, 5]
SETTINGS = (
    {},
    {"temperature": 0.9, "seed": 2},
    {"temperature": 0.9, "seed": 2, "top_k": 9, "top_p": 0.8},
    {"temperature": 0.9, "seed": 2, "acceptance": "rejection"},
    {"repetition_penalty": 1.1, "logprobs": 2},
)
IDS = ["greedy", "sampled", "filtered", "rejection", "shaped"]
EITHER = pytest.mark.parametrize("plain", [True, False], ids=["plain", "drafting"])


def until_it_fails(kangaroo: Kangaroo, prompt: list[int], **settings: Any) -> tuple[list[int], str]:
    """The tokens that were delivered before the error, and the error."""
    text = kangaroo.progress(prompt, max_new_tokens=24, **settings)
    with pytest.raises(KangarooError, match="not finite") as error:
        for _ in text:
            pass
    assert text.outcome.finish_reason == "error"
    return text.outcome.tokens, str(error.value)


def spoil(kangaroo: Kangaroo, token: int, value: float = torch.inf) -> None:
    """Let whatever sees a token overflow."""
    kangaroo.target.weights.embedding[token] = value


@EITHER
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_token_that_overflows(pair, settings, value, plain):
    """Everything before is delivered, the token too; nothing is said after it."""
    kangaroo = pair.load(device="cpu")
    whole = kangaroo.generate(PROMPT, max_new_tokens=24, **settings, plain=plain).tokens
    last = next(place for place in range(6, 24) if whole[place] not in (*PROMPT, *whole[:place]))
    spoil(kangaroo, whole[last], value)
    tokens, error = until_it_fails(kangaroo, PROMPT, plain=plain, **settings)
    assert tokens == whole[: last + 1]
    assert f"after {len(PROMPT) + last + 1} tokens" in error


@EITHER
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=IDS[:3])
def test_on_the_device(pair, settings, plain):
    """A draft that overflows spoils the rows beside it there: the text may end before it, and never wrongly."""
    kangaroo = on_the_device(pair.load(device="cpu"))
    whole = kangaroo.generate(PROMPT, max_new_tokens=24, plain=True, **settings).tokens
    last = next(place for place in range(6, 24) if whole[place] not in (*PROMPT, *whole[:place]))
    spoil(kangaroo, whole[last])
    tokens, _ = until_it_fails(kangaroo, PROMPT, plain=plain, num_speculative_tokens=2, **settings)
    assert tokens == whole[: len(tokens)]
    assert len(tokens) == last + 1 if plain else last - 2 <= len(tokens) <= last + 1


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_in_the_prompt(pair, settings):
    for place in (pair.load(device="cpu"), on_the_device(pair.load(device="cpu"))):
        spoil(place, PROMPT[0])
        for plain in (True, False):
            assert until_it_fails(place, PROMPT, plain=plain, **settings)[0] == []


def test_a_draft_that_overflows_changes_nothing(pair):
    """The drafter says a token that the target would never say, and that spoils the rows beside it."""
    kangaroo = pair.load(device="cpu")
    whole = kangaroo.generate(PROMPT, max_new_tokens=24, plain=True).tokens
    never = next(token for token in range(67) if token not in (*PROMPT, *whole))
    spoil(kangaroo, never)
    right = oracle([*PROMPT, *whole])

    def say(position: int, place: int, token: int, sure: float) -> tuple[int, float]:
        return (never, 1.0) if position % 5 == 0 else right(position, place, token, sure)

    result = with_drafter(kangaroo, Scripted(kangaroo.drafter, say)).generate(
        PROMPT, max_new_tokens=24, num_speculative_tokens=2
    )
    assert result.tokens == whole
    assert result.stats.accepted > 0


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_kernels_notice(pair):
    """Both heads, with and without filters."""
    kangaroo = pair.load(device="cpu", kernels="triton")
    spoil(kangaroo, PROMPT[1])
    for settings in SETTINGS:
        assert until_it_fails(kangaroo, PROMPT, plain=True, **settings)[0] == []
    assert until_it_fails(kangaroo, PROMPT, num_speculative_tokens=1)[0] == []
