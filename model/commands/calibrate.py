"""``kangaroo calibrate``: find the way of drafting, the length and the threshold that suit a pair and this machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import KangarooError
from .options import LOADING, Device, Dtype, Json, Model, examples, print_json

EXAMPLES = examples(
    "calibrate --model my-llama --adapter my-adapter --prompts prompts.json",
    "calibrate --model my-llama --adapter my-adapter --prompts prompts.json --write",
)


def calibrate(
    model: Model,
    adapter: Annotated[str, typer.Option(help="The adapter's folder or hub name.", rich_help_panel=LOADING)],
    prompts: Annotated[Path, typer.Option(help="A JSON list of texts, none that the pair will be judged by.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write for a prompt.")] = 128,
    picture: Annotated[
        Path | None, typer.Option(help="Draw tokens a step over the cost of a step here, as a .png.")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Make the best setting the adapter's default.")] = False,
    as_json: Json = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the way of drafting, the draft length and the threshold that make a pair fastest on this machine.

    Each setting decodes the prompts in turns with plain decoding. The table has the best first. Chains are tried first;
    chains beside prompt lookup and trees of drafts, with lookup and without, then, around the best of them.

    --write puts the best into the config.json of the adapter's folder, and the table into calibration.json beside it.
    """
    if write and not Path(adapter, "config.json").is_file():  # before hours of measuring
        raise KangarooError(f"--write changes an adapter's folder, and {adapter!r} is none; give a local folder.")
    from ..evaluation.calibrate import Calibration, calibrate, read_prompts, write_defaults
    from ..evaluation.calibrate_picture import draw_frontier
    from ..evaluation.plots import check_picture
    from ..kangaroo import Kangaroo
    from .show import show_rows, training_bars

    if picture is not None:
        check_picture(picture)
    plan, texts = Calibration(max_new_tokens=max_new_tokens), read_prompts(prompts)
    kangaroo = Kangaroo.from_pretrained(model, adapter, device=device, dtype=dtype)
    with training_bars() as report:
        rows = calibrate(kangaroo, texts, plan, report=report)
    if as_json:
        print_json(rows)
    else:
        show_rows(Console(), rows)
    if write:
        write_defaults(Path(adapter), rows)
    if picture is not None and not draw_frontier(picture, rows):
        typer.echo("The picture needs matplotlib; pip install matplotlib.", err=True)
