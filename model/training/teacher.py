"""The frozen target: its hidden states and logits for windows of text, and the windows that it writes itself.

The target runs through transformers, a batch of windows at a time; a hook takes the exit layer's hidden states as they
pass.
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import GENERATED_FILE, write_atomically
from .data import random_windows
from .settings import ProgressReport, TrainingSettings


class Teacher:
    """The frozen target, giving the exit layer's hidden states and the final logits of a batch in one pass.

    ``dtype`` is that of the weights and of what lies between the layers: the one in which the runtime will decode.
    """

    def __init__(self, folder: Path, exit_layer: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self._exit_hidden = torch.empty(0)
        self.model.model.layers[exit_layer].register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._exit_hidden = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T]`` tokens to exit hidden states ``[B, T, hidden]`` and logits ``[B, T, V]``, both float32."""
        logits = self.model(input_ids=windows.to(self.device), use_cache=False).logits
        return self._exit_hidden.float(), logits.float()

    @property
    def head(self) -> Tensor:
        """The LM head ``[V, hidden]``."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    @torch.no_grad()
    def continue_text(self, prompts: Tensor, length: int, sample: bool) -> Tensor:
        """``[B, P]`` prompts to ``[B, length]`` windows, written on without stopping at an end-of-text token."""
        settings: dict[str, Any] = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        )
        written: Tensor = self.model.generate(
            prompts.to(self.device),
            attention_mask=torch.ones_like(prompts, device=self.device),
            max_new_tokens=length - prompts.shape[1],
            min_new_tokens=length - prompts.shape[1],
            pad_token_id=0,
            cache_implementation="static",  # a growing cache is copied at every step
            disable_compile=True,  # on a GPU a static cache would have it compiled: minutes for seconds of work
            **settings,
        )
        return written.cpu()


class Lessons:
    """The target's outputs for the latest ``capacity`` windows, kept so that several steps can learn from them."""

    def __init__(self, capacity: int) -> None:
        self.kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=capacity)

    def draw(
        self, exit_hidden: Tensor, logits: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Keep the windows of a batch and draw ``count`` of all; a batch of ``count`` windows comes back as it is."""
        if len(exit_hidden) == count:
            return exit_hidden, logits
        self.kept.extend(zip(exit_hidden.bfloat16(), logits.bfloat16(), strict=True))
        drawn = [self.kept[index] for index in torch.randint(len(self.kept), (count,), generator=generator).tolist()]
        return torch.stack([pair[0] for pair in drawn]).float(), torch.stack([pair[1] for pair in drawn]).float()


def generate_windows(
    teacher: Teacher,
    tokens: Tensor,
    settings: TrainingSettings,
    progress: ProgressReport,
    deadline: float = math.inf,
) -> Tensor:
    """The target's continuations of random places in the text: ``[generated_windows, sequence_length]``.

    A quarter of each window is the text's; the rest is greedy and sampled by turns. Groups are kept in ``out`` as they
    come, so that a stopped run can go on. After ``deadline`` only a first group is begun, so there may be fewer.
    """
    path = settings.out / GENERATED_FILE
    done = list(torch.load(path, weights_only=True)) if path.exists() else []
    group = settings.generated_at_once
    while (written := sum(map(len, done))) < settings.generated_windows:
        if done and time.perf_counter() > deadline:
            break
        generator = torch.Generator().manual_seed(settings.seed + 1 + len(done))
        prompts = random_windows(tokens, group, max(1, settings.sequence_length // 4), generator)
        torch.manual_seed(settings.seed + 1 + len(done))
        done.append(teacher.continue_text(prompts, settings.sequence_length, sample=len(done) % 2 == 1))
        write_atomically(path, done)
        progress("generating", written + group, settings.generated_windows, "")
    return torch.cat(done)[: settings.generated_windows]
