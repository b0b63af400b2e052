"""The messages of a conversation become a prompt through the checkpoint's own chat template."""

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import KangarooError
from .text import check_characters

ROLES = ("system", "user", "assistant", "tool")


def chat_tokens(messages: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next answer begins.

    The template writes every special token itself, so the tokenizer adds none.

    Raises:
        KangarooError: messages that are none, a checkpoint without a template, or messages that the template refuses.
    """
    check_template(tokenizer)
    conversation = check_messages(messages)
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise KangarooError(f"the checkpoint's chat template refuses these messages ({reason}).") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_template(tokenizer: Any) -> None:
    """Raise unless the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise KangarooError(
            "this checkpoint has no chat template, which messages need; take a model that was trained to chat, or give "
            "a prompt."
        )


def check_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a list of their own; what they have besides a role and a content is for the template.

    Raises:
        KangarooError: no messages, one that has no role or no text, or an answer at the end.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise KangarooError(
            f"messages is {messages!r}; it must be a list such as [{{'role': 'user', 'content': 'Hello!'}}]."
        )
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    if not checked:
        raise KangarooError("messages is empty; give at least one message.")
    if checked[-1]["role"] == "assistant":
        raise KangarooError("the last message is the assistant's; end with the one that it shall answer.")
    return checked


def _check_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise KangarooError(f"message {index} is {message!r}; it must be a mapping with a role and a content.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise KangarooError(f"message {index} has the role {role!r}; it must be one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise KangarooError(f"message {index} has the content {content!r}; it must be a text.")
    check_characters(content, f"message {index}")
    return dict(message)
