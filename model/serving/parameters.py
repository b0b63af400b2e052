"""OpenAI's parameters become ``Settings``; a parameter that is not served is refused by its name, never ignored.

The names are those of OpenAI's API reference; ``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos`` and
``min_tokens`` are named as in vLLM's server. docs/serving.md has the table.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import KangarooError
from ..number import is_number
from ..request import Settings
from .refused import RefusedError

COMMON = {"model", "stream", "stream_options", "stop", "seed", "logit_bias", "logprobs", "max_tokens", "min_tokens"}
COMMON |= {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "ignore_eos"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION = COMMON | {"prompt"}

LABELS = {"user", "safety_identifier", "prompt_cache_key", "metadata"}
"""They say who asks, and change no text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
}
"""Parameters that are not served, and what they may be all the same, since it asks for nothing."""

MESSAGE = {"role", "content", "name", "tool_call_id"}
"""What a message may have; the chat template reads it."""

OUR_NAMES = {
    "max_new_tokens": ("max_completion_tokens", "max_tokens"),
    "min_new_tokens": ("min_tokens",),
    "logprobs": ("top_logprobs", "logprobs"),
}
"""By the names of ``Settings``, those that a client may have used; the first that it gave is meant."""

TOKEN_ID = re.compile("0|[1-9][0-9]{0,17}")
"""A whole number as JSON has it; int() takes more: spaces, underscores, a sign, digits of other scripts."""

MOST_STOP_TEXTS = 64
"""The most texts that may end a text; each is looked for after every token. OpenAI takes four."""

COMPLETION_TOKENS = 16
"""How many tokens a completion has that names no limit, as in OpenAI's API."""


@dataclass(frozen=True)
class Asked:
    """What a client asked for.

    Attributes:
        prompt: a text or its tokens; None where there are messages.
        messages: of a conversation; None where there is a prompt.
        settings: checked.
        stream: whether the text is sent as it is written.
        include_usage: whether a stream ends with its counts.
    """

    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    settings: Settings
    stream: bool
    include_usage: bool

    @property
    def source(self) -> str:
        """The parameter that holds the text to continue."""
        return "prompt" if self.messages is None else "messages"


def read_parameters(body: Any, name: str, chat: bool, context: int) -> Asked:
    """Check a request's body.

    Args:
        body: JSON, parsed.
        name: the served model's.
        chat: whether it came to ``/v1/chat/completions``.
        context: the most tokens of a text, which ends a chat's answer that names no limit.

    Raises:
        RefusedError: anything that is not served.
    """
    if not isinstance(body, dict):
        raise RefusedError('the body is no JSON object; send one, such as {"model": ..., "prompt": ...}.')
    given = {key: value for key, value in body.items() if value is not None}  # null is OpenAI's word for the default
    check_model(given.pop("model", name), name)
    served = CHAT if chat else COMPLETION
    for key in [key for key in given if key not in served]:
        refuse_unless_neutral(key, given.pop(key))
    stream = _flag(given, "stream")
    prompt = None if chat else one_prompt(_required(given, "prompt"))
    messages = read_messages(_required(given, "messages")) if chat else None
    return Asked(prompt, messages, read_settings(given, chat, context), stream, include_usage(given, stream))


def wrong(param: str, sentence: str, code: str | None = None) -> RefusedError:
    """The error for a parameter."""
    return RefusedError(sentence, param=param, code=code)


def check_model(asked: object, name: str) -> None:
    """Raise unless the model that was asked for is the one that is served."""
    if asked != name:
        raise RefusedError(
            f"the model {asked!r} does not exist here; this server has {name!r}.", 404, "model", "model_not_found"
        )


def refuse_unless_neutral(key: str, value: object) -> None:
    """Raise unless a parameter that is not served asks for nothing."""
    if key in LABELS:
        return
    if key not in NEUTRAL:
        raise wrong(key, f"{key} is not supported by this server; leave it out.", "unsupported_parameter")
    if isinstance(value, bool) != isinstance(NEUTRAL[key][0], bool) or value not in NEUTRAL[key]:
        allowed = " or ".join(repr(each) for each in NEUTRAL[key])
        raise wrong(key, f"{key} is {value!r}; this server supports only {allowed}.", "unsupported_value")


def read_settings(given: Mapping[str, Any], chat: bool, context: int) -> Settings:
    """The settings among the parameters.

    Raises:
        RefusedError: one out of its range.
    """
    try:
        return Settings(
            max_new_tokens=_limit(given, context if chat else COMPLETION_TOKENS),
            temperature=given.get("temperature", 1.0),
            top_k=_unless_off(given, "top_k", 0, -1),
            top_p=given.get("top_p"),
            min_p=_unless_off(given, "min_p", 0),
            seed=_seed(given.get("seed")),
            repetition_penalty=given.get("repetition_penalty", 1.0),
            logit_bias=_biases(given.get("logit_bias", {})),
            stop=_stops(given.get("stop", [])),
            ignore_eos=given.get("ignore_eos", False),
            min_new_tokens=given.get("min_tokens", 0),
            logprobs=_logprobs(given) if chat else given.get("logprobs"),
        )
    except KangarooError as error:
        raise in_their_words(error, given) from error


