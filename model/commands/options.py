"""The options that several commands share, and what commands print with."""

import json
from typing import Annotated, Any

import typer

from ..errors import KangarooError

NOT_IDENTICAL, USER_ERROR, INTERRUPTED = 1, 2, 130
"""Exit codes."""

LOADING, SAMPLING, DRAFTING, TRAINING = "Loading", "Sampling", "Drafting", "Training"
Model = Annotated[
    str,
    typer.Option(
        help="A folder, GGUF file or hub name; or 'demo', the bundled pair; or 'smollm2'.", rich_help_panel=LOADING
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="The adapter's folder or hub name; by default the model's own ('smollm2' and 'demo' have one), and "
        "prompt lookup drafts where there is none.",
        rich_help_panel=LOADING,
    ),
]
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
KvDtype = Annotated[
    str | None,
    typer.Option(
        help="'float16' halves the memory of a text's keys and values on a CPU; it goes with --dtype float16.",
        rich_help_panel=LOADING,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(help="'triton' or 'reference'; by default 'triton' only on a GPU.", rich_help_panel=LOADING),
]
PromptLookup = Annotated[
    bool | None,
    typer.Option(
        help="Beside an adapter, also draft what followed the same words before; by default as the adapter says.",
        rich_help_panel=DRAFTING,
    ),
]
DraftTree = Annotated[
    int | None,
    typer.Option(
        help="Draft trees of at most this many tokens, 1 to 15; 0 for chains; by default as the adapter says.",
        rich_help_panel=DRAFTING,
    ),
]
Temperature = Annotated[float, typer.Option(help="0 decodes greedily.", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="Sample among this many tokens.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="Sample among the tokens that reach this probability.", rich_help_panel=SAMPLING)
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample among tokens this many times as likely as the likeliest.", rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(help="Above 1, tokens that the text holds already become less likely.", rich_help_panel=SAMPLING),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        help="Added to a token's logit, as in 42=-1.5; may be repeated.",
        metavar="<id=number>",
        rich_help_panel=SAMPLING,
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Write on behind the model's own end-of-text tokens.")]
MinNewTokens = Annotated[int, typer.Option(help="Nothing ends the text before this many tokens.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds after which no further step begins.")]
Logprobs = Annotated[
    int | None,
    typer.Option(help="Give each token's log-probability and this many likely ones, 0 to 20; needs --json."),
]


def _seed(text: str) -> int | None:
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'random'.") from error


Seed = Annotated[
    int | None,
    typer.Option(
        parser=_seed,
        metavar="<int|random>",
        help="The same seed gives the same text; 'random' draws one.",
        rich_help_panel=SAMPLING,
    ),
]
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


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor 'auto'.") from error


DraftConfidenceThreshold = Annotated[
    Any,  # a number, 'auto' or None; typer takes no union of two types
    typer.Option(
        parser=_threshold,
        metavar="<float|auto>",
        help="Drafting stops at a confidence below this, 0 to 1; 'auto' finds it and the draft length while it writes, "
        "and drafts nothing where that is faster. By default as the adapter says.",
        rich_help_panel=DRAFTING,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def read_biases(entries: list[str] | None) -> dict[int, float] | None:
    """The biases of ``--logit-bias``.

    Raises:
        KangarooError: an entry that is not ID=NUMBER.
    """
    biases = {}
    for entry in entries or ():
        token, _, value = entry.partition("=")
        try:
            biases[int(token)] = float(value)
        except ValueError as error:
            raise KangarooError(f"--logit-bias is {entry!r}; it must be ID=NUMBER, as in 42=-1.5.") from error
    return biases or None


def examples(*commands: str) -> str:
    """The examples at the end of a command's help."""
    return "\n\n".join(("Examples:", *(f"  $ kangaroo {command}" for command in commands)))


def print_json(values: Any) -> None:
    """Print ``values`` as JSON to stdout."""
    typer.echo(json.dumps(values, indent=2))
