"""``kangaroo train``: train an adapter for a model."""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from .options import TRAINING, Device, Json, Model, examples, print_json

EXAMPLES = examples(
    "train --model my-llama --data *.txt --exit-layer 2 --out my-adapter",
    "train --model my-llama --data *.txt --exit-layer 2 --out my-adapter --self-generated --steps 5000",
)


class FileLists(TyperCommand):
    """A command whose ``--data`` and ``--held-out`` take every file up to the next option, as from a shell's ``*``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with those options repeated before each file."""
        return super().parse_args(ctx, list(repeat_options(args, {"--data", "--held-out"})))


def repeat_options(arguments: Iterable[str], names: Container[str]) -> Iterable[str]:
    """``--data a b`` as ``--data a --data b``, for the options in ``names``."""
    option, values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            option, values = argument, 0
        else:
            if option in names and values:
                yield option
            values += 1
        yield argument


def train(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="UTF-8 text files to train on.", metavar="FILES...")],
    exit_layer: Annotated[int, typer.Option(help="How many of the model's layers run before the adapter.")],
    out: Annotated[Path, typer.Option(help="The adapter's folder; a run that was stopped goes on from there.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Text files to measure on; by default the end of the data.", metavar="FILES..."),
    ] = None,
    as_json: Json = False,
    self_generated: Annotated[
        bool,
        typer.Option(
            "--self-generated", help="Train on the model's own continuations of the text.", rich_help_panel=TRAINING
        ),
    ] = False,
    generated_windows: Annotated[
        int, typer.Option(help="How many continuations the model writes.", rich_help_panel=TRAINING)
    ] = 2048,
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=TRAINING)] = 1000,
    minutes: Annotated[
        float | None, typer.Option(help="Train for this long, whatever --steps says.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per step.", rich_help_panel=TRAINING)] = 16,
    reuse: Annotated[
        int, typer.Option(help="How many steps use a window; 4 to 8 suit a slow machine.", rich_help_panel=TRAINING)
    ] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.", rich_help_panel=TRAINING)] = 256,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="The adapter's heads; by default as the model's.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest rate of the run.", rich_help_panel=TRAINING)] = 3e-3,
    seed: Annotated[int, typer.Option(help="The seed of windows and samples.", rich_help_panel=TRAINING)] = 0,
    device: Device = None,
) -> None:
    """Train an adapter for a model, on text files or on the model's own continuations of them.

    Reports how often drafter and model agree on held-out text.

    After Ctrl-C, the same command goes on from the last checkpoint.
    """
    from ..training.settings import TrainingSettings
    from ..training.trainer import train_adapter
    from .show import show_training, training_bars

    settings = TrainingSettings(
        model=model,
        data=tuple(data),
        exit_layer=exit_layer,
        out=out,
        self_generated=self_generated,
        held_out=tuple(held_out or ()),
        minutes=minutes,
        steps=steps,
        batch_size=batch_size,
        reuse=reuse,
        sequence_length=sequence_length,
        generated_windows=generated_windows,
        num_attention_heads=num_attention_heads,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
    )
    with training_bars() as progress:
        report = train_adapter(settings, progress)
    if as_json:
        print_json(report)
    else:
        show_training(Console(), out, report)
