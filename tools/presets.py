"""Pairs as data.

``demo`` is the bundled one, in an hour and a half on two CPU cores. ``large`` takes minutes on one GPU, and ``smoke``
seconds on a CPU.

How large ``large`` is, follows from what its minutes can compute. An H200 gives 989 TFLOP/s of dense bf16 on paper.
Reading, encoding and compiling leave the target about 280 seconds of 8 minutes, at 40 % of the paper's figure 1.1e17
operations. At 6 a parameter and token, and a tenth more for attention, these are 63M tokens for 268M parameters; the
installed sources have about 50M. Fewer parameters would end at a lower loss, but a few hundred million are wanted, so
that what decoding streams is no toy's. Deep and narrow: a draft at exit layer 4 reads 67M weights of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from calibrate import Calibration
from demo_corpus import Document, installed_documents, stdlib_documents
from target_training import TargetRecipe


@dataclass(frozen=True)
class Preset:
    """Everything of a pair.

    Attributes:
        adapter: settings of its training, by the names of ``TrainingSettings``.
        minutes: the time of a run, unless the caller says otherwise, and the least that makes sense.
        within_minutes: every stage ends by its share of the minutes, whatever the ones before took. Otherwise the
            minutes are for training alone, other work takes its time, and a stopped run goes on.
        needs_gpu: whether a CPU must be asked for by name.
        sources: reads what there is to learn from; tokenizer and adapter learn from so many characters of it.
        held_out_tokens: on which the target is measured at the end; on the way it is ``probes`` times, on fewer.
        target_steps: where the target's training ends if its time does not end it before.
        prompts: how many held-out ones go with the pair; None keeps those of the bundled pair.
        practice: how many prompts of training files the defaults are found on.
        encoded_by: the shares of the minutes at which encoding, the target, the adapter and the calibration end.
    """

    target: TargetRecipe
    adapter: Mapping[str, Any]
    calibration: Calibration
    minutes: float
    within_minutes: bool = True
    least_minutes: float = 0.0
    needs_gpu: bool = False
    sources: Callable[[], list[Document]] = installed_documents
    tokenizer_characters: float = math.inf
    adapter_characters: float = math.inf
    held_out_tokens: int = 1 << 19
    probe_tokens: int = 1 << 17
    probes: int = 12
    target_steps: float = math.inf
    prompts: int | None = 64
    practice: int = 3
    prompt_characters: int = 1200
    encoded_by: float = 0.12
    target_by: float = 0.69
    adapter_by: float = 0.90
    calibrated_by: float = 0.98


DEMO = Preset(
    target=TargetRecipe(),
    adapter={
        "exit_layer": 4,
        "num_attention_heads": 8,
        "learning_rate": 2e-2,
        "batch_size": 8,
        "reuse": 8,
        "sequence_length": 256,
        "generated_windows": 704,
    },
    calibration=Calibration(),
    minutes=85.0,
    within_minutes=False,
    sources=stdlib_documents,
    probe_tokens=1 << 15,
    probes=24,
    prompts=None,
    practice=6,
    prompt_characters=480,
    encoded_by=0.0,
    target_by=72 / 85,
    adapter_by=1.0,
    calibrated_by=1.0,
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
        "generated_windows": 4096,
        "generated_at_once": 1024,
    },
    calibration=Calibration(lengths=(4, 3, 6, 2), thresholds=(0.6, 0.4, 0.8), new_tokens=96, finalists=0),
    minutes=8.0,
    least_minutes=3.0,
    needs_gpu=True,
    tokenizer_characters=24_000_000,
    adapter_characters=40_000_000,
)

SMOKE = Preset(
    target=TargetRecipe(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        context=256,
        short_context=32,
        batch_tokens=512,
        pass_tokens=256,
        muon_lr=1e-2,
        adamw_lr=1e-2,
    ),
    adapter={
        "exit_layer": 1,
        "num_attention_heads": 4,
        "learning_rate": 2e-2,
        "batch_size": 8,
        "sequence_length": 32,
        "generated_windows": 16,
        "generated_at_once": 8,
        "steps": 30,
    },
    calibration=Calibration(lengths=(3,), thresholds=(0.2, 0.6), new_tokens=16, finalists=0),
    minutes=0.5,
    sources=partial(installed_documents, packages=("asyncio", "unittest")),
    tokenizer_characters=200_000,
    adapter_characters=60_000,
    held_out_tokens=4096,
    probe_tokens=1024,
    target_steps=40,
    prompts=2,
    practice=1,
    prompt_characters=160,
)

PRESETS = {"demo": DEMO, "large": LARGE, "smoke": SMOKE}
