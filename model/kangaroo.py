"""``Kangaroo``: load a target with its adapter, then generate."""

import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS, MAX_STOPS, WIDEST_HEAD
from kangaroo_kernels.reference.top1_head import lm_head

from .backend import REFERENCES, load_operations
from .demo import find_pair
from .drafters.adapter import (
    PAPER_DRAFT_CONFIDENCE_THRESHOLD,
    PAPER_NUM_SPECULATIVE_TOKENS,
    Adapter,
    load_adapter_config,
)
from .drafters.kangaroo import Drafter
from .errors import KangarooError
from .loop.decode import (
    Commit,
    DecodeStats,
    device_steps,
    kangaroo_steps,
    plain_steps,
    prefill,
)
from .loop.graphs import GraphRunner
from .loop.iteration import Iteration
from .loop.state import TextState
from .loop.threads import fastest_thread_count, threads
from .sampling import Chooser, Sampling, is_number, is_whole
from .target.config import DTYPES, load_config
from .target.llama import Llama
from .target.weights import find_folder, load_target
from .text import TextStream, load_tokenizer


@dataclass(frozen=True)
class Generation:
    """What a decode gave.

    Attributes:
        text: the new text, without special tokens, cut before a stop string.
        tokens: the new tokens, a stop token included.
        stats: counts and times.
        finish_reason: ``length`` (``max_new_tokens`` reached), ``stop`` or ``context`` (the model can take no more).
    """

    text: str
    tokens: list[int]
    stats: DecodeStats
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


