"""Messages: what the template makes of them, what is refused, and a conversation in a session."""

from typing import Any

import pytest
from pairs import CHAT_TEMPLATE

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.chat import chat_tokens

HELLO = [{"role": "user", "content": "HELLO"}]
CONVERSATION = [
    {"role": "system", "content": "BE KIND"},
    {"role": "user", "content": "HI"},
    {"role": "assistant", "content": "HELLO"},
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "BYE"},
]


@pytest.fixture
def kangaroo(pair: Any) -> Kangaroo:
    loaded = pair.load(device="cpu")
    loaded.tokenizer.chat_template = CHAT_TEMPLATE
    return loaded


def test_the_template_makes_the_prompt(kangaroo):
    rendered = "@S:BE KIND;U:HI;A:HELLO;T:42;U:BYE;A:"
    wanted = kangaroo.tokenizer(rendered)["input_ids"]
    assert chat_tokens(CONVERSATION, kangaroo.tokenizer) == wanted
    assert chat_tokens(iter(CONVERSATION), kangaroo.tokenizer) == wanted
    assert kangaroo.resolve(None, Settings(max_new_tokens=1), CONVERSATION).tokens == tuple(wanted)


def test_no_second_first_token(kangaroo):
    """The template writes it, and the tokenizer would add one."""
    from tokenizers import processors

    begin = kangaroo.tokenizer.convert_tokens_to_ids("@")
    kangaroo.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="@ $A", special_tokens=[("@", begin)]
    )
    tokens = chat_tokens(HELLO, kangaroo.tokenizer)
    assert tokens == kangaroo.tokenizer("@U:HELLO;A:", add_special_tokens=False)["input_ids"]
    assert tokens.count(begin) == 1


@pytest.mark.parametrize("of_a_session", [False, True])
def test_every_way_takes_messages(kangaroo, of_a_session):
    writer = kangaroo.session() if of_a_session else kangaroo
    prompt = chat_tokens(HELLO, kangaroo.tokenizer)
    settings = Settings(max_new_tokens=12)
    wanted = kangaroo.generate(prompt, settings)
    assert writer.chat(HELLO, settings).tokens == wanted.tokens
    assert writer.chat(HELLO, max_new_tokens=12).tokens == wanted.tokens
    assert writer.generate(settings=settings, messages=HELLO).tokens == wanted.tokens
    assert writer.generate(messages=HELLO, max_new_tokens=12).text == wanted.text
    assert "".join(writer.stream(messages=HELLO, max_new_tokens=12)) == wanted.text
    *_, last = writer.progress(messages=HELLO, max_new_tokens=12)
    assert last.generation.tokens == wanted.tokens


def test_a_conversation_in_a_session(kangaroo):
    """The messages before are in the caches, answers included; each answer is that of a fresh conversation."""
    session, messages = kangaroo.session(), []
    for question in ("HI", "WHO ARE YOU", "BYE"):
        messages.append({"role": "user", "content": question})
        before = len(chat_tokens(messages, kangaroo.tokenizer)) - len(f"U:{question};A:")
        answer = session.chat(messages, max_new_tokens=15)
        assert answer.tokens == kangaroo.chat(messages, max_new_tokens=15).tokens
        assert answer.stats.cached_tokens >= before - 3 - len(";") or before == 1
        messages.append({"role": "assistant", "content": answer.text})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ("HELLO", "messages is 'HELLO'"),
        (HELLO[0], "messages is {"),
        (3, "messages is 3"),
        (["HELLO"], "message 0 is 'HELLO'"),
        ([*HELLO, ("user", "HI")], "message 1 is"),
        ([{"content": "HELLO"}], "message 0 has the role None"),
        ([*HELLO, {"role": "usr", "content": "HI"}], "message 1 has the role 'usr'; .*user"),
        ([{"role": ["user"], "content": "HI"}], "message 0 has the role"),
        ([{"role": "user"}], "message 0 has the content None"),
        ([*HELLO, {"role": "user", "content": b"HI"}], "message 1 has the content b'HI'"),
        ([{"role": "user", "content": [{"type": "text", "text": "HI"}]}], "message 0 has the content"),
        ([{"role": "user", "content": "A\ud800"}], "message 0 holds a lone surrogate"),
        ([*HELLO, {"role": "assistant", "content": "HI"}], "the last message is the assistant's"),
    ],
)
def test_messages_that_are_none(kangaroo, messages, words):
    with pytest.raises(KangarooError, match=words):
        kangaroo.chat(messages, max_new_tokens=1)


def test_one_of_prompt_and_messages(kangaroo):
    with pytest.raises(TypeError, match="both a prompt and messages"):
        kangaroo.generate("HELLO", messages=HELLO, max_new_tokens=1)
    with pytest.raises(KangarooError, match=r"the prompt is None; .* messages"):
        kangaroo.stream(max_new_tokens=1)
    with pytest.raises(KangarooError, match=r"messages=.*chat\(\)"):
        kangaroo.generate(HELLO, max_new_tokens=1)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate.') }}", r"refuses these messages \(roles must alternate\)"),
        ("{% for %}", "refuses these messages"),
        ("{{ messages[7]['content'] }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
        ({"rag": "A", "tools": "B"}, "refuses these messages"),
        ("", "empty"),
    ],
)
def test_templates_that_fail(kangaroo, template, words):
    kangaroo.tokenizer.chat_template = template
    with pytest.raises(KangarooError, match=words) as error:
        kangaroo.chat(HELLO, max_new_tokens=1)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_tokenizer(kangaroo):
    kangaroo.tokenizer = None
    with pytest.raises(KangarooError, match="no chat template"):
        kangaroo.chat(HELLO, max_new_tokens=1)


def test_a_conversation_that_fills_the_context(kangaroo):
    with pytest.raises(KangarooError, match="context holds 512"):
        kangaroo.chat([{"role": "user", "content": "A" * 600}], max_new_tokens=1)