def in_their_words(error: KangarooError, given: Mapping[str, Any]) -> RefusedError:
    """A setting's error under the names that the client used."""
    sentence = str(error)
    for ours, theirs in OUR_NAMES.items():
        sentence = sentence.replace(ours, next((name for name in theirs if name in given), theirs[-1]))
    return RefusedError(sentence, param=parameter_in(sentence, given))


def parameter_in(sentence: str, names: Container[str]) -> str | None:
    """The first of the names that the sentence says."""
    return next((word for word in re.findall(r"\w+", sentence) if word in names), None)


def include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    """Whether a stream shall end with its counts."""
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise wrong("stream_options", "stream_options was given without stream; give both or neither.")
    if not isinstance(options, dict):
        raise wrong("stream_options", f"stream_options is {options!r}; it must be an object.")
    for key in options:
        if key != "include_usage" and options[key] not in (None, False):
            raise wrong("stream_options", f"stream_options has {key!r}, which is not supported; leave it out.")
    return _flag(options, "include_usage", "stream_options.include_usage")


def one_prompt(prompt: Any) -> str | list[int]:
    """The prompt itself, or the only one of a list; what its tokens are worth is checked with the model."""
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    if several and len(prompt) > 1:
        raise wrong("prompt", f"prompt holds {len(prompt)} prompts; a request gets one text, so send each alone.")
    single = prompt[0] if several else prompt
    if not isinstance(single, str | list):
        raise wrong("prompt", f"prompt is {single!r}; it must be a text or a list of token ids.")
    return single


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with contents that are texts; a developer's are the system's."""
    if not isinstance(messages, list):
        raise wrong("messages", 'messages must be a list such as [{"role": "user", "content": "Hello!"}].')
    return [_read_message(index, message) for index, message in enumerate(messages)]


def _read_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise wrong(where, f"{where} is {message!r}; it must be an object with a role and a content.")
    filled = {key: value for key, value in message.items() if value not in (None, [])}
    for key in filled.keys() - MESSAGE:
        raise wrong(where, f"{where} has {key!r}, which is not supported; leave it out.")
    if isinstance(filled.get("content"), list):
        filled["content"] = "".join(_text_of(part, where) for part in filled["content"])
    if filled.get("role") == "developer":
        filled["role"] = "system"
    return filled


def _text_of(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise wrong(where, f"{where} has a content that is not text; this model reads text alone.")
    return text


def _required(given: Mapping[str, Any], key: str) -> Any:
    if key not in given:
        raise wrong(key, f"{key} is missing; give it.", "missing_required_parameter")
    return given[key]


def _flag(given: Mapping[str, Any], key: str, name: str | None = None) -> bool:
    value = given.get(key)
    if not isinstance(value, bool | None):
        raise wrong(name or key, f"{name or key} is {value!r}; it must be true or false.")
    return bool(value)


def _limit(given: Mapping[str, Any], otherwise: int) -> Any:
    """The most new tokens; a chat names them in either of two ways."""
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise wrong("max_tokens", f"max_tokens is {old!r} and max_completion_tokens is {new!r}; give one of them.")
    return next((limit for limit in (new, old) if limit is not None), otherwise)


def _unless_off(given: Mapping[str, Any], key: str, *off: int) -> Any:
    """A parameter; None where it is a number that turns it off."""
    value = given.get(key)
    return None if is_number(value) and value in off else value


def _seed(seed: Any) -> Any:
    """OpenAI's API takes any whole number; modulo 2^64 it is a seed, and -1 is 2^64 - 1."""
    return seed % (1 << 64) if type(seed) is int else seed


def _logprobs(given: Mapping[str, Any]) -> Any:
    """How many likely tokens a chat's log-probabilities name; None leaves them out."""
    if _flag(given, "logprobs"):
        return given.get("top_logprobs", 0)
    if "top_logprobs" in given:
        raise wrong("top_logprobs", "top_logprobs was given without logprobs; set logprobs to true.")
    return None


def _biases(biases: Any) -> dict[int, Any] | None:
    """The biases by token; JSON's keys are texts."""
    if not isinstance(biases, dict):
        raise wrong("logit_bias", f"logit_bias is {biases!r}; it must be an object from token ids to numbers.")
    for token in biases:
        if not TOKEN_ID.fullmatch(token):
            raise wrong("logit_bias", f"logit_bias has the key {token!r}; its keys must be token ids, such as '42'.")
    return {int(token): bias for token, bias in biases.items()} or None


def _stops(stops: Any) -> list[str]:
    texts = [stops] if isinstance(stops, str) else stops
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong("stop", f"stop is {stops!r}; it must be a text or a list of texts.")
    if len(texts) > MOST_STOP_TEXTS:
        raise wrong("stop", f"stop has {len(texts)} texts; give at most {MOST_STOP_TEXTS}.")
    return texts
