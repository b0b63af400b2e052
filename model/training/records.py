"""Files of texts and of conversations, read record by record.

A ``.json``, ``.jsonl`` or ``.ndjson`` file has a record a line, or is a list of them. A record is a conversation,
OpenAI's (``{"messages": [{"role": "user", "content": ...}, ...]}``) or ShareGPT's (``{"conversations": [{"from":
"human", "value": ...}, ...]}``), or a text (``{"text": ...}``). Every other file is one text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..chat import ROLES
from ..errors import KangarooError
from ..text import check_characters

Message = dict[str, str]
"""A turn of a conversation, ``role`` and ``content``, as chat templates take it."""

SHAREGPT_ROLES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")
"""Who speaks in ShareGPT's files, as chat templates call them."""
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
FORMS = '{"messages": [...]}, {"conversations": [...]} or {"text": "..."}'


def read_text(file: Path) -> str:
    """A whole file, less the mark of byte order that Windows programs put before it.

    Raises:
        KangarooError: it is missing or not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise KangarooError(f"data file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise KangarooError(f"data file {file} is not UTF-8 text (byte {error.start}).") from error


def read_records(file: Path) -> Iterator[tuple[str, str | list[Message]]]:
    """Each text or conversation of a file, with its place for error messages.

    Raises:
        KangarooError: a file that cannot be read, or a record that is neither; its line or number is named.
    """
    content = read_text(file)
    if file.suffix.lower() not in JSON_SUFFIXES:
        yield str(file), content
        return
    for place, record in _json_records(file, content):
        yield place, _parse(record, place)


def _json_records(file: Path, content: str) -> Iterator[tuple[str, Any]]:
    is_list = content.lstrip().startswith("[")
    parts = [content] if is_list or _is_one_object(content) else content.split("\n")
    for line, part in enumerate(parts, 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:
            at = line + getattr(error, "lineno", 1) - 1
            raise KangarooError(f"{file}, line {at}: no JSON; each line must be a record like {FORMS}.") from error
        if is_list:
            yield from ((f"{file}, record {number}", record) for number, record in enumerate(value, 1))
        else:
            yield f"{file}, line {line}", value


def _is_one_object(content: str) -> bool:
    """Whether an object takes several lines, so that no line is a record."""
    try:
        return content.count("\n") > 1 and isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):  # several records, or damaged ones
        return False


def _parse(record: Any, place: str) -> str | list[Message]:
    """A record's text, or its conversation as chat templates take it, which may have no turns."""
    fields = record if isinstance(record, dict) else {}
    if isinstance(fields.get("text"), str):
        check_characters(fields["text"], place)
        return str(fields["text"])
    for name, role_name, content_name in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = fields.get(name)
        if not isinstance(turns, list):
            continue
        messages: list[Message] = []
        for number, turn in enumerate(turns, 1):
            role, content = (turn.get(key) if isinstance(turn, dict) else None for key in (role_name, content_name))
            if not isinstance(role, str) or not isinstance(content, str):
                raise KangarooError(
                    f'{place}: turn {number} must be {{"{role_name}": "...", "{content_name}": "..."}}.'
                )
            role = SHAREGPT_ROLES.get(role.lower(), role.lower())
            if role not in ROLES:
                raise KangarooError(
                    f"{place}: turn {number} is by {turn[role_name]!r}; it must be by {', '.join(SHAREGPT_ROLES)} or "
                    f"{', '.join(ROLES)}."
                )
            check_characters(content, place)
            if messages or role != "assistant":  # some begin with answers to nothing, which templates may refuse
                messages.append({"role": role, "content": content})
        return messages
    raise KangarooError(f"{place}: no text and no conversation; a record must be like {FORMS}.")
