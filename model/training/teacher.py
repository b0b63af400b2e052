"""The frozen target, through transformers: its states for windows of text, and the texts that it writes itself."""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..errors import KangarooError, reason
from .losses import in_chunks

FINAL = -1
"""Where the last layer's output is kept, among those of the exit layers."""


STAGE = 32
"""Tokens that texts are written by, side by side, before those that ended are left out."""


class Lesson(NamedTuple):
    """What an adapter learns from a window of T tokens.

    Attributes:
        exit_hidden: ``[T, E, hidden]`` bf16, the states of E exit layers; an adapter reads those of its own.
        final: ``[T, hidden]`` bf16, the last layer's output; norm and head make the target's distribution of it again.
        log_total: ``[T]`` float32, the logarithm of that softmax's denominator, over the whole vocabulary.
    """

    exit_hidden: Tensor
    final: Tensor
    log_total: Tensor


def bytes_per_token(hidden_size: int, exit_layers: int = 1) -> int:
    """Of a lesson: the exit layers' states and the final one in bf16, and a number."""
    return 2 * (exit_layers + 1) * hidden_size + 4


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bf16."""
    return torch.autocast(device.type, torch.bfloat16)


class Teacher:
    """The frozen target.

    Args:
        path: its folder, or its GGUF file.
        device: where it lives.
        dtype: of the weights and of what lies between the layers.
        exit_layers: whose inputs a lesson has, in this order; none for a target that only writes.
    """

    def __init__(
        self, path: Path, device: torch.device, dtype: torch.dtype = torch.float32, exit_layers: Sequence[int] = ()
    ) -> None:
        from transformers import AutoModelForCausalLM

        folder, how = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False, **how)
        except ImportError as error:
            raise KangarooError(f"transformers reads {path} with a package that is missing: {reason(error)}") from error
        self.model = model.to(device).eval().requires_grad_(False)
        # transformers hands the head a slice, and the product of a slice would first copy the head for every text
        self.model.lm_head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
        self.device, self.exit_layers = device, exit_layers
        self._kept: dict[int, Tensor] = {}
        for layer in exit_layers:
            self.model.model.layers[layer].register_forward_pre_hook(partial(self._keep, layer), with_kwargs=True)
        self.model.model.norm.register_forward_pre_hook(partial(self._keep, FINAL), with_kwargs=True)

    def _keep(self, layer: int, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._kept[layer] = args[0] if args else kwargs["hidden_states"]

    @property
    def head(self) -> Tensor:
        """The LM head ``[V, hidden]``."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens: ``[...]`` to ``[..., hidden]``."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens.to(self.device))
        return embedded

    @torch.no_grad()
    def normed(self, final: Tensor) -> Tensor:
        """The input of the head: ``[..., hidden]`` bf16, of the last layer's output."""
        normed: Tensor = self.model.model.norm(final).bfloat16()
        return normed

    @torch.no_grad()
    def lessons(self, rows: Sequence[Tensor]) -> list[Lesson]:
        """A lesson for each row of tokens, ``[T]`` of any lengths, in one pass.

        Shorter rows are padded at their end, where a causal model's earlier states do not see it.
        """
        with autocast(self.device):
            padded = pad_sequence(list(rows), batch_first=True).to(self.device)
            self.model.model(input_ids=padded, use_cache=False)
        final, head, lessons = self._kept[FINAL].bfloat16(), self.head.bfloat16(), []
        exit_hidden = torch.stack([self._kept[layer] for layer in self.exit_layers], dim=2).bfloat16()
        for index, row in enumerate(rows):
            own, shallow = final[index, : len(row)].clone(), exit_hidden[index, : len(row)].clone()
            normed = self.normed(own)
            totals = [F.linear(normed[part], head).float().logsumexp(-1) for part in in_chunks(own)]
            lessons.append(Lesson(shallow, own, torch.cat(totals)))
        return lessons

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], most: int, stops: Collection[int], **sampling: Any
    ) -> list[list[int]]:
        """New tokens for each prompt, side by side, up to ``most`` of them or a stop token, which is left out.

        Args:
            prompts: of any lengths; they are padded at their beginning and the padding is masked.
            most: new tokens.
            stops: the tokens that end a text. The others go on without it, after at most 32 more tokens.
            sampling: transformers' own settings; none of them means greedy.
        """
        longest, end = max(map(len, prompts)), list(stops) or None
        tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        mask, going, cache = mask.to(self.device), torch.arange(len(prompts)), None
        kept = going
        texts: list[list[int]] = [[] for _ in prompts]
        for at in range(longest, longest + most, STAGE):
            reach = min(at + STAGE, longest + most)
            cache = self._roomier(cache, kept, at, reach)
            tokens = self.model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=reach - at,
                eos_token_id=end,
                pad_token_id=end[0] if end else 0,
                do_sample=bool(sampling),
                past_key_values=cache,
                disable_compile=True,  # on a GPU a static cache would have it compiled: minutes for seconds of work
                **sampling,
            )
            rows = tokens[:, longest:].tolist()
            ends = [next((place for place, token in enumerate(row) if token in stops), None) for row in rows]
            for index, row, ended in zip(going.tolist(), rows, ends, strict=True):
                texts[index] = row[:ended]
            kept = torch.tensor([place for place, ended in enumerate(ends) if ended is None], dtype=torch.int64)
            if not len(kept):
                break
            going, tokens, mask = going[kept], tokens[kept], F.pad(mask[kept], (0, reach - at), value=1)
        return texts

    def _roomier(self, cache: Any, kept: Tensor, length: int, reach: int) -> Any:
        """A static cache of ``reach`` positions, with the rows ``kept`` of ``cache``: all tokens but the newest.

        A cache that grows token by token is copied at every step, and attention reads one of full size to its end.
        """
        from transformers import StaticCache

        larger: Any = StaticCache(self.model.config, max_cache_len=reach)
        for layer, old in zip(larger.layers, [] if cache is None else cache.layers, strict=False):
            keys, values = old.keys[kept, :, : length - 1], old.values[kept, :, : length - 1]
            layer.lazy_initialization(keys, values)
            layer.keys[:, :, : length - 1], layer.values[:, :, : length - 1] = keys, values
            layer.cumulative_length.fill_(length - 1)
        return larger
