"""``generate`` of transformers with our decoding in it: our tokens, its streamers and criteria, refusals by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair
from pairs import make_adapter, make_target, with_vocabulary

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.integrations.custom_generate import generate
from kangaroo_kernels.model.integrations.export import export_for_transformers

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
NEW = 24


@pytest.fixture(autouse=True)
def _own_module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the folder's code to the user's cache and imports it from there."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def in_transformers(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.fixture(scope="module")
def model(pair: Pair) -> Any:
    return in_transformers(pair.target)


@pytest.fixture
def ours(model: Any, pair: Pair) -> Callable[..., list[int]]:
    """New tokens of our ``generate`` on the model."""

    def new_tokens(**arguments: Any) -> list[int]:
        arguments = {"inputs": PROMPT, "max_new_tokens": NEW, **arguments}
        return generate(model, pair.adapter, **arguments)[0, PROMPT.shape[1] :].tolist()

    return new_tokens


@pytest.fixture
def theirs(model: Any) -> Callable[..., list[int]]:
    """New tokens of transformers' own ``generate`` on the model."""

    def new_tokens(**arguments: Any) -> list[int]:
        arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": NEW, **arguments}
        return model.generate(PROMPT, **arguments)[0, PROMPT.shape[1] :].tolist()

    return new_tokens


