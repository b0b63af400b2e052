"""``kangaroo info``: what runs on this machine, and how many bytes a model's steps read."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from ..errors import KangarooError
from .options import LOADING, Adapter, Device, Dtype, ExitLayer, Json, KvDtype, examples, print_json

EXAMPLES = examples("info", "info --model demo", "info --model my-llama --adapter my-adapter --json")


def info(
    model: Annotated[
        str | None,
        typer.Option(help="Also show this model's shape and how many bytes its steps read.", rich_help_panel=LOADING),
    ] = None,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    device: Device = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, what is supported here, and how many bytes a model's steps read."""
    from .facts import environment, footprint
    from .show import show_environment, show_footprint

    if model is None and adapter is not None:
        raise KangarooError("--adapter was given without --model; give both or neither.")
    here, cost = environment(), None
    if model is not None:
        cost = footprint(model, adapter, exit_layer, device, dtype, kv_dtype)
    if as_json:
        print_json(asdict(here) | {"model": None if cost is None else asdict(cost)})
        return
    console = Console()
    show_environment(console, here)
    if cost is not None:
        show_footprint(console, cost)
