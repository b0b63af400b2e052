"""Pairs as data; docs/LOG.md, section 9, derives the size of ``large`` from what its minutes can compute."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from demo_corpus import Document, installed_documents, stdlib_documents
from target_training import TargetRecipe

from kangaroo_kernels.model.evaluation.calibrate import Calibration


@dataclass(frozen=True)
class Preset:
    """Everything of a pair.

    Attributes:
        adapter: settings of its training, by the names of ``TrainingSettings``.
        own_texts: how many texts the target writes for it, and ``own_at_once``, how many of them side by side.
        minutes: the time of a run, unless the caller says otherwise.
        within_minutes: every stage ends by its share of the minutes, whatever the ones before took. Otherwise the
            minutes are for training alone, and other work takes its time.
        needs_gpu: whether a CPU must be asked for by name.
        sources: reads what there is to learn from.
        sample: tokenizer and adapter learn from the beginning of it, so many characters.
        held_out_tokens: on which the target is measured.
        target_steps: where the target's training ends if its time does not end it before.
        prompts: how many held-out ones go with the pair; None keeps those of the bundled pair.
        prompt_characters: of a prompt, at least.
        encoded_by: the shares of the minutes at which encoding, the target and the adapter end.
    """

    target: TargetRecipe
    adapter: Mapping[str, Any]
    calibration: Calibration
    minutes: float
    within_minutes: bool = True
    needs_gpu: bool = False
    sources: Callable[[], list[Document]] = installed_documents
    sample: float = math.inf
    own_texts: int = 2048
    own_at_once: int = 64
    held_out_tokens: int = 1 << 19
    target_steps: float = math.inf
    prompts: int | None = 64
    prompt_characters: int = 1200
    encoded_by: float = 0.12
    target_by: float = 0.69
    adapter_by: float = 0.90


DEMO = Preset(
    target=TargetRecipe(),
    adapter={
        "exit_layer": 4,
        "num_attention_heads": 8,
        "learning_rate": 2e-2,
        "batch_size": 8,
        "reuse": 8,
        "sequence_length": 256,
    },
    own_texts=704,
    calibration=Calibration(),
    minutes=85.0,
    within_minutes=False,
    sources=stdlib_documents,
    prompts=None,
    prompt_characters=480,
    encoded_by=0.0,
    target_by=72 / 85,
    adapter_by=1.0,
)

LARGE = Preset(
    target=TargetRecipe(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=2560,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        context=1024,
        short_context=1024,  # one length all along: another would compile the layers again
        batch_tokens=65536,
        pass_tokens=16384,  # 20 GB of activations even if the layers do not compile: a card of 40 GB holds it
        muon_lr=2e-3,
        adamw_lr=1.5e-3,
        warmup_share=0.02,
    ),
    adapter={
        "exit_layer": 4,
        "num_attention_heads": 32,
        "learning_rate": 8e-3,
        "batch_size": 64,
        "sequence_length": 256,
    },
    own_texts=4096,
    own_at_once=1024,
    calibration=Calibration(lengths=(4, 3, 6, 2), thresholds=(0.6, 0.4, 0.8), max_new_tokens=96, finalists=0),
    minutes=8.0,
    needs_gpu=True,
    sample=40_000_000,
)

SMOKE = Preset(
    target=TargetRecipe(
        vocab_size=512,
        num_hidden_layers=4,
        context=256,
        short_context=32,
        batch_tokens=512,
        pass_tokens=256,
    ),
    adapter={"exit_layer": 1, "sequence_length": 32, "steps": 30},
    own_texts=16,
    calibration=Calibration(lengths=(3,), thresholds=(0.2, 0.6), max_new_tokens=16, finalists=0),
    minutes=0.5,
    sources=partial(installed_documents, packages=("asyncio", "unittest")),
    sample=100_000,
    held_out_tokens=8192,
    target_steps=40,
    prompts=2,
    prompt_characters=160,
)

PRESETS = {"demo": DEMO, "large": LARGE, "smoke": SMOKE}
