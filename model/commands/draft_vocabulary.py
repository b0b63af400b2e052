"""``kangaroo draft-vocabulary``: let an adapter draft the most frequent tokens alone."""

from pathlib import Path
from typing import Annotated

import typer

from .options import LOADING, Json, Model, examples, print_json

EXAMPLES = examples(
    "draft-vocabulary --model my-llama --adapter my-adapter --data my-data.jsonl",
    "draft-vocabulary --model my-llama --adapter my-adapter --data *.txt --size 16384",
)


def draft_vocabulary(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="The adapter's folder.", rich_help_panel=LOADING)],
    data: Annotated[
        list[Path],
        typer.Option(help="Files like those that the model will write; as for train.", metavar="FILES..."),
    ],
    size: Annotated[int, typer.Option(help="How many tokens the adapter may draft.")] = 8192,
    as_json: Json = False,
) -> None:
    """Make an adapter's drafts cheaper: it drafts the data's most frequent tokens alone, with a head of so many rows.

    The text stays the same, since the model itself writes the other tokens. Nothing is trained: the adapter's folder
    gets a list of tokens.
    """
    from ..training.draft_vocabulary import add_draft_vocabulary

    added = add_draft_vocabulary(model, adapter, data, size)
    if as_json:
        print_json(added._asdict())
        return
    typer.echo(
        f"{adapter} drafts {added.tokens:,} of {added.vocab_size:,} tokens now. They make up {added.coverage:.2%} of "
        "the data."
    )
