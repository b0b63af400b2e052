"""Drafts from a part of the vocabulary: the text is plain decoding's, and what is drafted is what the format says."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from chi_square import REJECTED, p_value
from drafters import Scripted, on_the_device, with_drafter
from pairs import with_vocabulary
from safetensors.torch import save_file

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.contract import DRAFT_STREAM, TARGET_STREAM, DraftVocabulary
from kangaroo_kernels.model.drafters.vocabulary import most_frequent
from kangaroo_kernels.model.head import Head
from kangaroo_kernels.model.sampling import Chooser, Sampling
from kangaroo_kernels.model.shaping import Shaping
from kangaroo_kernels.model.target.checkpoint import DRAFT_VOCABULARY_FILE
from kangaroo_kernels.reference.noise import gumbel

VOCAB, PROMPT, COUNT = 67, [7, 3, 5], 40
PARTS = {"one": [0], "some": sorted(random.Random(0).sample(range(VOCAB), 30)), "all but one": list(range(VOCAB - 1))}
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05},
    {"repetition_penalty": 1.3},
    {"logit_bias": {9: 40.0, 20: -3.0}, "temperature": 0.7},
    {"min_new_tokens": 20, "stop": (0, 9, 20)},
)
IDS = ["+".join(settings) or "greedy" for settings in SETTINGS]

Load = Callable[[Sequence[int]], Kangaroo]


@pytest.fixture(scope="module")
def load(pair, tmp_path_factory) -> Load:
    """The shared pair, whose adapter drafts some tokens alone."""

    def loaded(tokens: Sequence[int]) -> Kangaroo:
        folder = with_vocabulary(pair.adapter, tmp_path_factory.mktemp("part") / "adapter", tokens)
        return Kangaroo.from_pretrained(pair.target, folder, device="cpu")

    return loaded


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("part", PARTS)
def test_tokens_are_plain_tokens(load, part, settings):
    settings = {"max_new_tokens": COUNT, "draft_confidence_threshold": 0.0, **settings}
    kangaroo = load(PARTS[part])
    plain = kangaroo.generate(PROMPT, plain=True, **settings)
    drafted = kangaroo.generate(PROMPT, **settings)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.drafted
    resident = on_the_device(load(PARTS[part])).generate(PROMPT, **settings)
    assert resident.tokens == plain.tokens
    assert resident.stats.accepted_at == drafted.stats.accepted_at


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_are_the_best_of_the_part(pair, load, temperature):
    """By the whole head's logits and by the noise that a token has in the whole vocabulary."""
    kangaroo, tokens = load(PARTS["some"]), torch.tensor(PARTS["some"])
    drafter = Scripted(kangaroo.drafter)
    settings = {"max_new_tokens": COUNT, "temperature": temperature, "num_speculative_tokens": 1}
    text = PROMPT + with_drafter(kangaroo, drafter).generate(PROMPT, **settings).tokens
    logits = pair.load(device="cpu").draft_logits(text)
    reduced = kangaroo.draft_logits(text)
    torch.testing.assert_close(reduced[:, tokens], logits[:, tokens])
    assert (reduced.isneginf().sum(-1) == VOCAB - len(tokens)).all()
    confidence = logits[:, tokens].softmax(-1).amax(-1)
    if temperature:
        logits = logits / temperature + gumbel(0, TARGET_STREAM, torch.arange(1, len(text) + 1), VOCAB)
    wanted = tokens[logits[:, tokens].argmax(-1)]
    assert len(drafter.own) > COUNT // 2
    for position, token, sure in drafter.own:
        assert token == int(wanted[position - 1])
        assert sure == pytest.approx(float(confidence[position - 1]), abs=2e-5)


def test_a_part_with_every_draft_loses_nothing(pair, load):
    """At threshold 0, since the confidence is that among the part's tokens."""
    settings = {"max_new_tokens": COUNT, "draft_confidence_threshold": 0.0}
    whole = pair.load(device="cpu")
    drafter = Scripted(whole.drafter)
    wanted = with_drafter(whole, drafter).generate(PROMPT, **settings).stats
    stats = load(sorted({token for _, token, _ in drafter.own})).generate(PROMPT, **settings).stats
    assert (stats.accepted_at, stats.drafted) == (wanted.accepted_at, wanted.drafted)


