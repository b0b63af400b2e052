"""``kangaroo generate-data``: have a model write what an adapter for it should learn from."""

from pathlib import Path
from typing import Annotated

import typer

from .options import SAMPLING, Device, Json, Model, examples, print_json

EXAMPLES = examples(
    "generate-data --model my-chat-model --out my-data.jsonl --texts 2000",
    "generate-data --model my-chat-model --out my-data.jsonl --prompts questions.jsonl",
    "generate-data --model my-chat-model --out my-data.jsonl --system-prompts tasks.txt --max-prompt-tokens 320",
    "generate-data --model my-llama --out my-data.jsonl --prompts *.txt",
)


def generate_data(
    model: Model,
    out: Annotated[Path, typer.Option(help="A .jsonl file; the texts in it count, and it grows to --texts.")],
    texts: Annotated[int, typer.Option(help="How many texts the file is to hold.")] = 1000,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Conversations to answer, or texts to continue; by default a chat model asks itself.",
            metavar="FILES...",
        ),
    ] = None,
    system_prompts: Annotated[
        Path | None,
        typer.Option(help="A text file of system prompts, one a line, under which it asks itself by turns."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="The most tokens of a question that it asks itself.")] = 96,
    at_once: Annotated[int, typer.Option(help="Texts written side by side.")] = 96,
    minutes: Annotated[float | None, typer.Option(help="End within this time.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same texts.", rich_help_panel=SAMPLING)] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Have a model write training data: answers to its own questions, to prompts, or continuations of texts.

    Near-duplicates and texts that loop are dropped and counted.

    A stopped run goes on with the same command.
    """
    from ..training.generate_data import WritingSettings, write_data
    from .show import training_bars

    settings = WritingSettings(
        model=model,
        out=out,
        texts=texts,
        prompts=tuple(prompts or ()),
        system_prompts=system_prompts,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        at_once=at_once,
        minutes=minutes,
        seed=seed,
        device=device,
    )
    with training_bars() as progress:
        counts = write_data(settings, progress)
    if as_json:
        print_json(vars(counts))
        return
    typer.echo(
        f"{out} holds {counts.texts} texts; this run wrote {counts.tokens} tokens in {counts.seconds:.0f} s, and "
        f"dropped {counts.near_duplicates} near-duplicates, {counts.loops} loops and {counts.unfit} prompts of no use."
    )
    if counts.texts < texts:
        typer.echo(f"That is fewer than {texts}: no prompts, no time or nothing worth keeping was left.", err=True)
