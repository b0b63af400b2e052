"""``kangaroo plan``: the speed that decoding would reach on a machine, and where to put the exit layer."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Json, examples, print_json

EXAMPLES = examples(
    "plan --model Llama-3.1-8B --card H100",
    "plan --model Llama-3.1-405B --card H200 --tensor-parallel 8 --profile eval.json --picture plan.png",
)


def plan(
    model: Annotated[str, typer.Option(help="A shape by its name, as in Vicuna-7B; or a folder, GGUF or config.json.")],
    card: Annotated[str, typer.Option(help="'A100', 'H100', 'H200' or 'CPU'.")],
    tensor_parallel: Annotated[int, typer.Option(help="Cards that share the model.")] = 1,
    exit_layer: Annotated[int | None, typer.Option(help="Layers before the adapter; by default a sixteenth.")] = None,
    num_speculative_tokens: Annotated[int, typer.Option(help="The most drafts per step, 1 to 15.")] = 6,
    profile: Annotated[
        Path | None,
        typer.Option(help="How often drafts are right: JSON of 'eval' or of 'generate --compare'; else the paper's."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the text, whose keys and values are read.")] = 1024,
    picture: Annotated[Path | None, typer.Option(help="Draw the speedup by exit layer and draft length here.")] = None,
    as_json: Json = False,
) -> None:
    """Plan tokens per second, plain and Kangaroo, from bytes, measured shares and an acceptance profile.

    Nothing is loaded or run. What the figures rest on is listed below them.
    """
    from ..errors import KangarooError
    from ..evaluation.plan import PAPER, Plan, find_machine, find_shape, read_profile
    from .show import show_plan

    if not 1 <= num_speculative_tokens <= 15:
        raise KangarooError(
            f"num_speculative_tokens is {num_speculative_tokens}; it must be a whole number from 1 to 15."
        )
    if length < 1:
        raise KangarooError(f"length is {length}; it must be at least 1.")
    try:
        report = None if profile is None else json.loads(profile.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KangarooError(f"{profile} is no JSON; give what kangaroo eval or --compare --json printed.") from error
    rates = PAPER if profile is None else read_profile(report, str(profile))
    planned = Plan(find_shape(model), find_machine(card), rates, tensor_parallel, length)
    depth = max(1, planned.shape.layers // 16) if exit_layer is None else exit_layer
    found, grid = planned.predict(depth, num_speculative_tokens), planned.grid()
    drawn = None
    if picture is not None:
        from ..evaluation.plan_picture import plot_plan

        plot_plan(planned, grid, picture)
        drawn = str(picture)
    facts = {
        "model": planned.shape.name,
        "card": planned.machine.name,
        "tensor_parallel": tensor_parallel,
        "exit_layer": depth,
        "num_speculative_tokens": num_speculative_tokens,
        "bytes_per_card": round(planned.bytes_per_card),
        **found._asdict(),
    }
    if as_json:
        print_json(facts | {"speedup_by_exit_layer": grid, "assumptions": planned.assumptions(), "picture": drawn})
    else:
        show_plan(Console(), facts, grid, planned.assumptions())
