"""transformers' own decoding of the same prompts: greedy, and assisted by our drafter."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import KangarooError
from ..integrations.assistant import assistant
from ..kangaroo import Kangaroo
from ..load import resolve_dtype
from ..loop.threads import fastest_thread_count, threads
from ..named import find_pair
from ..request import Settings
from ..target.hub import GGUF, find_model
from ..text import decode
from .answers import Turn

TRANSFORMERS, ASSISTED = "transformers", "transformers-assisted"


class TransformersWay:
    """Greedy text by ``model.generate``, on the number of threads that is fastest for it; an ``OtherDecoder``.

    Args:
        model: as transformers loaded it.
        kangaroo: gives the tokens that end a text, and turns tokens into text.
        helper: transformers' assistant model; None decodes without one.
    """

    def __init__(self, model: Any, kangaroo: Kangaroo, helper: Any = None) -> None:
        self.model, self.kangaroo, self.helper = model, kangaroo, helper
        self._threads: int | None = None

    @torch.inference_mode()
    def __call__(self, prompt: list[int], settings: Settings) -> Turn:
        """The answer. transformers does not tell prefill from steps: all of its time counts as the steps'."""
        row = torch.tensor([prompt], device=self.model.device)
        if self._threads is None and row.device.type == "cpu":
            self._threads = fastest_thread_count(lambda: self.model(row[:, :1]))
        ends = sorted(self.kangaroo.resolve(prompt, settings).stop_tokens)
        with threads(self._threads), watched(self.model) as passes:
            wall, processor = time.perf_counter(), time.process_time()
            whole = self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=min(settings.max_new_tokens, self.kangaroo.target.config.context_length - len(prompt)),
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=0,
                **({} if self.helper is None else {"assistant_model": self.helper}),
            )
            tokens = whole[0, len(prompt) :].tolist()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
        text = decode(self.kangaroo.tokenizer, tokens)
        lengths, drafted, accepted = steps_of(passes, len(prompt), len(tokens))
        return Turn(text, tokens, lengths, drafted, drafted, accepted, 0.0, wall, processor)  # it drafts one by one


@contextmanager
def watched(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The passes that a model makes meanwhile: of each, how many positions its cache holds, and how many it runs."""
    passes: list[tuple[int, int]] = []

    def look(_: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        passes.append((0 if cache is None else int(cache.get_seq_length()), given["input_ids"].shape[1]))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def steps_of(passes: list[tuple[int, int]], prompt: int, new: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, drafts and accepted drafts of each pass.

    When a pass begins, the cache holds every token but the newest; before the first, it holds none.
    """
    known = [prompt, *(held + 1 for held, _ in passes[1:]), prompt + new]
    lengths = [after - before for before, after in pairwise(known)]
    drafted = [held + run - before for (held, run), before in zip(passes, known, strict=False)]
    return lengths, drafted, [min(length - 1, count) for length, count in zip(lengths, drafted, strict=True)]


def transformers_ways(
    kangaroo: Kangaroo, model: str | Path, adapter: str | Path | None, dtype: str | None
) -> tuple[dict[str, TransformersWay], str]:
    """The ways in which transformers decodes a model, by name, and a sentence about one that is missing.

    Args:
        kangaroo: the same model as loaded here.
        model: as for ``Kangaroo.from_pretrained``, as ``adapter``.
        adapter: of the assistant.
        dtype: what the weights are rounded to, likewise.

    Raises:
        KangarooError: transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM

    model, adapter = find_pair(model, adapter)
    path = find_model(model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == GGUF:
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=kangaroo.target.dtype)
    except (ImportError, OSError, ValueError) as error:
        raise KangarooError(f"transformers cannot load {path}: {' '.join(str(error).split())}") from error
    loaded = loaded.eval().to(kangaroo.target.device)
    if dtype is not None:
        rounded = resolve_dtype(dtype, kangaroo.target.device, kangaroo.target.dtype)
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(rounded).to(parameter.dtype)
    ways = {TRANSFORMERS: TransformersWay(loaded, kangaroo)}
    if adapter is None:
        return ways, "There is no assisted generation, which needs an adapter."
    try:
        ways[ASSISTED] = TransformersWay(loaded, kangaroo, assistant(loaded, adapter))
    except KangarooError as error:
        return ways, f"There is no assisted generation: {error}"
    return ways, ""
