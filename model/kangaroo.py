"""``Kangaroo``: load a target with what drafts for it, then generate."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .chat import chat_tokens
from .drafters.kangaroo import KangarooDrafter
from .drafters.make import make_drafter
from .drafters.prompt_lookup import PromptLookup
from .drafters.protocol import Drafter, check_drafter, check_loop
from .errors import KangarooError
from .load import load_pair
from .loop.pace import Paces
from .loop.prefill import reach_of
from .loop.threads import fastest_thread_count, own_state, threads
from .number import is_whole
from .request import Request, Settings, check_prompt, resolve
from .session import Memory, Session, Writing
from .target.llama import Llama
from .writer import Messages, Prompt, Writer

MOST_IDLE = 8
"""The most memories that are kept for the next texts, with their caches and graphs; the oldest goes first."""


class Kangaroo(Writer):
    """A Llama model that decodes plainly or, with a drafter, several tokens a pass; the tokens are the same.

    Make one with ``from_pretrained``, or from a target and any drafter. It holds weights and defaults, which texts only
    read; each text is written in a session of its own, so any number of them may grow side by side, in one thread or in
    several. Steps take turns.

    Args:
        target: the model.
        drafter: proposes tokens (``drafters/protocol.py``); None means that all decoding is plain.
        tokenizer: the checkpoint's tokenizer; None where it has none, so that prompts must be lists of tokens.
        graphs: whether a GPU's iterations are captured in CUDA graphs; each session has its own.
        name: what ``repr`` calls the model.

    Raises:
        KangarooError: a drafter that this target's loop cannot run.
    """

    def __init__(
        self,
        target: Llama,
        drafter: Drafter | None = None,
        tokenizer: Any = None,
        graphs: bool = True,
        name: str = "model",
    ) -> None:
        if drafter is not None:
            check_drafter(drafter, target)
        self.target, self.drafter, self.tokenizer, self.graphs = target, drafter, tokenizer, graphs
        self.name = name
        self._idle: deque[Memory] = deque(maxlen=MOST_IDLE)
        self._threads: int | None = None
        self.paces: Paces = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        exit_layer: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        kernels: str | None = None,
        graphs: bool = True,
        persistent: bool = False,
        kv_dtype: str | torch.dtype | None = None,
        prompt_lookup: bool | None = None,
        draft_tree: int | None = None,
    ) -> "Kangaroo":
        """Load a checkpoint and an adapter for it.

        Args:
            model: a Hugging Face folder; a GGUF file, or a folder with one; a hub name, ``owner/name`` or
                ``owner/name/file.gguf``; ``demo``, the bundled pair; or ``smollm2``, SmolLM2-135M-Instruct.
            adapter: a folder or a hub name. None takes the model's own adapter (``smollm2`` and ``demo`` have one);
                other models then draft by prompt lookup.
            exit_layer: overrides the adapter's own; needed for adapters that do not name it.
            device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
            dtype: what the weights are rounded to; None means float32 on a CPU and the checkpoint's own on a GPU
                (bfloat16 where they are quantized). A CPU computes in float32 whatever it is; "float16" there makes a
                float32 or quantized checkpoint about twice as fast.
            kernels: ``triton`` or ``reference``; None means the Triton kernels on a GPU and the PyTorch references on a
                CPU. (``triton`` on a CPU needs TRITON_INTERPRET=1 in the environment, and is for tests.)
            graphs: capture iterations in CUDA graphs on a GPU; False launches kernel by kernel, for debuggers.
            persistent: on the kernels, draft in one persistent launch (``draft_loop``) instead of kernel by kernel,
                where that is possible; ``KangarooDrafter`` says where drafts are made step by step all the same.
            kv_dtype: "float16" rounds the keys and values that a CPU's texts keep, which halves their memory; it
                goes with ``dtype="float16"``. None keeps them in float32.
            prompt_lookup: beside an adapter, also draft what followed the text's last tokens before, where that
                promises more; in a tree, as a branch of it, too. Not with ``persistent``. Without an adapter nothing
                else drafts.
            draft_tree: draft trees of at most this many tokens, 1 to 15, instead of chains (0); needs an adapter.
                ``num_speculative_tokens`` then bounds the length of a branch. Where this or ``prompt_lookup`` is None,
                the adapter's ``config.json`` decides; without an entry there, and with ``persistent=True``, the adapter
                drafts chains and alone.

        Raises:
            KangarooError: in one sentence, what is wrong with the files or the settings.
        """
        loaded = load_pair(
            model,
            adapter,
            exit_layer=exit_layer,
            device=device,
            dtype=dtype,
            kernels=kernels,
            kv_dtype=kv_dtype,
            draft_tree=draft_tree,
            prompt_lookup=prompt_lookup,
            persistent=persistent,
        )
        if loaded.adapter is None:
            drafter: Drafter = PromptLookup(loaded.target)
        else:
            drafter = make_drafter(loaded.target, loaded.adapter, loaded.way, persistent)
        return cls(loaded.target, drafter, loaded.tokenizer, graphs, name=str(model))

    def __repr__(self) -> str:
        config = self.target.config
        shape = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.vocab_size} tokens"
        drafter = "no drafter" if self.drafter is None else type(self.drafter).__name__
        where = f"{str(self.target.dtype).removeprefix('torch.')} on {self.target.device}"
        return f"<Kangaroo {self.name}: {shape}; {drafter}; {where}>"

    # ---- writing

    def session(self, length: int = 0) -> Session:
        """A session: memory for one text after another. There may be as many sessions as fit into the device's memory.

        Args:
            length: tokens of a text that the target's cache has room for at once; a session grows with its texts. Its
                ``nbytes`` says what it takes.

        Raises:
            KangarooError: a length that no text of this model can have.
        """
        most = self.target.config.context_length
        if not is_whole(length) or not 0 <= length <= most:
            raise KangarooError(f"length is {length!r}; it must be a whole number of tokens, at most {most}.")
        memory = self._new_memory()
        if length:
            with self.step():
                memory.cache.reserve(reach_of(length), length)
        return Session(self, memory)

    def _write(self, prompt: Prompt | None, messages: Messages | None, settings: Settings) -> Writing:
        return Writing(self, self.resolve(prompt, settings, messages), self._borrow, self._idle.append)

    def _new_memory(self) -> Memory:
        return Memory(self.target, self.drafter, self.graphs)

    def _borrow(self) -> Memory:
        """Memory for a text outside of any session: that of the text that ended last, or new memory.

        Either is begun anew, so that such a text depends on its request alone, to the last bit.
        """
        try:
            memory = self._idle.pop()
        except IndexError:
            return self._new_memory()
        memory.forget()
        return memory

    def forget_idle(self) -> int:
        """Free the memories that are kept for the next texts; return how many there were."""
        count = len(self._idle)
        self._idle.clear()
        return count

    def resolve(self, prompt: Prompt | None, settings: Settings, messages: Messages | None = None) -> Request:
        """Resolve a prompt, or messages in its place, and their settings for this model.

        Raises:
            KangarooError: a setting, prompt or message that cannot be used.
            TypeError: a prompt and messages at once.
        """
        if messages is not None:
            if prompt is not None:
                raise TypeError("got both a prompt and messages; give one of them.")
            prompt = chat_tokens(messages, self.tokenizer)
        elif prompt is None:
            raise KangarooError("the prompt is None; it must be a text or a list of tokens, or give messages.")
        request = resolve(prompt, settings, self.target.config, self.tokenizer, self.drafter)
        if self.drafter is not None and request.max_drafts:
            check_loop(self.drafter, self.target.backend.resident and not request.led_by_host)
        return request

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the model for one step, on the fastest number of threads, whatever PyTorch's state for the caller is."""
        with self.target.lock, own_state(self.target.device):
            if self._threads is None and self.target.device.type == "cpu" and not self.target.backend.resident:
                self._threads = self._measure_threads()
            with threads(self._threads):
                yield

    def _measure_threads(self) -> int:
        """The number of threads that runs a token through all layers fastest, over a scratch cache."""
        target = self.target
        cache = target.new_cache()
        cache.reserve(1)
        hidden, layers = target.embed([0]), target.config.num_hidden_layers
        return fastest_thread_count(lambda: target.logits(target.run(hidden, cache, 0, 0, layers)))

    # ---- looking inside

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The target's teacher-forced logits: ``[T, V]`` float32."""
        with own_state(self.target.device):
            hidden = self._run_all(tokens, self.target.config.num_hidden_layers)
            return self.target.logits(hidden)

    def draft_logits(self, tokens: Sequence[int]) -> Tensor:
        """The adapter's teacher-forced logits: ``[T, V]`` float32, -inf for tokens that it does not draft.

        Raises:
            KangarooError: without an adapter.
        """
        if not isinstance(self.drafter, KangarooDrafter):
            raise KangarooError("no adapter is loaded; give from_pretrained an adapter.")
        adapter = self.drafter.adapter
        with own_state(self.target.device):
            exit_hidden = self._run_all(tokens, self.drafter.first_layer)
            states = None
            if adapter.state is not None:
                final = self._run_all(tokens, self.target.config.num_hidden_layers)
                states = torch.nn.functional.pad(final[:-1], (0, 0, 1, 0))
            cache = adapter.new_cache()
            cache.reserve(len(tokens))
            return adapter.head.logits(adapter.run(exit_hidden, cache, 0, states))

    def _run_all(self, tokens: Sequence[int], layers: int) -> Tensor:
        checked = check_prompt(tokens, self.target.config)
        cache = self.target.new_cache()
        cache.reserve(len(checked))
        return self.target.run(self.target.embed(checked), cache, 0, 0, layers)
