"""The endpoint, by the official client over a real port: the library's own texts, in OpenAI's form."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import openai
import pytest
from pairs import CHAT_TEMPLATE, make_adapter, make_target, make_tokenizer
from serving import Served, served

from kangaroo_kernels import Generation, Kangaroo, Settings
from kangaroo_kernels.model.serving import transport
from kangaroo_kernels.model.serving.pool import roomy_session

SETTINGS = Settings(max_new_tokens=5)
ROUNDING = 1e-5
"""The server's session may have a part of the prompt already; on Intel that changed a log-probability by 7e-7."""
MESSAGES = [{"role": "system", "content": "BE"}, {"role": "user", "content": "ABC"}]


@pytest.fixture(scope="module")
def kangaroo(tmp_path_factory: pytest.TempPathFactory) -> Kangaroo:
    folder = tmp_path_factory.mktemp("served")
    target = make_target(folder / "target", quiet_from=2, quiet=0.2, eos_token_id=40)
    make_tokenizer(target, chat_template=CHAT_TEMPLATE)
    return Kangaroo.from_pretrained(
        target, make_adapter(folder / "a", target, exit_layer=2, copy_layer=2), device="cpu"
    )


@pytest.fixture(scope="module")
def server(kangaroo: Kangaroo) -> Iterator[Served]:
    with served(kangaroo) as server:
        yield server


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def ask(client: openai.OpenAI, chat: bool, model: str, **parameters: Any) -> Any:
    """A request that gives what none of its kind can do without."""
    if chat:
        return client.chat.completions.create(**({"model": model, "messages": MESSAGES} | parameters))
    return client.completions.create(**({"model": model, "prompt": "ABC"} | parameters))


def text_of(choice: Any) -> str:
    return choice.message.content if hasattr(choice, "message") else choice.text


def wanted(kangaroo: Kangaroo, chat: bool, **settings: Any) -> Generation:
    return kangaroo.chat(MESSAGES, **settings) if chat else kangaroo.generate("ABC", **settings)


PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {}),
    "sampled": ({"seed": 7}, {"temperature": 1.0, "seed": 7}),
    "seed below 0": ({"seed": -1}, {"temperature": 1.0, "seed": (1 << 64) - 1}),
    "top_p": ({"seed": 7, "top_p": 0.5, "temperature": 2}, {"temperature": 2, "seed": 7, "top_p": 0.5}),
    "top_k": ({"seed": 3, "extra_body": {"top_k": 4}}, {"temperature": 1.0, "seed": 3, "top_k": 4}),
    "top_k off": ({"seed": 3, "extra_body": {"top_k": -1, "min_p": 0}}, {"temperature": 1.0, "seed": 3}),
    "min_p": ({"seed": 3, "extra_body": {"min_p": 0.3}}, {"temperature": 1.0, "seed": 3, "min_p": 0.3}),
    "logit_bias": ({"temperature": 0, "logit_bias": {"20": 100}}, {"logit_bias": {20: 100.0}}),
    "stop": ({"temperature": 0, "logit_bias": {"20": 9}, "stop": ["CC"]}, {"logit_bias": {20: 9.0}, "stop": ["CC"]}),
    "repetition": ({"temperature": 0, "extra_body": {"repetition_penalty": 3.0}}, {"repetition_penalty": 3.0}),
    "eos": ({"temperature": 0, "logit_bias": {"40": 100}}, {"logit_bias": {40: 100.0}}),
    "ignore_eos": (
        {"temperature": 0, "logit_bias": {"40": 100}, "extra_body": {"ignore_eos": True}},
        {"logit_bias": {40: 100.0}, "ignore_eos": True},
    ),
    "min_tokens": (
        {"temperature": 0, "logit_bias": {"40": 100}, "extra_body": {"min_tokens": 5}},
        {"logit_bias": {40: 100.0}, "min_new_tokens": 5},
    ),
    "nothing that changes it": (
        {"temperature": 0, "n": 1, "presence_penalty": 0, "user": "me", "top_p": None, "extra_body": {"tools": []}},
        {},
    ),
}
"""What a client says, and the settings that it means."""


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_mean_settings(case: str, chat: bool, kangaroo: Kangaroo, client: openai.OpenAI) -> None:
    said, meant = PARAMETERS[case]
    right = wanted(kangaroo, chat, max_new_tokens=24, **meant)
    answer = ask(client, chat, kangaroo.name, max_tokens=24, **said)
    (choice,) = answer.choices
    assert text_of(choice) == right.text
    assert choice.finish_reason == right.finish_reason
    assert answer.usage.completion_tokens == len(right.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(right.tokens)
    chunks = list(ask(client, chat, kangaroo.name, max_tokens=24, stream=True, **said))
    pieces = [each.delta.content or "" if chat else each.text for chunk in chunks for each in chunk.choices]
    assert "".join(pieces) == right.text
    assert [each.choices[0].finish_reason for each in chunks] == [None] * (len(chunks) - 1) + [right.finish_reason]
    assert {each.id for each in chunks} == {chunks[0].id} != {answer.id}


def test_the_cases_differ(kangaroo: Kangaroo) -> None:
    """Else a parameter that is not passed on would not be seen."""
    neutral = {"top_k off": "", "nothing that changes it": ""}
    texts = {case: wanted(kangaroo, True, max_new_tokens=24, **meant) for case, (_, meant) in PARAMETERS.items()}
    seen = {(each.text, each.finish_reason, len(each.tokens)) for case, each in texts.items() if case not in neutral}
    assert len(seen) == len(PARAMETERS) - len(neutral)


def test_the_clients_own_examples(server: Served, kangaroo: Kangaroo) -> None:
    """The chat, streaming and asynchronous examples of its README, and its helper that accumulates a stream."""
    with server.client() as client:
        completion = client.chat.completions.create(
            model=kangaroo.name,
            messages=[
                {"role": "developer", "content": "TALK"},
                {"role": "user", "content": [{"type": "text", "text": "HOW"}]},
            ],
        )
        assert completion.choices[0].message.role == "assistant"
        assert completion.object == "chat.completion"
        with client.chat.completions.stream(model=kangaroo.name, messages=MESSAGES, temperature=0) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == wanted(kangaroo, True, max_new_tokens=512).text
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
        (model,) = client.models.list()
        assert client.models.retrieve(model.id) == model

    async def asynchronous() -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            stream = await client.completions.create(
                model=kangaroo.name, prompt="ABC", stream=True, temperature=0, max_tokens=9
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(asynchronous()) == wanted(kangaroo, False, max_new_tokens=9).text


@pytest.mark.parametrize("chat", [False, True])
def test_usage_of_a_stream(chat: bool, kangaroo: Kangaroo, client: openai.OpenAI) -> None:
    asked = {"stream": True, "temperature": 0, "max_tokens": 5}
    *others, last = ask(client, chat, kangaroo.name, stream_options={"include_usage": True}, **asked)
    assert last.choices == [] and last.usage.completion_tokens == 5
    request = kangaroo.resolve(None, SETTINGS, MESSAGES) if chat else kangaroo.resolve("ABC", SETTINGS)
    assert last.usage.prompt_tokens == len(request.tokens)
    assert all(chunk.usage is None for chunk in [*others, *ask(client, chat, kangaroo.name, **asked)])


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(stream: bool, kangaroo: Kangaroo, client: openai.OpenAI) -> None:
    right = wanted(kangaroo, True, max_new_tokens=6, logprobs=2)
    said = {"temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    answer = ask(client, True, kangaroo.name, stream=stream, **said)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    found = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.logprob for entry in found] == pytest.approx(
        [entry.logprob for entry in right.logprobs], abs=ROUNDING
    )
    assert "".join(entry.token for entry in found).replace("<unk>", "") == right.text
    for entry, own in zip(found, right.logprobs, strict=True):
        assert bytes(entry.bytes).decode() == entry.token
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx(list(own.top.values()), abs=ROUNDING)
        assert [each.token for each in entry.top_logprobs] == [kangaroo.tokenizer.decode([token]) for token in own.top]


def test_logprobs_of_a_completion(kangaroo: Kangaroo, client: openai.OpenAI) -> None:
    right = wanted(kangaroo, False, max_new_tokens=6, logprobs=1)
    found = ask(client, False, kangaroo.name, temperature=0, max_tokens=6, logprobs=1).choices[0].logprobs
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in right.logprobs], abs=ROUNDING)
    assert "".join(found.tokens).replace("<unk>", "") == right.text
    written = [(token, place) for token, place in zip(found.tokens, found.text_offset, strict=True) if token != "<unk>"]
    assert all(right.text[place:].startswith(token) for token, place in written)
    for token, top, entry in zip(found.tokens, found.top_logprobs, right.logprobs, strict=True):
        assert top[token] == pytest.approx(entry.logprob, abs=ROUNDING)
        assert max(top.values()) == pytest.approx(max(entry.top.values()), abs=ROUNDING)