@dataclass(frozen=True)
class Progress:
    """One committed step as a caller sees it while it runs.

    Attributes:
        commit: its tokens and where they come from.
        pieces: what each of its tokens added to the text; empty while a character is incomplete.
    """

    commit: Commit
    pieces: list[str]
    _outcome: "_Outcome"

    @property
    def generation(self) -> Generation:
        """Everything by now; why it ended is known with the last step."""
        return self._outcome.generation()

    @property
    def text(self) -> str:
        """What the step added to the text."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class _Request:
    """A checked call of ``generate``."""

    tokens: list[int]
    length: int
    limited_by_context: bool
    sampling: Sampling
    num_speculative_tokens: int
    draft_confidence_threshold: float
    stop_tokens: frozenset[int]
    stop_strings: tuple[str, ...]
    plain: bool


@dataclass
class _Outcome:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)
    finish_reason: str = "length"

    def generation(self) -> Generation:
        """What there is by now; later steps leave it as it is."""
        stats = replace(self.stats, accepted_at=list(self.stats.accepted_at))
        return Generation(self.text, list(self.tokens), stats, self.finish_reason)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU where there is one.

    Raises:
        KangarooError: a name that is none, or a GPU that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise KangarooError(f"device {device!r} is unknown; use 'cpu' or 'cuda'.") from error
    if resolved.type not in ("cpu", "cuda"):
        raise KangarooError(f"device {device!r} is not supported; use 'cpu' or 'cuda'.")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise KangarooError("device 'cuda' was asked for, but PyTorch sees no CUDA GPU here.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise KangarooError(
            f"device {device!r} does not exist; PyTorch sees {torch.cuda.device_count()} CUDA GPUs here."
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype asked for; else float32 on a CPU and the checkpoint's own on a GPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else stored
    resolved = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise KangarooError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
    return resolved


def check_lengths(max_new_tokens: int, num_speculative_tokens: int | None, threshold: float | None) -> None:
    """Hold the settings of a decode against their ranges; None stands for an adapter's own.

    Raises:
        KangarooError: one that is out of its range.
    """
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise KangarooError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1.")
    gamma, eta, most = num_speculative_tokens, threshold, MAX_SPECULATIVE_TOKENS
    if gamma is not None and (not is_whole(gamma) or not 1 <= gamma <= most):
        raise KangarooError(f"num_speculative_tokens is {gamma!r}; it must be a whole number from 1 to {most}.")
    if eta is not None and (not is_number(eta) or not 0 <= eta <= 1):
        raise KangarooError(f"draft_confidence_threshold is {eta!r}; it must be a number from 0 to 1.")


def check_tokens(tokens: Iterable[object], vocab_size: int) -> list[int]:
    """The tokens as a list of plain numbers.

    Raises:
        KangarooError: one that is not a whole number of the vocabulary.
    """
    checked = []
    for token in tokens:
        try:
            value = operator.index(token)  # type: ignore[arg-type]
        except TypeError:
            value = -1
        if not 0 <= value < vocab_size or isinstance(token, bool):
            raise KangarooError(f"token {token!r} is not a whole number from 0 to {vocab_size - 1}.")
        checked.append(value)
    return checked


class Kangaroo:
    """A Llama model that decodes plainly or, with an adapter, several tokens a pass; the tokens are the same.

    Make one with ``from_pretrained``. An instance serves one text at a time.

    Attributes:
        target: the model.
        drafter: the shallow layers with the adapter; None without one.
        tokenizer: the checkpoint's tokenizer; None where it has none, and prompts are token lists.
        runner: holds the device's buffers and graphs, and counts their bytes (``captured_bytes``, ``buffer_bytes``).
        graphs: whether a GPU's iterations are captured.
        persistent: whether the kernels draft in one launch.
    """

    def __init__(
        self,
        target: Llama,
        drafter: Drafter | None = None,
        tokenizer: Any = None,
        graphs: bool = True,
        persistent: bool = False,
    ) -> None:
        widest = max(each.head_dim for each in (target.config, *([drafter.adapter.config.llama] if drafter else [])))
        if persistent and target.device.type == "cuda" and (target.dtype == torch.float32 or widest > WIDEST_HEAD):
            raise KangarooError(
                f"persistent=True drafts in float16 or bfloat16 with heads of at most {WIDEST_HEAD}, this model is "
                f"{target.dtype} with heads of {widest}; leave persistent out."
            )
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.graphs, self.persistent = graphs, persistent
        self.runner = GraphRunner(target.device, graphs)
        self._cache = target.new_cache()
        self._adapter_cache = drafter.adapter.new_cache() if drafter is not None else None
        self._text: TextState | None = None  # whose keys and values the caches hold
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
            adapter: a folder or a hub name; None allows plain decoding alone, but for the bundled pair, which has one.
            exit_layer: overrides the adapter's own; needed for adapters that do not name it.
            device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
            dtype: of the weights; None means float32 on a CPU and the checkpoint's own on a GPU.
            kernels: ``triton`` or ``reference``; None means the Triton kernels on a GPU and the PyTorch references on a
                CPU. (``triton`` on a CPU needs TRITON_INTERPRET=1 in the environment, and is for tests.)
            graphs: capture iterations in CUDA graphs on a GPU; False launches kernel by kernel, for debuggers.
            persistent: on the kernels, draft in one persistent launch (``draft_loop``) instead of kernel by kernel;
                nothing to the references, nor with top-k, top-p or rejection sampling, which draft step by step.

        Raises:
            KangarooError: in one sentence, what is wrong with the files or the settings.
        """
        where = resolve_device(device)
        model, adapter = find_pair(model, adapter)
        if exit_layer is not None and adapter is None:
            raise KangarooError("exit_layer was given without an adapter; give both or neither.")
        folder = find_folder(model, "model")
        config = load_config(folder)
        adapter_folder = None if adapter is None else find_folder(adapter, "adapter")
        if adapter_folder is not None:  # before the long work of loading the target
            load_adapter_config(adapter_folder, config, exit_layer)
        precision = resolve_dtype(dtype, where, config.dtype)
        operations = load_operations(kernels, where, precision)
        weights = load_target(folder, config, where, precision, operations.layout)
        target = Llama(config, weights, operations)
        drafter = None
        if adapter_folder is not None:
            drafter = Drafter(target, Adapter.load(adapter_folder, target, exit_layer))
        return cls(target, drafter, load_tokenizer(folder), graphs, persistent)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """The target's teacher-forced logits: ``[T, V]`` float32."""
        hidden = self._run_all(tokens, self.target.config.num_hidden_layers)
        return self.target.logits(hidden)

    @torch.inference_mode()
    def draft_logits(self, tokens: Sequence[int]) -> Tensor:
        """The drafter's teacher-forced logits: ``[T, V]`` float32.

        Raises:
            KangarooError: without an adapter.
        """
        drafter = self._require_drafter()
        adapter = drafter.adapter
        exit_hidden = self._run_all(tokens, drafter.exit_layer)
        cache = adapter.new_cache()
        cache.reserve(len(tokens))
        hidden = adapter.run(exit_hidden, cache, 0)
        return lm_head(hidden, adapter.norm, self.target.weights.head, eps=adapter.config.llama.rms_norm_eps)

    def _run_all(self, tokens: Sequence[int], layers: int) -> Tensor:
        checked = self._check_prompt_tokens(tokens)
        cache = self.target.new_cache()
        cache.reserve(len(checked))
        return self.target.run(self.target.embed(checked), cache, 0, 0, layers)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        num_speculative_tokens: int | None = None,
        draft_confidence_threshold: float | None = None,
        acceptance: str = "coupled",
        stop: Sequence[str | int] | str = (),
        plain: bool = False,
    ) -> Generation:
        """Generate up to ``max_new_tokens`` tokens.

        Args:
            prompt: a text (needs the checkpoint's tokenizer) or its tokens.
            max_new_tokens: reached exactly unless a stop or the context's end comes first.
            temperature: 0 is greedy.
            top_k: sample among this many tokens.
            top_p: sample within this share of the probability.
            seed: of the sampling noise; the same seed gives the same text, with Kangaroo and without.
            num_speculative_tokens: the most drafts a step, 1 to 15; None takes the adapter's default.
            draft_confidence_threshold: drafting stops below it, 0 to 1; None takes the adapter's default.
            acceptance: ``coupled`` (same tokens as plain sampling) or ``rejection`` (same distribution).
            stop: strings or token ids that end the text, besides the model's own end-of-text tokens.
            plain: decode without drafting.

        Raises:
            KangarooError: a setting or prompt that cannot serve.
        """
        request = self._request(
            prompt,
            max_new_tokens,
            Sampling(temperature, top_k, top_p, seed, acceptance),
            num_speculative_tokens,
            draft_confidence_threshold,
            stop,
            plain,
        )
        outcome = _Outcome()
        for _ in self._decode(request, outcome):
            pass
        return outcome.generation()

    def stream(self, prompt: str | Sequence[int], *, max_new_tokens: int, **settings: Any) -> Iterator[str]:
        """As ``generate``, yielding pieces of text as they are committed; joined, they are its ``text``.

        Statistics and the reason of the end are had from ``progress``.
        """
        steps = self.progress(prompt, max_new_tokens=max_new_tokens, **settings)
        return (step.text for step in steps if step.text)

    def progress(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        num_speculative_tokens: int | None = None,
        draft_confidence_threshold: float | None = None,
        stop: Sequence[str | int] | str = (),
        plain: bool = False,
        **sampling: Any,
    ) -> Iterator[Progress]:
        """As ``stream``, with the tokens and their origin beside each piece, and the ``Generation`` so far.

        The last step's is what ``generate`` returns; a prompt that fills the context has no step.
        """
        unknown = sampling.keys() - {field.name for field in fields(Sampling)}
        if unknown:
            raise TypeError(f"got an unexpected keyword argument {min(unknown)!r}; Kangaroo.generate lists them all.")
        request = self._request(
            prompt,
            max_new_tokens,
            Sampling(**sampling),
            num_speculative_tokens,
            draft_confidence_threshold,
            stop,
            plain,
        )
        return self._decode(request, _Outcome())

    def _require_drafter(self) -> Drafter:
        if self.drafter is None:
            raise KangarooError("no adapter is loaded; give from_pretrained an adapter, or decode with plain=True.")
        return self.drafter

    def _check_prompt_tokens(self, tokens: Sequence[int]) -> list[int]:
        if isinstance(tokens, bytes) or not isinstance(tokens, Iterable):
            raise KangarooError(f"the prompt is {tokens!r}; it must be a text or a list of tokens.")
        checked = check_tokens(tokens, self.target.config.vocab_size)
        context = self.target.config.context_length
        if not checked:
            raise KangarooError("the prompt is empty; give at least one token.")
        if len(checked) > context:
            raise KangarooError(f"the prompt has {len(checked)} tokens, the model's context holds {context}.")
        return checked

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return self._check_prompt_tokens(prompt)
        if self.tokenizer is None:
            raise KangarooError("this checkpoint has no tokenizer; give the prompt as a list of tokens.")
        if not prompt:
            raise KangarooError("the prompt is empty; give at least one character.")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise KangarooError("the prompt holds a lone surrogate, which is no character; give valid Unicode text.")
        return self._check_prompt_tokens(self.tokenizer(prompt)["input_ids"])

    def _request(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        num_speculative_tokens: int | None,
        draft_confidence_threshold: float | None,
        stop: Sequence[str | int] | str,
        plain: bool,
    ) -> _Request:
        gamma, eta = PAPER_NUM_SPECULATIVE_TOKENS, PAPER_DRAFT_CONFIDENCE_THRESHOLD
        if not plain:
            defaults = self._require_drafter().adapter.config
            gamma, eta = defaults.num_speculative_tokens, defaults.draft_confidence_threshold
        if num_speculative_tokens is not None:
            gamma = num_speculative_tokens
        if draft_confidence_threshold is not None:
            eta = draft_confidence_threshold
        check_lengths(max_new_tokens, gamma, eta)
        if isinstance(stop, str):
            stop = (stop,)
        if isinstance(stop, bytes | Mapping) or not isinstance(stop, Iterable):
            raise KangarooError(f"stop is {stop!r}; it must be a list of strings and token ids.")
        stops = tuple(stop)
        strings = tuple(entry for entry in stops if isinstance(entry, str))
        if strings and self.tokenizer is None:
            raise KangarooError("stop strings need a tokenizer, and this checkpoint has none; give token ids.")
        if any(not entry for entry in strings):
            raise KangarooError("a stop string is empty; give at least one character.")
        config = self.target.config
        stop_ids = check_tokens([entry for entry in stops if not isinstance(entry, str)], config.vocab_size)
        ends = frozenset(stop_ids) | frozenset(config.eos_token_ids)
        if len(ends) > MAX_STOPS:
            raise KangarooError(f"there are {len(ends)} stop tokens; give at most {MAX_STOPS}.")
        tokens = self._prompt_tokens(prompt)
        length = len(tokens) + max_new_tokens
        return _Request(
            tokens,
            min(length, config.context_length),
            length > config.context_length,
            sampling,
            gamma,
            float(eta),
            ends,
            strings,
            plain,
        )

    def _decode(self, request: _Request, outcome: _Outcome) -> Iterator[Progress]:
        """Run a request to its end, keeping ``outcome`` up to date with every step."""
        steps = self._steps(request, outcome)
        text = TextStream(self.tokenizer, request.stop_strings)
        outcome.finish_reason = "context" if request.limited_by_context else "length"
        for step in steps:
            commit = step
            pieces = []
            for token in commit.tokens:
                pieces.append(text.push(token))
                if text.stopped:
                    break
            kept = len(pieces)
            if kept < len(commit.tokens):
                commit = Commit(
                    commit.tokens[:kept], min(commit.accepted, kept), commit.drafted, commit.agreed, stopped=True
                )
            outcome.tokens += commit.tokens
            outcome.stats.count(commit)
            if commit.stopped or text.stopped or len(request.tokens) + len(outcome.tokens) == request.length:
                pieces[-1] += text.finish()
            if text.stopped or commit.stopped:
                outcome.finish_reason = "stop"
            outcome.text += "".join(pieces)
            yield Progress(commit, pieces, outcome)
            if text.stopped:
                return

    def _steps(self, request: _Request, outcome: _Outcome) -> Iterator[Commit]:
        """The commits of a request, timed; each step runs in inference mode with the fastest number of threads."""
        drafter = None if request.plain else self._require_drafter()
        state = self._text = TextState(list(request.tokens), self._cache, self._adapter_cache)
        if self._threads is None and self.target.device.type == "cpu" and self.target.operations is REFERENCES:
            self._threads = self._measure_threads()
        began = time.perf_counter()
        with torch.inference_mode(), threads(self._threads):
            prefill(self.target, drafter, state, request.length, request.num_speculative_tokens)
            steps = self._loop(request, drafter, state)
            if self.target.device.type == "cuda":
                torch.cuda.synchronize(self.target.device)  # the prefill's time is its own
        outcome.stats.prefill_seconds = time.perf_counter() - began
        while True:
            if self._text is not state:
                raise KangarooError(
                    "another text was begun on this Kangaroo before this one ended; it serves one at a time, so load "
                    "a second one."
                )
            began = time.perf_counter()
            with torch.inference_mode(), threads(self._threads):
                commit = next(steps, None)
            outcome.stats.decode_seconds += time.perf_counter() - began
            if commit is None:
                return
            yield commit

    def _loop(self, request: _Request, drafter: Drafter | None, state: TextState) -> Iterator[Commit]:
        """The loop that suits what decodes: on the device where kernels run, led by the host otherwise."""
        target, sampling, stop_tokens = self.target, request.sampling, request.stop_tokens
        if target.operations.kernels == "triton" and not sampling.rejects:
            iteration = Iteration(
                target,
                drafter.adapter if drafter is not None else None,
                state,
                sampling,
                max_drafts=request.num_speculative_tokens if drafter is not None else 0,
                threshold=request.draft_confidence_threshold,
                stop_tokens=sorted(stop_tokens),
                length=request.length,
                runner=self.runner,
                persistent=self.persistent,
            )
            return device_steps(iteration, self.runner, state, length=request.length)
        chooser = Chooser(sampling, target.operations)
        if drafter is None:
            return plain_steps(target, state, chooser, length=request.length, stop_tokens=stop_tokens)
        return kangaroo_steps(
            target,
            drafter,
            state,
            chooser,
            length=request.length,
            num_speculative_tokens=request.num_speculative_tokens,
            draft_confidence_threshold=request.draft_confidence_threshold,
            stop_tokens=stop_tokens,
        )

    @torch.inference_mode()
    def _measure_threads(self) -> int:
        """The number of threads that runs a token through all layers fastest, over a scratch cache."""
        target = self.target
        cache = target.new_cache()
        cache.reserve(1)
        hidden = target.embed([0])
        layers = target.config.num_hidden_layers
        return fastest_thread_count(lambda: target.logits(target.run(hidden, cache, 0, 0, layers)))
