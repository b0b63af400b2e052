"""The model card beside an adapter: what it is for, how to use it, how it was made, and its figures."""

from pathlib import Path
from typing import Any

from ..evaluation.plots import BLUE, DPI, can_draw, new_axes
from .settings import TrainingSettings

CARD = """\
---
library_name: kangaroo-kernels
{base}tags:
- speculative-decoding
- kangaroo
---

# A Kangaroo adapter for {model}

With this adapter, Kangaroo Kernels decodes {model} in fewer passes and writes the same tokens
([Kangaroo, arXiv 2404.18911](https://arxiv.org/abs/2404.18911)). It is {form} behind the model's first
{exit_layer} layers, has {parameters:,} parameters, and is of no use to another model.

```
kangaroo generate --model {use} --adapter . --prompt "..." --compare
```

| on held-out data | |
|---|---|
{figures}

It was trained in {steps:,} steps on {positions:,} positions, counting repetitions. `training.json` has every setting,
the loss over time and these figures. The drafter decides speed alone: no token of the text depends on it.
"""
PICTURE = "\n![The loss over the steps](curve.png)\n"

FIGURES = {
    "agreement": "drafter and model rank the same token first",
    "agreement_on_learned_windows": "the same on texts that it learned from",
    "expected_acceptance_length": "mean acceptance length that follows from it",
    "mean_acceptance_length": "mean acceptance length, measured in greedy decoding",
    "plain_tokens_per_second": "tokens/s, plain decoding",
    "kangaroo_tokens_per_second": "tokens/s, Kangaroo",
    "speedup": "speedup over plain decoding, on the machine of the training",
}


def write_card(settings: TrainingSettings, report: dict[str, Any]) -> None:
    """Write ``README.md`` into the adapter's folder."""
    name = Path(settings.model).name
    on_hub = settings.model.count("/") == 1 and not Path(settings.model).exists()
    figures = [f"| {meaning} | {report[figure]:,} |" for figure, meaning in FIGURES.items() if figure in report]
    card = CARD.format(
        base=f"base_model: {settings.model}\n" if on_hub else "",
        model=name,
        use=settings.model if on_hub else name,
        exit_layer=settings.exit_layer,
        form=describe(settings),
        parameters=report["parameters"],
        figures="\n".join(figures),
        steps=report["steps"],
        positions=report["positions"],
    )
    if draw_curve(settings.out / "curve.png", report["curve"]):
        card += PICTURE
    (settings.out / "README.md").write_text(card, encoding="utf-8")


def describe(settings: TrainingSettings) -> str:
    """The adapter's form in words."""
    form = f"a layer with an MLP of {inner}" if (inner := settings.intermediate_size) else "one layer of attention"
    size, rank, block, trained = settings.parts
    more = [
        *([f"a deep state of {size}"] if size else []),
        *([f"a head of rank {rank}"] if rank else []),
        *([f"blocks of {block} drafts"] if block else []),
        *(["a trained confidence"] if trained else []),
    ]
    return f"{form}, with {' and '.join(more)}," if more else form


def draw_curve(file: Path, curve: list[dict[str, float]]) -> bool:
    """Draw the loss over the steps; False where matplotlib, an optional package, is not installed."""
    if not can_draw():
        return False
    figure, axes = new_axes()
    axes.plot([point["step"] for point in curve], [point["loss"] for point in curve], color=BLUE)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(color="#dddddd")
    figure.savefig(file, dpi=DPI)
    return True
