"""``kangaroo plan``: the speed that decoding would reach on a machine, and where to put the exit layer."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Json, examples, print_json

EXAMPLES = examples(
    "plan --model Llama-3.1-8B --card H100",
    "plan --model Llama-3.1-8B --card H100 --intermediate-size 14336 --draft-vocabulary 16384 --profile report.json",
    "plan --model smollm2 --card CPU",
    "plan --model Llama-3.1-405B --card H200 --tensor-parallel 8 --profile eval.json --picture plan.png",
)


def plan(
    model: Annotated[str, typer.Option(help="A shape by its name, as in Vicuna-7B; or a folder, GGUF or config.json.")],
    card: Annotated[str, typer.Option(help="'A100', 'H100', 'H200' or 'CPU'.")],
    adapter: Annotated[
        str | None, typer.Option(help="The adapter's folder, whose form counts; 'smollm2' and 'demo' have their own.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Cards that share the model.")] = 1,
    exit_layer: Annotated[
        int | None, typer.Option(help="Layers before the adapter; by default its own, or a sixteenth.")
    ] = None,
    num_speculative_tokens: Annotated[
        int | None,
        typer.Option(help="The most drafts per step, 1 to 15; by default the profile's, the adapter's own, or 6."),
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Of the adapter's MLP; by default its own, or none.")
    ] = None,
    draft_vocabulary: Annotated[
        int | None, typer.Option(help="Tokens that the adapter drafts; by default its own, or all.")
    ] = None,
    deep_state_size: Annotated[
        int | None, typer.Option(help="Of the adapter's deep state; by default its own, or none.")
    ] = None,
    draft_head_rank: Annotated[
        int | None, typer.Option(help="Of a draft head of two factors; by default the adapter's own, or none.")
    ] = None,
    draft_block: Annotated[
        int | None, typer.Option(help="Drafts that the adapter makes in one pass; by default its own, or one by one.")
    ] = None,
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
    from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

    from ..drafters.protocol import PAPER_NUM_SPECULATIVE_TOKENS
    from ..errors import KangarooError
    from ..evaluation.acceptance import PAPER, read_profile
    from ..evaluation.machines import find_machine
    from ..evaluation.plan import Plan, find_shapes
    from .show import show_plan

    most = MAX_SPECULATIVE_TOKENS
    if num_speculative_tokens is not None and not 1 <= num_speculative_tokens <= most:
        raise KangarooError(
            f"num_speculative_tokens is {num_speculative_tokens}; it must be a whole number from 1 to {most}."
        )
    if length < 1:
        raise KangarooError(f"length is {length}; it must be at least 1.")
    try:
        report = None if profile is None else json.loads(profile.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise KangarooError(f"{profile} is no JSON; give what kangaroo eval or --compare --json printed.") from error
    rates = PAPER if profile is None else read_profile(report, str(profile))
    shape, form, trained = find_shapes(model, adapter, exit_layer)
    form = form.with_parts(intermediate_size, draft_vocabulary, deep_state_size, draft_head_rank, draft_block)
    planned = Plan(shape, find_machine(card), rates, form, tensor_parallel, length)
    depth = max(1, shape.layers // 16) if trained is None else trained.exit_layer
    depth = depth if exit_layer is None else exit_layer
    if profile is not None:
        own = min(len(rates.accepted), most)
    else:
        own = PAPER_NUM_SPECULATIVE_TOKENS if trained is None else trained.num_speculative_tokens
    most = num_speculative_tokens or own
    found, grid = planned.predict(depth, most), planned.grid()
    drawn = None
    if picture is not None:
        from ..evaluation.plan_picture import plot_plan
        from ..evaluation.plots import check_picture

        check_picture(picture)
        plot_plan(planned, grid, picture)
        drawn = str(picture)
    facts = {
        "model": shape.name,
        "card": planned.machine.name,
        "tensor_parallel": tensor_parallel,
        "exit_layer": depth,
        "num_speculative_tokens": most,
        "bytes_per_card": round(planned.bytes_per_card),
        **found._asdict(),
    }
    if as_json:
        print_json(facts | {"speedup_by_exit_layer": grid, "assumptions": planned.assumptions(), "picture": drawn})
    else:
        lengths = range(1, len(grid[1]) + 1) if rates.of_chains else [len(rates.accepted)]
        show_plan(Console(), facts, grid, lengths, planned.assumptions())