class Listener:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[list[Any]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_both_ways_into_the_exported_folder(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    export_for_transformers(pair.target, pair.adapter, folder)
    wanted = pair.load().generate(PROMPT[0], max_new_tokens=NEW)
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": NEW, "streamer": Listener()}
    by_name = in_transformers(pair.target).generate(
        PROMPT, **arguments, custom_generate=str(folder), trust_remote_code=True
    )
    assert by_name[0].tolist() == PROMPT[0].tolist() + wanted.tokens
    steps = arguments["streamer"].got
    assert steps[0] == PROMPT.tolist()
    assert [token for step in steps[1:] for token in step] == wanted.tokens
    assert len(steps) == 1 + wanted.stats.verification_steps < 1 + NEW, "it was not this runtime that decoded"
    assert arguments["streamer"].ended
    loaded = in_transformers(folder, trust_remote_code=True)  # as transformers serve does
    assert torch.equal(loaded.generate(input_ids=PROMPT, **arguments), by_name)
    (folder / "adapter").rename(folder / "moved")
    with pytest.raises(KangarooError, match=f"adapter folder '{folder / 'adapter'}' does not exist"):
        in_transformers(folder, trust_remote_code=True).generate(PROMPT, max_new_tokens=NEW)


def test_the_folder_takes_the_callers_exit_layer_and_no_second_copy_of_the_weights(pair: Pair, tmp_path: Path) -> None:
    from kangaroo_kernels import Kangaroo

    folder = tmp_path / "folder"
    export_for_transformers(pair.target, pair.adapter, folder, exit_layer=3)
    assert Kangaroo.from_pretrained(folder, folder / "adapter").drafter.first_layer == 3
    assert (folder / "model.safetensors").samefile(pair.target / "model.safetensors")


def test_the_folder_holds_a_draft_vocabulary(pair: Pair, tmp_path: Path) -> None:
    from kangaroo_kernels import Kangaroo

    folder = tmp_path / "folder"
    export_for_transformers(pair.target, with_vocabulary(pair.adapter, tmp_path / "some", range(9)), folder)
    drafter = Kangaroo.from_pretrained(folder, folder / "adapter").drafter
    assert drafter.adapter.head.vocabulary.tokens.tolist() == [*range(9)]


@pytest.mark.parametrize("way", [{"prompt_lookup": True}, {"draft_tree": 7}])
def test_an_adapter_drafts_in_its_own_way(tmp_path: Path, way: dict[str, Any]) -> None:
    from kangaroo_kernels import Kangaroo

    target = make_target(tmp_path / "target", std=0.1)  # its text repeats itself, which lookup drafts
    adapter = make_adapter(tmp_path / "adapter", target, exit_layer=2, copy_layer=2, **way)
    streamer = Listener()
    generate(in_transformers(target), adapter, PROMPT, max_new_tokens=NEW, streamer=streamer)
    steps = Kangaroo.from_pretrained(target, adapter).progress(PROMPT[0], max_new_tokens=NEW)
    assert streamer.got[1:] == [step.commit.tokens for step in steps]


def test_what_ends_a_text_ends_it_as_in_transformers(
    ours: Callable[..., list[int]], theirs: Callable[..., list[int]], pair: Pair
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    text = theirs()
    assert ours() == text
    middle = text[10]
    ends: tuple[dict[str, Any], ...] = (
        {"eos_token_id": middle},
        {"eos_token_id": [middle, text[15]]},
        {"stop_strings": [tokenizer.decode(text[9:11]), "never"], "tokenizer": tokenizer},
        {"stopping_criteria": [lambda tokens, scores, **_: torch.tensor([tokens.shape[1] >= 12])]},
        {"max_time": -1.0},
        {"max_new_tokens": None, "max_length": 13},
    )
    for end in ends:
        assert ours(**end) == theirs(**end), end
        assert 0 < len(ours(**end)) < NEW, end


def test_the_models_config_ends_no_text(pair: Pair, ours: Callable[..., list[int]]) -> None:
    """transformers asks the generation settings alone."""
    whole, other = ours(), in_transformers(pair.target)
    other.config.eos_token_id = whole[10]
    got = generate(other, pair.adapter, PROMPT, max_new_tokens=NEW)
    assert got[0, PROMPT.shape[1] :].tolist() == whole


def test_sampling_has_transformers_settings_and_its_generator(ours: Callable[..., list[int]], pair: Pair) -> None:
    settings = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(3)
    got = ours(do_sample=True, **settings)
    assert got != ours(do_sample=True, **settings)
    torch.manual_seed(3)
    seed = int(torch.randint(1 << 62, ()))
    assert got == pair.load().generate(PROMPT[0], max_new_tokens=NEW, seed=seed, **settings).tokens
    assert ours(**settings) == ours()  # without do_sample they have no effect there, either


def test_the_models_own_settings_hold(model: Any, pair: Pair, ours: Callable[..., list[int]]) -> None:
    from transformers import GenerationConfig

    whole = ours()
    short = generate(model, pair.adapter, PROMPT, GenerationConfig(max_new_tokens=5))
    assert short[0, PROMPT.shape[1] :].tolist() == whole[:5]
    model.generation_config.repetition_penalty = 1.2
    try:
        with pytest.raises(KangarooError, match=r"setting repetition_penalty=1\.2 is not supported"):
            ours()
        assert ours(repetition_penalty=1.0) == whole
    finally:
        model.generation_config.repetition_penalty = None


def test_a_text_is_given_up_when_its_streamer_raises(ours: Callable[..., list[int]]) -> None:
    class Cancelled(Listener):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.got) == 3:
                raise InterruptedError

    streamer = Cancelled()
    with pytest.raises(InterruptedError):
        ours(streamer=streamer)
    assert len(streamer.got) == 3
    assert len(ours()) == NEW


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_beams": 2}, "the generation setting num_beams=2 is not supported by Kangaroo; set it to 1."),
        ({"min_new_tokens": 3}, "the generation setting min_new_tokens=3"),
        ({"forced_eos_token_id": 0}, "the generation setting forced_eos_token_id=0"),
        ({"output_scores": True}, "the generation setting output_scores=True"),
        ({"prompt_lookup_num_tokens": 3}, "the generation setting prompt_lookup_num_tokens=3"),
        ({"logits_processor": [lambda tokens, scores: scores]}, "generate's argument 'logits_processor'"),
        ({"past_key_values": ((),)}, "generate's argument 'past_key_values'"),
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64)}, r"give input_ids of the shape \[1, T\], not \[2, 3\]"),
        ({"inputs": None}, r"give input_ids of the shape \[1, T\], not None"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "give one prompt without padding"),
        ({"max_new_tokens": None}, "neither max_new_tokens nor max_length was given"),
        ({"max_new_tokens": None, "max_length": 5}, "max_length is 5, the prompt has 5 tokens"),
        ({"stop_strings": "A"}, "stop_strings need the tokenizer"),
        ({"do_sample": True, "temperature": 1000.0}, "temperature is 1000.0"),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(
    arguments: dict[str, Any], sentence: str, ours: Callable[..., list[int]]
) -> None:
    with pytest.raises(KangarooError, match=sentence):
        ours(**arguments)
