"""Steps and texts as the objects of OpenAI's API: whole answers, and the chunks of a stream."""

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from ..request import Request
from ..results import Generation, Progress, TokenLogprobs

REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""OpenAI's names for a text's end; the context's end is a length, too."""

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens that have a name and no text."""
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


class Answer:
    """One text, in the form of a chat's answer or of a completion.

    Args:
        chat: which of the two.
        model: the served name.
        request: what is being written.
        tokenizer: tells the texts of single tokens for log-probabilities; None where the checkpoint has none.
    """

    def __init__(self, chat: bool, model: str, request: Request, tokenizer: Any) -> None:
        self.chat, self.request = chat, request
        self._kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"
        self._head = {"id": name, "object": self._kind, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._before = request.tokens[-1]  # the token before the next one, which the next one's text depends on
        self._offset = 0
        self._special = frozenset() if request.logprobs is None else special_tokens(tokenizer)

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The text that was written, with its counts."""
        text = generation.text
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = self._choice(said, generation.logprobs, REASONS[generation.finish_reason or "stop"])
        return {**self._head, "choices": [choice], "usage": self.usage(generation)}

    def chunks(self, step: Progress, first: bool) -> Iterator[dict[str, Any]]:
        """A step of a stream; a step that leaves nothing to say for now has no chunk."""
        logprobs = step.commit.logprobs
        if not first and not step.text and not logprobs:
            return
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": step.text}} if self.chat else {"text": step.text}
        yield self._chunk([self._choice(said, logprobs, None)])

    def last_chunks(self, generation: Generation, include_usage: bool) -> Iterator[dict[str, Any]]:
        """The chunk that says why the text ended, and that of its counts."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        yield self._chunk([self._choice(said, None, REASONS[generation.finish_reason or "stop"])])
        if include_usage:
            yield {**self._chunk([]), "usage": self.usage(generation)}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The counts of a text."""
        prompt, new = len(self.request.tokens), len(generation.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": generation.stats.cached_tokens},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self.chat else self._kind
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, said: dict[str, Any], logprobs: list[TokenLogprobs] | None, reason: str | None) -> dict[str, Any]:
        given = None
        if logprobs is not None:
            given = self._chat_logprobs(logprobs) if self.chat else self._completion_logprobs(logprobs)
        return {"index": 0, **said, "logprobs": given, "finish_reason": reason}

    def _chat_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        content = []
        for entry in logprobs:
            top = [self._alternative(token, logprob) for token, logprob in entry.top.items()]
            content.append({**self._alternative(entry.token, entry.logprob), "top_logprobs": top})
            self._before = entry.token
        return {"content": content, "refusal": None}

    def _completion_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        tokens, values, tops, offsets = [], [], [], []
        for entry in logprobs:
            text = self._text(entry.token)
            tokens.append(text)
            values.append(max(entry.logprob, LEAST_LOGPROB))
            tops.append({self._text(token): max(logprob, LEAST_LOGPROB) for token, logprob in entry.top.items()})
            tops[-1][text] = values[-1]
            offsets.append(self._offset)
            self._offset += 0 if entry.token in self._special else len(text)
            self._before = entry.token
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _alternative(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        whole = "\ufffd" not in text  # a part of a character has bytes that a text does not tell
        return {
            "token": text,
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(text.encode()) if whole else None,
        }

    def _text(self, token: int) -> str:
        """What a token adds to the text: some tokenizers drop the space of a token that stands alone."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        before, both = (
            str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for tokens in ([self._before], [self._before, token])
        )
        if both.startswith(before):
            return both[len(before) :]
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
