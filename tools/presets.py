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
        minutes: the time of a whole run, unless the caller says otherwise.
        sample: tokenizer and adapter learn from the beginning of the sources, so many characters.
        held_out_tokens: on which the target is measured.
        target_steps: where the target's training ends if its time does not end it before.
        prompts: how many held-out ones go with the pair, of ``prompt_characters`` at least.
        target_by: the share of the minutes at which the target's training ends, whatever was before it; likewise
            ``adapter_by``, behind which is the calibration.
    """

    target: TargetRecipe
    adapter: Mapping[str, Any]
    calibration: Calibration
    minutes: float
    needs_gpu: bool = False
    sources: Callable[[], list[Document]] = installed_documents
    sample: float = math.inf
    own_texts: int = 2048
    own_at_once: int = 64
    held_out_tokens: int = 1 << 19
    target_steps: float = math.inf
    prompts: int = 64
    prompt_characters: int = 1200
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
    minutes=90.0,
    sources=stdlib_documents,
    prompts=8,
    prompt_characters=480,
    target_by=72 / 90,
    adapter_by=85 / 90,
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
