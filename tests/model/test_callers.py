"""What callers hand over: NumPy's numbers, prompts of other kinds, texts that already have their special tokens, and
what a checkpoint says of a text's end in its different files.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import make_target, make_tokenizer

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.request import prompt_tokens
from kangaroo_kernels.model.text import TextStream

PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tokenizer(make_target(tmp_path / "model"))


def load(folder: Path) -> Kangaroo:
    return Kangaroo.from_pretrained(folder, device="cpu")


def generate(folder: Path, **settings: Any) -> Any:
    return load(folder).generate(PROMPT, max_new_tokens=20, plain=True, **settings)


def write(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("many", [False, True])
def test_each_file_may_name_the_end(folder, where, many):
    """Instruct checkpoints name the end of a turn in generation_config.json alone."""
    text = generate(folder).tokens
    end = text[5]
    other = next(token for token in range(67) if token not in text)
    for name in ("config.json", "generation_config.json"):
        write(folder / name, eos_token_id=other)
    write(folder / where, eos_token_id=[other, end] if many else end)
    written = generate(folder)
    assert written.tokens == text[: text.index(end) + 1]
    assert written.finish_reason == "stop"


def test_the_tokenizer_may_name_the_end(folder):
    kangaroo = load(folder)
    text = kangaroo.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    kangaroo.tokenizer.eos_token = kangaroo.tokenizer.convert_ids_to_tokens(text[3])
    written = kangaroo.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    assert written == text[: text.index(text[3]) + 1]


@pytest.mark.parametrize("first", ["config.json", "generation_config.json"])
def test_ends_without_a_row_in_the_model_are_never_written(folder, first):
    """A tokenizer may have more tokens than the model, such as one to pad with; min_new_tokens bars what there is."""
    write(folder / first, eos_token_id=[67, 100_000])
    kangaroo = load(folder)
    kangaroo.tokenizer.add_special_tokens({"eos_token": "[PAD]"})
    assert kangaroo.tokenizer.eos_token_id >= 67
    wanted = kangaroo.generate(PROMPT, max_new_tokens=20, plain=True).tokens
    for plain in (True, False):
        written = kangaroo.generate(PROMPT, max_new_tokens=20, plain=plain, min_new_tokens=5, stop=["[PAD]"])
        assert written.tokens == wanted


def test_an_end_that_no_file_names_ends_nothing(folder):
    """transformers' class of configurations has a default, token 2; its own generation would not stop there."""
    text = generate(folder).tokens
    values = json.loads((folder / "config.json").read_text())
    for name in ("eos_token_id", "pad_token_id"):
        values.pop(name, None)
    (folder / "config.json").write_text(json.dumps(values))
    other = next(token for token in range(67) if token not in text)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert load(folder).target.config.eos_token_ids == (2,)  # nothing is named anywhere
    write(folder / "generation_config.json", eos_token_id=other)
    assert load(folder).target.config.eos_token_ids == (other,)


@pytest.mark.parametrize("end", ["128009", [[2]], [2, None], 1.5, True, {}])
def test_an_end_that_is_no_token(folder, end):
    write(folder / "generation_config.json", eos_token_id=end)
    with pytest.raises(KangarooError, match=r"generation_config\.json: eos_token_id is .* a token id or a list"):
        load(folder)


