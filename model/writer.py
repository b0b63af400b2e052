"""The ways in which a caller reads a text: at once, in pieces or step by step, in loops and in ``async for`` loops."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .request import Settings
from .results import Generation, Progress

if TYPE_CHECKING:
    from .session import Writing

Item = TypeVar("Item")
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

_END = object()


class BothWays(Iterator[Item]):
    """An iterator that ``async for`` reads, too: a thread waits for each item, so the event loop goes on.

    A task that is cancelled while it waits closes the iterator. Any number of tasks may read iterators of their own.
    """

    def close(self) -> None:
        """End it where it is; a step under way is waited for."""
        raise NotImplementedError

    def __aiter__(self) -> "BothWays[Item]":
        return self

    async def __anext__(self) -> Item:
        try:
            item: Any = await asyncio.to_thread(next, self, _END)
        except asyncio.CancelledError:
            await asyncio.to_thread(self.close)
            raise
        if item is _END:
            raise StopAsyncIteration
        return item  # type: ignore[no-any-return]


class Pieces(BothWays[str]):
    """The pieces of a text as they are committed; ``close`` ends the text."""

    def __init__(self, steps: BothWays[Progress]) -> None:
        self._steps = steps

    def __next__(self) -> str:
        return next(step.text for step in self._steps if step.text)

    def close(self) -> None:
        """End the text where it is; a step under way is waited for."""
        self._steps.close()


class Writer:
    """What ``Kangaroo`` and ``Session`` have in common: four ways to ask for a text."""

    def generate(
        self,
        prompt: Prompt | None = None,
        /,
        settings: Settings | None = None,
        *,
        messages: Messages | None = None,
        **keywords: Any,
    ) -> Generation:
        """Write a text to its end.

        Args:
            prompt: a text (needs the checkpoint's tokenizer) or its tokens.
            settings: all settings as one object; or give them by name, as in ``max_new_tokens=100, temperature=0.7``.
            messages: of a conversation, in the place of the prompt; see ``chat``.
            keywords: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``seed``,
                ``repetition_penalty``, ``logit_bias``, ``stop``, ``ignore_eos``, ``min_new_tokens``, ``timeout``,
                ``logprobs``, ``num_speculative_tokens``, ``draft_confidence_threshold``, ``acceptance``, ``plain``;
                ``Settings`` explains each.

        Raises:
            KangarooError: a setting, prompt or message that cannot be used; a ``TooLongError`` for a prompt of more
                tokens than the context holds, where a chat can leave out its oldest messages.
            TypeError: an unknown keyword; a prompt and messages at once.
        """
        return self.progress(prompt, settings, messages=messages, **keywords).finish()

    def chat(self, messages: Messages, settings: Settings | None = None, **keywords: Any) -> Generation:
        """Write the assistant's answer to a conversation, whose prompt the checkpoint's chat template makes.

        Args:
            messages: ``[{"role": "user", "content": "Hello!"}]``. Roles are ``system``, ``user``, ``assistant`` and
                ``tool``; a content is a text. The answer is the next message.
            settings: as for ``generate``.
            keywords: as for ``generate``.

        Raises:
            KangarooError: as ``generate``; a message that is none, or one that the template refuses; a checkpoint
                without a template.
            TypeError: an unknown keyword.
        """
        return self.generate(settings=settings, messages=messages, **keywords)

    def stream(
        self,
        prompt: Prompt | None = None,
        /,
        settings: Settings | None = None,
        *,
        messages: Messages | None = None,
        **keywords: Any,
    ) -> Pieces:
        """As ``generate``, yielding pieces of text as they are committed; joined, they are its ``text``.

        ``for`` and ``async for`` read it, and ``close()`` ends the text. ``progress`` also gives the statistics and the
        reason of the end.
        """
        return Pieces(self.progress(prompt, settings, messages=messages, **keywords))

    def progress(
        self,
        prompt: Prompt | None = None,
        /,
        settings: Settings | None = None,
        *,
        messages: Messages | None = None,
        **keywords: Any,
    ) -> "Writing":
        """As ``stream``, with the tokens and their origin beside each piece, and the ``Generation`` so far.

        The ``Generation`` of the last step is what ``generate`` returns; a prompt that fills the context has no step.
        """
        return self._write(prompt, messages, Settings.of(settings, keywords))

    def _write(self, prompt: Prompt | None, messages: Messages | None, settings: Settings) -> "Writing":
        """The text that a prompt or messages ask for; exactly one of the two is given."""
        raise NotImplementedError
