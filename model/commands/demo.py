"""``kangaroo demo``: a real model answers questions, decoding plainly and with Kangaroo, side by side."""

from typing import Annotated

import typer
from rich.console import Console

from ..demo import DEMO_MODEL, QUESTIONS, bundled_pair
from ..errors import KangarooError
from ..named import SMOLLM2, find_smollm2
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

EXAMPLES = examples("demo", "demo --temperature 0.8 --seed 1", "demo --model demo --json > demo.json")
BUSY_NOTE = "Other work kept the processor busy meanwhile, so the speeds say little; run it again on an idle machine."


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="'smollm2', or 'demo': the small bundled pair. By default SmolLM2 where it is installed."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write for a prompt.")] = 160,
    as_json: Json = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
) -> None:
    """Answer three questions with SmolLM2, plainly and with Kangaroo at once, and compare the two.

    Without SmolLM2 the bundled pair continues held-out code instead. The exit code is 1 if the two ever differ in a
    token.
    """
    if model not in (None, SMOLLM2, DEMO_MODEL):
        raise KangarooError(f"the demo's model is {model!r}; it must be {SMOLLM2!r} or {DEMO_MODEL!r}.")
    from ..evaluation.compare import report
    from ..evaluation.race import Race, warm_up
    from ..kangaroo import Kangaroo
    from ..request import Settings
    from .show import show_comparisons, show_legend
    from .side_by_side import show_race

    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        num_speculative_tokens=num_speculative_tokens,
        draft_confidence_threshold=draft_confidence_threshold,
    )
    console = Console(stderr=as_json)
    if model is None:
        try:
            find_smollm2()
            model = SMOLLM2
        except KangarooError as missing:
            console.print(f"The bundled pair is shown, since {missing}", soft_wrap=True)
            model = DEMO_MODEL

    with console.status("loading the model"):
        kangaroo = Kangaroo.from_pretrained(model)
        texts = QUESTIONS if model == SMOLLM2 else bundled_pair().prompts()
        races = {}  # every request is checked here, and decoded where it is shown
        for name, text in texts.items():
            messages = [{"role": "user", "content": text}] if model == SMOLLM2 else None
            races[name] = Race(kangaroo, settings, None if messages else text, messages=messages)
        warm_up(kangaroo)
    comparisons, finish_reason, disturbed = [], "complete", False
    try:
        if not as_json:
            show_legend(console)
        for name, race in races.items():
            if as_json:
                race.finish()
            else:
                show_race(console, name, texts[name], race)
            comparisons.append(race.comparison(name))
            disturbed |= race.disturbed
    except KeyboardInterrupt:
        finish_reason = "interrupted"
    if as_json:
        print_json({"model": model, "finish_reason": finish_reason, "disturbed": disturbed, **report(comparisons)})
    else:
        show_comparisons(console, comparisons)
        if disturbed:
            console.print(BUSY_NOTE)
    if finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if not all(comparison.identical for comparison in comparisons):
        raise typer.Exit(NOT_IDENTICAL)
