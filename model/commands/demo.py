"""``kangaroo demo``: the bundled pair, decoding plainly and with Kangaroo, side by side."""

from typing import Annotated

import typer
from rich.console import Console

from ..demo import DEMO_MODEL, bundled_pair
from .options import (
    INTERRUPTED,
    NOT_IDENTICAL,
    DraftConfidenceThreshold,
    Json,
    NumSpeculativeTokens,
    Seed,
    Temperature,
    examples,
    print_json,
)

EXAMPLES = examples("demo", "demo --temperature 0.8 --seed 1", "demo --json > demo.json")


def demo(
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write for a prompt.")] = 192,
    rounds: Annotated[int, typer.Option(help="Timed runs of each kind; the median counts.", min=1)] = 3,
    as_json: Json = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
) -> None:
    """Decode held-out prompts with the bundled pair, plainly and with Kangaroo, side by side.

    The exit code is 1 if the two ever differ in a token.
    """
    from ..evaluation.compare import compare_all, report
    from ..kangaroo import Kangaroo
    from ..request import Settings
    from .show import show_comparisons, show_legend, show_steps, track

    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        num_speculative_tokens=num_speculative_tokens,
        draft_confidence_threshold=draft_confidence_threshold,
    )
    prompts, kangaroo = bundled_pair().prompts(), Kangaroo.from_pretrained(DEMO_MODEL)
    console, comparisons, finish_reason = Console(), [], "complete"
    try:
        if not as_json:
            # every request is checked here, and decoded where it is shown
            texts = [(name, prompt, kangaroo.progress(prompt, settings)) for name, prompt in prompts.items()]
            show_legend(console)
            for text in texts:
                show_steps(console, *text)
        measuring = compare_all(kangaroo, prompts, settings, rounds=rounds)
        for comparison in track(measuring, "measuring", len(prompts)):
            comparisons.append(comparison)
    except KeyboardInterrupt:
        finish_reason = "interrupted"
    if as_json:
        print_json({"finish_reason": finish_reason, **report(comparisons)})
    else:
        console.print()
        show_comparisons(console, comparisons)
    if finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if not all(comparison.identical for comparison in comparisons):
        raise typer.Exit(NOT_IDENTICAL)
