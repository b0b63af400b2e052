"""``kangaroo compile``: put a model's kernels into Triton's cache before the first text, or before there is a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import KangarooError
from .options import LOADING, Adapter, DraftTree, Dtype, ExitLayer, examples

EXAMPLES = examples(
    "compile --model my-llama --adapter my-adapter --arch sm_90 --out cache",
    "compile --model my-llama --model my-other-llama --arch sm_80 --out cache",
)


def compile_kernels(
    model: Annotated[
        list[str],
        typer.Option(
            help="A folder (config.json is enough), GGUF file or hub name; or 'demo' or 'smollm2'; may be repeated.",
            rich_help_panel=LOADING,
        ),
    ],
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    dtype: Dtype = None,
    draft_tree: DraftTree = None,
    arch: Annotated[
        str | None, typer.Option(help="The GPU's architecture, as sm_90; by default that of the GPU here.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of Triton's cache; by default the one that Triton uses.")
    ] = None,
) -> None:
    """Compile every kernel that decoding a model launches; a GPU need not be here.

    A process with TRITON_CACHE_DIR set to that folder, and the same Triton, then finds all of them: plain and drafted,
    greedy and sampled, chained and persistent, and trees of drafts where the adapter drafts them by itself or
    --draft-tree asks for them.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..ahead import blank_pair, compile_ahead, default_folder, read_architecture, works_for

    if adapter is not None and len(model) > 1:
        raise KangarooError(f"--adapter goes with one --model, got {len(model)}; compile for them one after the other.")
    architecture, folder = read_architecture(arch), out or default_folder()
    works = works_for([blank_pair(each, adapter, exit_layer, dtype, draft_tree) for each in model], architecture)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"sm_{architecture}", total=len(works))
        made = compile_ahead(
            works, architecture, folder, lambda work: progress.update(bar, advance=1, description=work.name)
        )
    typer.echo(f"{folder} holds the kernels for sm_{architecture}; {made} of them are new.")
    if out is not None:
        typer.echo(f"Decode with TRITON_CACHE_DIR={out.resolve()} in the environment.")