@pytest.mark.parametrize("content", ["no JSON", "[]", "3"])
def test_a_damaged_generation_config(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(KangarooError, match=r"generation_config\.json"):
        load(folder)


def test_a_truncation_that_the_tokenizer_asks_for(folder):
    """It is lifted as the tokenizer is loaded: the first texts of several threads would each change the tokenizer."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load(folder).tokenizer
    assert tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer("class")["input_ids"]) == 5


def test_numpys_numbers_are_numbers(folder):
    settings = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(9),
        "top_p": np.float64(0.75),
        "seed": np.uint64(3),
        "num_speculative_tokens": np.int32(2),
        "draft_confidence_threshold": np.float32(0.25),
        "stop": (np.int64(4),),
    }
    made = Settings(max_new_tokens=np.int64(20), plain=True, **settings)
    plainly = {"temperature": 0.5, "top_k": 9, "top_p": 0.75, "seed": 3, "stop": (4,)}
    kangaroo = load(folder)
    assert kangaroo.generate(PROMPT, made).tokens == generate(folder, **plainly).tokens
    for name in ("max_new_tokens", "top_k", "seed", "num_speculative_tokens"):
        assert type(getattr(made, name)) is int
    for name in ("temperature", "top_p", "draft_confidence_threshold"):
        assert type(getattr(made, name)) is float
    for wrong in ({"seed": np.bool_(True)}, {"seed": np.float64(3.0)}, {"top_k": np.array([3])}):
        with pytest.raises(KangarooError, match=next(iter(wrong))):
            Settings(max_new_tokens=1, **wrong)


def test_settings_beside_the_first_are_given_by_name(folder):
    with pytest.raises(TypeError, match="positional"):
        Kangaroo.from_pretrained(folder, None, 2)
    with pytest.raises(TypeError, match="positional"):
        Settings(3, 0.5)


def test_rows_of_tokens(folder):
    kangaroo = load(folder)
    wanted = kangaroo.generate(PROMPT, max_new_tokens=5, plain=True).tokens
    for prompt in (tuple(PROMPT), np.array(PROMPT), torch.tensor(PROMPT)):
        assert kangaroo.generate(prompt, max_new_tokens=5, plain=True).tokens == wanted


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([{"role": "user", "content": "hi"}], "a list of messages"),
        (["a", "b"], "a list of texts"),
        ([[1, 2], [3]], "a list of rows of tokens"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "'input_ids', 'attention_mask'"),
        (torch.tensor([[1, 2]]), r"shape \[1, 2\]"),
        (np.array([[1, 2]]), r"shape \[1, 2\]"),
        (torch.tensor(3), r"shape \[\]"),
    ],
)
def test_prompts_of_other_kinds_are_named(folder, prompt, words):
    with pytest.raises(KangarooError, match=words):
        load(folder).generate(prompt, max_new_tokens=1, plain=True)


def test_a_text_that_has_its_first_token_gets_no_second_one(folder):
    """As a rendered chat template has it; a text without it gets one as ever."""
    from tokenizers import processors

    kangaroo = load(folder)
    tokenizer, config = kangaroo.tokenizer, kangaroo.target.config
    tokenizer.bos_token = "A"
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="A $A", special_tokens=[("A", begin)]
    )
    rest = [tokenizer.convert_tokens_to_ids(character) for character in "BC"]
    assert tokenizer("ABC")["input_ids"][:2] == [begin, begin]
    for text in ("ABC", "BC"):
        assert prompt_tokens(text, config, tokenizer) == [begin, *rest]
    assert prompt_tokens("AABC", config, tokenizer) == [begin, begin, *rest]


def word_tokenizer() -> Any:
    """As Llama-1 and Llama-2 have it: a word carries the space before it, and the first one of a text loses it."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\u2581Once", "\u2581upon", "\u2581a", "\u2581time", ",", "\u2581there"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_tokens(text: str) -> list[int]:
    return [7 + byte for byte in text.encode()]


@pytest.mark.parametrize("cut", range(1, 14))
def test_prompt_and_new_text_are_the_text_of_all_tokens(cut):
    """Wherever the prompt ends: behind a word, and in the middle of a character of several bytes."""
    tokenizer = word_tokenizer()
    tokens = [1, 2, 3, *byte_tokens("\u00e9"), 4, 5, *byte_tokens("\U0001f998"), 6, *byte_tokens("!")]
    whole = tokenizer.decode(tokens)
    assert whole == "Once upon a\u00e9 time,\U0001f998 there!"
    stream = TextStream(tokenizer, prompt=tokens[:cut])
    new = "".join(stream.push(token) for token in tokens[cut:]) + stream.finish()
    assert tokenizer.decode(tokens[:cut]).rstrip("\ufffd") + new == whole


def test_a_long_prompt_is_not_decoded_at_every_token():
    """The end of it is enough."""
    tokenizer, lengths = word_tokenizer(), []

    class Counting:
        def decode(self, tokens: list[int], **settings: Any) -> str:
            lengths.append(len(tokens))
            return tokenizer.decode(tokens, **settings)

    stream = TextStream(Counting(), prompt=[1, 2, 3, 4] * 500)
    assert "".join(stream.push(token) for token in [5, 6] * 20).startswith(", there, there")
    assert max(lengths) < 40


def test_the_space_before_the_first_new_word(folder):
    kangaroo = load(folder)
    kangaroo.tokenizer = word_tokenizer()
    written = kangaroo.generate([1, 2], max_new_tokens=12, plain=True)
    assert kangaroo.tokenizer.decode([1, 2]) + written.text == kangaroo.tokenizer.decode([1, 2, *written.tokens])