BOTH, OF_CHATS, OF_COMPLETIONS = (False, True), (True,), (False,)
REFUSALS: list[tuple[tuple[bool, ...], dict[str, Any], str | None, str]] = [
    (BOTH, {"n": 2}, "n", "n is 2; this server supports only 1."),
    (BOTH, {"presence_penalty": 0.5}, "presence_penalty", "supports only 0."),
    (BOTH, {"frequency_penalty": 1}, "frequency_penalty", "supports only 0."),
    (BOTH, {"beams": 4}, "beams", "beams is not supported by this server"),
    (BOTH, {"temperature": -1}, "temperature", "it must be 0 (greedy) or from"),
    (BOTH, {"temperature": "hot"}, "temperature", "temperature is 'hot'"),
    (BOTH, {"top_p": 0}, "top_p", "top_p is 0"),
    (BOTH, {"top_k": -2}, "top_k", "top_k is -2"),
    (BOTH, {"top_k": False}, "top_k", "top_k is False"),
    (BOTH, {"min_p": ""}, "min_p", "min_p is ''"),
    (BOTH, {"seed": 1.5}, "seed", "seed is 1.5"),
    (BOTH, {"seed": True}, "seed", "seed is True"),
    (BOTH, {"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be a whole number"),
    (BOTH, {"max_tokens": 5, "min_tokens": 6}, "min_tokens", "from 0 to max_tokens, 5"),
    (BOTH, {"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
    (BOTH, {"ignore_eos": 1}, "ignore_eos", "it must be True or False"),
    (BOTH, {"stop": [7]}, "stop", "it must be a text or a list of texts"),
    (BOTH, {"stop": ""}, "stop", "stop"),
    (BOTH, {"stop": [f"{number}!" for number in range(65)]}, "stop", "stop has 65 texts; give at most 64"),
    (BOTH, {"logit_bias": {"A": 1}}, "logit_bias", "logit_bias has the key 'A'; its keys must be token ids"),
    (BOTH, {"logit_bias": {" 1_0 ": 1}}, "logit_bias", "logit_bias has the key ' 1_0 '"),
    (BOTH, {"logit_bias": {"67": 1}}, "logit_bias", "logit_bias's token 67 is not a whole number from 0 to 66"),
    (BOTH, {"logit_bias": {"0": "hot"}}, "logit_bias", "logit_bias has 0: 'hot'"),
    (BOTH, {"stream": "yes"}, "stream", "it must be true or false"),
    (BOTH, {"stream_options": {"include_usage": True}}, "stream_options", "given without stream"),
    (BOTH, {"stream": True, "stream_options": {"more": 1}}, "stream_options", "has 'more'"),
    (OF_CHATS, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "give one of them"),
    (OF_CHATS, {"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens is 0"),
    (OF_CHATS, {"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
    (OF_CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21"),
    (OF_CHATS, {"logprobs": 1}, "logprobs", "it must be true or false"),
    (OF_CHATS, {"response_format": {"type": "json_object"}}, "response_format", "supports only"),
    (OF_CHATS, {"tools": [{"type": "function"}]}, "tools", "supports only []"),
    (OF_CHATS, {"prompt": "A"}, "prompt", "prompt is not supported"),
    (OF_CHATS, {"messages": "hi"}, "messages", "messages must be a list"),
    (OF_CHATS, {"messages": []}, "messages", "messages is empty"),
    (OF_CHATS, {"messages": None}, "messages", "messages is missing"),
    (OF_CHATS, {"messages": [{"role": "judge", "content": "A"}]}, "messages", "has the role 'judge'"),
    (OF_CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "reads text alone"),
    (OF_CHATS, {"messages": [{"role": "user", "content": "A", "audio": {}}]}, "messages[0]", "'audio', which is not"),
    (OF_COMPLETIONS, {"prompt": ["A", "B"]}, "prompt", "prompt holds 2 prompts"),
    (OF_COMPLETIONS, {"prompt": ""}, "prompt", "the prompt is empty"),
    (OF_COMPLETIONS, {"prompt": [1, 99]}, "prompt", "99"),
    (OF_COMPLETIONS, {"prompt": {"A": 1}}, "prompt", "it must be a text or a list of token ids"),
    (OF_COMPLETIONS, {"logprobs": True}, "logprobs", "logprobs is True"),
    (OF_COMPLETIONS, {"echo": True}, "echo", "supports only False"),
    (OF_COMPLETIONS, {"best_of": 3}, "best_of", "supports only 1"),
    (OF_COMPLETIONS, {"suffix": "A"}, "suffix", "supports only ''"),
]


@pytest.mark.parametrize(("kinds", "change", "parameter", "sentence"), REFUSALS)
def test_what_is_not_served_is_refused_by_name(
    kinds: tuple[bool, ...], change: dict[str, Any], parameter: str | None, sentence: str, server: Served
) -> None:
    for chat in kinds:
        base = {"messages": MESSAGES} if chat else {"prompt": "ABC"}
        status, _, told = post(server, "chat/completions" if chat else "completions", base | change)
        assert status == 400
        assert told["error"].keys() == {"message", "type", "param", "code"}
        assert told["error"]["type"] == "invalid_request_error"
        assert sentence in told["error"]["message"]
        assert told["error"]["param"] == parameter


def test_a_stop_that_the_model_cannot_find(kangaroo: Kangaroo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without a tokenizer takes and gives tokens alone."""
    monkeypatch.setattr(kangaroo, "tokenizer", None)
    with served(kangaroo) as server:
        status, _, told = post(server, "completions", {"prompt": [1, 2], "stop": "A"})
    assert (status, told["error"]["param"]) == (400, "stop")


def post(
    server: Served, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and body, for what the official client would not send."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{server.url}/{path}", data, {"Content-Type": "application/json"} | (headers or {}), method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.loads(error.read())


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "sentence"),
    [
        ("completions", b"{", {}, 400, "no valid JSON"),
        ("completions", b"[" * 100_000, {}, 400, "no valid JSON"),
        ("completions", b"[]", {}, 400, "no JSON object"),
        ("completions", b"{}", {"Content-Type": "text/plain"}, 415, "add the header 'Content-Type: application/json'"),
        ("completions", {"model": "\ud800", "prompt": "A"}, {}, 404, "does not exist here"),
        ("completions", {"prompt": "\ud800"}, {}, 400, "lone surrogate"),
        ("embeddings", {}, {}, 404, "POST /v1/embeddings is not served here"),
        ("models", {}, {}, 405, "Method Not Allowed"),
    ],
)
def test_bad_http(path: str, body: Any, headers: dict[str, str], status: int, sentence: str, server: Served) -> None:
    found, _, told = post(server, path, body, headers)
    assert found == status
    assert sentence in told["error"]["message"]


def test_a_large_body_is_refused(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_BYTES", 1000)
    assert post(server, "completions", {"prompt": "A" * 1000})[0] == 413
    assert post(server, "completions", {"prompt": "A" * 400})[0] == 200


def test_the_context_bounds_prompt_and_text(kangaroo: Kangaroo) -> None:
    with served(kangaroo, context=40) as server, server.client() as client:
        for prompt in ("A" * 40, "A" * 600):
            with pytest.raises(openai.BadRequestError, match="the prompt has") as refused:
                client.completions.create(model=kangaroo.name, prompt=prompt)
            assert refused.value.code == "context_length_exceeded"
        right = kangaroo.generate("A" * 30, max_new_tokens=10)
        answer = client.completions.create(model=kangaroo.name, prompt="A" * 30, max_tokens=500, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (right.text, "length")


def test_the_key(kangaroo: Kangaroo) -> None:
    with served(kangaroo, key="secret") as server:
        with server.client() as client:
            assert client.models.list().data[0].id == kangaroo.name
        for key in ("Secret", "secre", "secret ü"):
            status, _, told = post(server, "completions", {"prompt": "A"}, {"Authorization": f"Bearer {key}"})
            assert (status, told["error"]["code"]) == (401, "invalid_api_key")
        for path in ("completions", "chat/completions"):
            assert post(server, path, {"prompt": "A"})[0] == 401
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=server.url, api_key="x") as client:
            client.models.list()
        for path in ("health", "metrics"):
            assert urllib.request.urlopen(f"{server.url[:-3]}/{path}", timeout=60).status == 200


def test_a_conversation_runs_only_what_is_new(kangaroo: Kangaroo) -> None:
    """Two conversations take turns; each finds its own session again, though both begin alike."""
    with served(kangaroo) as server, server.client() as client:
        talks = [[*MESSAGES[:1], {"role": "user", "content": text * 20}] for text in "AB"]
        cached = []
        for _ in range(3):
            for talk in talks:
                right = kangaroo.chat(talk, max_new_tokens=9)
                answer = ask(client, True, kangaroo.name, messages=talk, temperature=0, max_tokens=9)
                assert answer.choices[0].message.content == right.text
                cached.append(answer.usage.prompt_tokens_details.cached_tokens)
                talk += [{"role": "assistant", "content": right.text}, {"role": "user", "content": "GO"}]
        before = [len(kangaroo.resolve(None, SETTINGS, talk[:2]).tokens) for talk in talks]
        assert all(count >= length for count, length in zip(cached[2:4], before, strict=True))
        assert cached[0] == cached[1] == 0 and cached[4] > cached[2] and cached[5] > cached[3]
        assert server.metrics()["kangaroo_cached_prompt_tokens_total"] == sum(cached)


def test_metrics(kangaroo: Kangaroo) -> None:
    with served(kangaroo) as server, server.client() as client:
        right = wanted(kangaroo, False, max_new_tokens=30)
        ask(client, False, kangaroo.name, temperature=0, max_tokens=30)
        post(server, "completions", {})
        found = server.metrics()
    assert found['kangaroo_requests_total{outcome="completed"}'] == 1
    assert found['kangaroo_requests_total{outcome="refused"}'] == 1
    assert found["kangaroo_prompt_tokens_total"] == 3
    assert found["kangaroo_generated_tokens_total"] == 30
    assert found["kangaroo_draft_tokens_total"] == right.stats.drafted
    assert found["kangaroo_accepted_draft_tokens_total"] == right.stats.accepted > 0
    assert found["kangaroo_mean_acceptance_length"] == pytest.approx(right.stats.mean_acceptance_length)
    for name in ("queue", "first_token", "request", "token"):
        assert found[f"kangaroo_{name}_seconds_count"] == 1


@pytest.mark.parametrize(
    ("device", "wanted"), [("cpu", [(0.0, None, 1)]), ("cuda", [(0.0, None, 2), (1.0, None, 2), (1.0, 0.9, 2)])]
)
def test_a_session_is_warm_before_the_first_client(device: str, wanted: list[Any]) -> None:
    """On a GPU, clients' usual kinds of texts have kernels and graphs of their own; a graph is captured in step two."""
    kangaroo, texts = Mock(), list[Any]()
    kangaroo.target.device.type, kangaroo.target.config.vocab_size = device, 9

    def progress(_: Any, temperature: float = 0.0, top_p: float | None = None, **given: Any) -> Any:
        assert given == {"max_new_tokens": 29, "ignore_eos": True}
        texts.append([temperature, top_p, 0])

        def steps() -> Iterator[None]:
            for _ in range(9):
                texts[-1][2] += 1
                yield

        return steps()

    kangaroo.session.return_value.progress = progress
    roomy_session(kangaroo, 30)
    assert [tuple(each) for each in texts] == wanted
