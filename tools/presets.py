"""Pairs that train in one go: ``large`` in minutes on one GPU, ``smoke`` in seconds on a CPU, by the same code.

How large ``large`` is, follows from what its minutes can compute. An H200 gives 989 TFLOP/s of dense bf16 on paper.
Reading, encoding and compiling leave the target about 280 seconds of 8 minutes, at 40 % of the paper's figure 1.1e17
operations. At 6 a parameter and token, and a tenth more for attention, these are 63M tokens for 268M parameters; the
installed sources have about 50M. Fewer parameters would end at a lower loss, but a few hundred million are wanted, so
that what decoding streams is no toy's. Deep and narrow: a draft at exit layer 4 reads 67M weights of them.
"""

from dataclasses import dataclass

from target_training import TargetRecipe


@dataclass(frozen=True)
class AdapterRecipe:
    """The adapter's training; the names are those of ``TrainingSettings``.

    Attributes:
        characters: of training files that it reads.
    """

    exit_layer: int
    num_attention_heads: int
    learning_rate: float
    batch_size: int
    sequence_length: int
    generated_windows: int
    generated_at_once: int
    characters: int
    steps: int | None = None


@dataclass(frozen=True)
class CalibrationRecipe:
    """Which draft lengths and thresholds are tried, on how many prompts of training files."""

    lengths: tuple[int, ...]
    thresholds: tuple[float, ...]
    prompts: int
    new_tokens: int


@dataclass(frozen=True)
class Preset:
    """Everything of a pair but its time.

    Attributes:
        minutes: the time of a run, unless the caller says otherwise.
        least_minutes: with less, reading the sources would be most of it.
        needs_gpu: whether a CPU must be asked for by name.
        packages: folders of the standard library to learn from; none stands for all installed sources.
        max_characters: of all sources.
        tokenizer_characters: of those that the tokenizer is trained on.
        held_out_tokens: on which the target is measured at the end, and ``probe_tokens`` on the way.
        target_steps: where the target's training ends if its time does not end it before.
        prompts: held-out prompts that go with the pair, of ``prompt_characters`` each.
        encoded_by: the shares of the minutes at which encoding, the target, the adapter and the calibration end.
    """

    target: TargetRecipe
    adapter: AdapterRecipe
    calibration: CalibrationRecipe
    minutes: float
    least_minutes: float = 0.0
    needs_gpu: bool = False
    packages: tuple[str, ...] = ()
    max_characters: int = 240_000_000
    tokenizer_characters: int = 24_000_000
    held_out_tokens: int = 1 << 19
    probe_tokens: int = 1 << 17
    target_steps: int | None = None
    prompts: int = 64
    prompt_characters: int = 1200
    encoded_by: float = 0.12
    target_by: float = 0.69
    adapter_by: float = 0.90
    calibrated_by: float = 0.98


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
    adapter=AdapterRecipe(
        exit_layer=4,
        num_attention_heads=32,
        learning_rate=8e-3,
        batch_size=64,
        sequence_length=256,
        generated_windows=4096,
        generated_at_once=1024,
        characters=40_000_000,
    ),
    calibration=CalibrationRecipe(lengths=(4, 3, 6, 2), thresholds=(0.6, 0.4, 0.8), prompts=3, new_tokens=96),
    minutes=8.0,
    least_minutes=3.0,
    needs_gpu=True,
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
    adapter=AdapterRecipe(
        exit_layer=1,
        num_attention_heads=4,
        learning_rate=2e-2,
        batch_size=8,
        sequence_length=32,
        generated_windows=16,
        generated_at_once=8,
        characters=60_000,
        steps=30,
    ),
    calibration=CalibrationRecipe(lengths=(3,), thresholds=(0.2, 0.6), prompts=1, new_tokens=16),
    minutes=0.5,
    packages=("asyncio", "unittest"),
    tokenizer_characters=200_000,
    held_out_tokens=4096,
    probe_tokens=1024,
    target_steps=40,
    prompts=2,
    prompt_characters=160,
)

PRESETS = {"large": LARGE, "smoke": SMOKE}