# --- rejection sampling


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_a_draft_comes_from_the_distribution_it_names(filters):
    """Without the part's, another distribution than the drafts' would decide what is accepted."""
    size, part = 8, DraftVocabulary(torch.tensor([1, 2, 5, 7], dtype=torch.int32), 8)
    hidden, head = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), Head(torch.ones(4), torch.zeros(4, 4), 1e-6, part)
    head.weight[:, 0] = torch.tensor([0.1, 0.5, 0.3, 0.4])
    chooser = Chooser(Sampling(temperature=0.8, acceptance="rejection", **filters))
    draws = [chooser.draft_with_distribution(hidden, head, place) for place in range(1500)]
    counts = torch.bincount(torch.cat([guess.token for guess, _ in draws]), minlength=size).float()
    distribution = draws[0][1]
    assert distribution.shape == (1, size)
    assert not distribution[0, [0, 3, 4, 6]].any()
    assert p_value(counts, distribution[0]) > REJECTED
    noise = gumbel(0, DRAFT_STREAM, torch.arange(1500), size)
    assert draws[0][0].token == (distribution.log() + noise[:1]).argmax()


def test_a_part_that_the_request_bars_is_certain_of_a_draft_that_falls():
    part = DraftVocabulary(torch.tensor([1, 2], dtype=torch.int32), 6)
    chooser = Chooser(
        Sampling(temperature=1.0, acceptance="rejection"), shaping=Shaping(ends=frozenset({1, 2}), ends_from=10)
    )
    head = Head(torch.ones(4), torch.randn(2, 4), 1e-6, part)
    guess, distribution = chooser.draft_with_distribution(torch.ones(1, 4), head, 3)
    assert distribution.tolist() == [[float(token == int(guess.token)) for token in range(6)]]


# --- the format


def test_the_tokens_ascend_whatever_their_order_was(load):
    """So that ties fall to the lowest token."""
    kangaroo = load([50, 7, 31])
    assert kangaroo.drafter.adapter.head.vocabulary.tokens.tolist() == [7, 31, 50]


def test_most_frequent():
    counts = torch.tensor([3, 9, 0, 3, 1, 0])
    assert most_frequent(counts, 4).tolist() == [1, 0, 3, 4]
    assert most_frequent(counts, 3, always=(5, 2, 99, -1)).tolist() == [2, 5, 1]
    assert counts.tolist() == [3, 9, 0, 3, 1, 0]


def break_file(tensor: torch.Tensor, name: str = "draft_vocabulary") -> Callable[[Path], None]:
    return lambda folder: save_file({name: tensor}, folder / DRAFT_VOCABULARY_FILE)


def break_size(size: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"draft_vocab_size": size}))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (lambda folder: (folder / DRAFT_VOCABULARY_FILE).unlink(), "does not exist"),
    "truncated": (lambda folder: (folder / DRAFT_VOCABULARY_FILE).write_bytes(b"{}"), "truncated"),
    "another name": (break_file(torch.tensor([1, 2], dtype=torch.int32), "tokens"), "no tensor 'draft_vocabulary'"),
    "another size": (break_file(torch.tensor([1, 2, 3], dtype=torch.int32)), r"\[3\] torch.int32"),
    "another dtype": (break_file(torch.tensor([1, 2])), r"\[2\] torch.int64"),
    "not ascending": (break_file(torch.tensor([2, 2], dtype=torch.int32)), "ascend"),
    "negative": (break_file(torch.tensor([-1, 2], dtype=torch.int32)), "ascend"),
    "beyond the vocabulary": (break_file(torch.tensor([2, VOCAB], dtype=torch.int32)), f"{VOCAB - 1}"),
    "size 0": (break_size(0), "draft_vocab_size is 0"),
    "size of all": (break_size(VOCAB), f"from 1 to {VOCAB - 1}"),
    "size that is no number": (break_size(True), "draft_vocab_size is True"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_part_is_refused(pair, tmp_path, case):
    spoil, message = BROKEN[case]
    folder = with_vocabulary(pair.adapter, tmp_path / "adapter", [1, 2])
    spoil(folder)
    with pytest.raises(KangarooError, match=message):
        Kangaroo.from_pretrained(pair.target, folder)


def test_without_the_entry_the_file_is_not_read(pair, tmp_path):
    folder = with_vocabulary(pair.adapter, tmp_path / "adapter", [1, 2])
    break_size(None)(folder)
    assert Kangaroo.from_pretrained(pair.target, folder).drafter.adapter.head.vocabulary is None
