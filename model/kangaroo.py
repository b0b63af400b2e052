"""``Kangaroo``: load a target with what drafts for it, then generate."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.reference.top1_head import lm_head

from .drafters.kangaroo import KangarooDrafter
from .drafters.protocol import Drafter, check_drafter, check_loop
from .errors import KangarooError
from .load import load_pair
from .loop.host import reach_of
from .loop.threads import fastest_thread_count, threads
from .request import Request, Settings, check_prompt, resolve
from .results import Generation
from .session import Memory, Session, Writing
from .target.llama import Llama

MOST_IDLE = 8
"""The most memories that are kept for the next texts, with their caches and graphs; the oldest goes first."""


class Kangaroo:
    """A Llama model that decodes plainly or, with a drafter, several tokens a pass; the tokens are the same.

    Make one with ``from_pretrained``, or from a target and any drafter. It holds weights and defaults, which texts only
    read; each text is written in a session of its own, so any number of them may grow side by side, in one thread or in
    several. Steps take turns.

    Args:
        target: the model.
        drafter: proposes tokens (``drafters/protocol.py``); None means that all decoding is plain.
        tokenizer: the checkpoint's tokenizer; None where it has none, so that prompts must be lists of tokens.
        graphs: whether a GPU's iterations are captured in CUDA graphs; each session has its own.

    Raises:
        KangarooError: a drafter that this target's loop cannot run.
    """

    def __init__(
        self, target: Llama, drafter: Drafter | None = None, tokenizer: Any = None, graphs: bool = True
    ) -> None:
        if drafter is not None:
            check_drafter(drafter, target)
        self.target, self.drafter, self.tokenizer, self.graphs = target, drafter, tokenizer, graphs
        self._idle: deque[Memory] = deque(maxlen=MOST_IDLE)
        self._threads: int | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        exit_layer: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        kernels: str | None = None,
        graphs: bool = True,
        persistent: bool = False,
    ) -> "Kangaroo":
        """Load a Hugging Face Llama checkpoint and an adapter for it.

        Args:
            model: a folder, a hub name, or ``demo``: the bundled pair.
            adapter: a folder or a hub name; None allows only plain decoding, or takes the bundled pair's own adapter.
            exit_layer: overrides the adapter's own; needed for adapters that do not name it.
            device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
            dtype: what the weights are rounded to; None means float32 on a CPU and the checkpoint's own on a GPU. A CPU
                computes in float32 whatever it is; "float16" there makes a float32 checkpoint about twice as fast.
            kernels: ``triton`` or ``reference``; None means the Triton kernels on a GPU and the PyTorch references on a
                CPU. (``triton`` on a CPU needs TRITON_INTERPRET=1 in the environment, and is for tests.)
            graphs: capture iterations in CUDA graphs on a GPU; False launches kernel by kernel, for debuggers.
            persistent: on the kernels, draft in one persistent launch (``draft_loop``) instead of kernel by kernel. The
                references and requests with top-k, top-p or rejection sampling draft step by step all the same.

        Raises:
            KangarooError: in one sentence, what is wrong with the files or the settings.
        """
        loaded = load_pair(model, adapter, exit_layer, device, dtype, kernels)
        drafter = None
        if loaded.adapter is not None:
            drafter = KangarooDrafter(loaded.target, loaded.adapter, persistent)
        return cls(loaded.target, drafter, loaded.tokenizer, graphs)

    # ---- writing

    def session(self, length: int = 0) -> Session:
        """A session: memory for one text after another. There may be as many sessions as fit into the device's memory.

        Args:
            length: tokens of a text that the target's cache has room for at once; a session grows with its texts. Its
                ``nbytes`` says what it takes.
        """
        memory = self._new_memory()
        if length:
            with self.step():
                memory.cache.reserve(reach_of(length), length)
        return Session(self, memory)

    def generate(self, prompt: str | Sequence[int], settings: Settings | None = None, /, **keywords: Any) -> Generation:
        """Write a text to its end.

        Args:
            prompt: a text (needs the checkpoint's tokenizer) or its tokens.
            settings: all settings as one object; or give them by name, as in ``max_new_tokens=100, temperature=0.7``.
            keywords: ``max_new_tokens``, ``temperature``, ``top_k``, ``top_p``, ``seed``, ``num_speculative_tokens``,
                ``draft_confidence_threshold``, ``acceptance``, ``stop``, ``plain``; ``Settings`` explains each.

        Raises:
            KangarooError: a setting or prompt that cannot be used.
            TypeError: an unknown keyword.
        """
        return self.progress(prompt, settings, **keywords).finish()

    def stream(
        self, prompt: str | Sequence[int], settings: Settings | None = None, /, **keywords: Any
    ) -> Iterator[str]:
        """As ``generate``, yielding pieces of text as they are committed; joined, they are its ``text``.

        ``progress`` also gives the statistics and the reason of the end.
        """
        return (step.text for step in self.progress(prompt, settings, **keywords) if step.text)

    def progress(self, prompt: str | Sequence[int], settings: Settings | None = None, /, **keywords: Any) -> Writing:
        """As ``stream``, with the tokens and their origin beside each piece, and the ``Generation`` so far.

        The ``Generation`` of the last step is what ``generate`` returns; a prompt that fills the context has no step.
        """
        request = self.resolve(prompt, Settings.of(settings, keywords))
        return Writing(self, request, self._borrow, self._idle.append)

    def _new_memory(self) -> Memory:
        return Memory(self.target, self.drafter, self.graphs)

    def _borrow(self) -> Memory:
        """Memory for a text outside of any session: that of the text that ended last, or new memory."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._new_memory()

    def forget_idle(self) -> int:
        """Free the memories that are kept for the next texts; return how many there were."""
        count = len(self._idle)
        self._idle.clear()
        return count

    def resolve(self, prompt: str | Sequence[int], settings: Settings) -> Request:
        """Resolve a prompt and its settings for this model.

        Raises:
            KangarooError: a setting or prompt that cannot be used.
        """
        request = resolve(prompt, settings, self.target.config, self.tokenizer, self.drafter)
        if request.max_drafts:
            check_loop(self.drafter, self.target.backend.resident and not request.sampling.rejects)
        return request

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the model for one step, in inference mode and on the fastest number of threads."""
        with self.target.lock, torch.inference_mode():
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

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The target's teacher-forced logits: ``[T, V]`` float32."""
        hidden = self._run_all(tokens, self.target.config.num_hidden_layers)
        return self.target.logits(hidden)

    @torch.inference_mode()
    def draft_logits(self, tokens: Sequence[int]) -> Tensor:
        """The adapter's teacher-forced logits: ``[T, V]`` float32.

        Raises:
            KangarooError: without an adapter.
        """
        if not isinstance(self.drafter, KangarooDrafter):
            raise KangarooError("no adapter is loaded; give from_pretrained an adapter.")
        adapter = self.drafter.adapter
        exit_hidden = self._run_all(tokens, self.drafter.first_layer)
        cache = adapter.new_cache()
        cache.reserve(len(tokens))
        hidden = adapter.run(exit_hidden, cache, 0)
        return lm_head(hidden, adapter.norm, self.target.weights.head, eps=adapter.config.llama.rms_norm_eps)

    def _run_all(self, tokens: Sequence[int], layers: int) -> Tensor:
        checked = check_prompt(tokens, self.target.config)
        cache = self.target.new_cache()
        cache.reserve(len(checked))
        return self.target.run(self.target.embed(checked), cache, 0, 0, layers)
