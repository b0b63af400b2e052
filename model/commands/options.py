"""The options that several commands share, and what commands print with."""

import json
from typing import Annotated, Any

import typer

NOT_IDENTICAL, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes."""

LOADING, SAMPLING, DRAFTING, TRAINING = "Loading", "Sampling", "Drafting", "Training"
Model = Annotated[
    str, typer.Option(help="A checkpoint's folder or hub name, or 'demo': the bundled pair.", rich_help_panel=LOADING)
]
Adapter = Annotated[str | None, typer.Option(help="The adapter's folder or hub name.", rich_help_panel=LOADING)]
ExitLayer = Annotated[
    int | None,
    typer.Option(help="Layers before the adapter; by default as its config.json says.", rich_help_panel=LOADING),
]
Device = Annotated[
    str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.", rich_help_panel=LOADING)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="What weights are rounded to: 'float32', 'float16' or 'bfloat16'; by default float32 on a CPU, the "
        "checkpoint's own on a GPU.",
        rich_help_panel=LOADING,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(help="'triton' or 'reference'; by default 'triton' only on a GPU.", rich_help_panel=LOADING),
]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="Sample among this many tokens.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="Sample among the tokens that reach this probability.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.", rich_help_panel=SAMPLING)]
Acceptance = Annotated[
    str,
    typer.Option(
        help="'coupled' gives the tokens of plain sampling, 'rejection' only their distribution.",
        rich_help_panel=DRAFTING,
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(help="The most drafts per step, 1 to 15; by default the adapter's own.", rich_help_panel=DRAFTING),
]
DraftConfidenceThreshold = Annotated[
    float | None,
    typer.Option(
        help="Drafting stops at a confidence below this, 0 to 1; by default the adapter's own.",
        rich_help_panel=DRAFTING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def examples(*commands: str) -> str:
    """The examples at the end of a command's help."""
    return "\n\n".join(("Examples:", *(f"  $ kangaroo {command}" for command in commands)))


def print_json(values: Any) -> None:
    """Print ``values`` as JSON to stdout."""
    typer.echo(json.dumps(values, indent=2))
