"""``kangaroo train``: train an adapter for a model."""

import shlex
import time
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from .options import INTERRUPTED, TRAINING, Device, Json, Model, examples, print_json

EXAMPLES = examples(
    "train --model my-llama --data *.txt --exit-layer 2 --out my-adapter",
    "train --model my-llama --data my-data.jsonl --exit-layer 2 --out my-adapter --minutes 30",
)
FILE_OPTIONS = {"--data", "--held-out", "--prompts"}
POOR_AGREEMENT = 0.25
"""Below this, drafts are wrong so often that nobody should use the adapter without having looked."""

FAR_BETTER = 0.15
"""An adapter that is so much better on its own data than on other data has learned it by heart."""


class FileLists(TyperCommand):
    """A command whose options in ``FILE_OPTIONS`` take every file up to the next option, as from a shell's ``*``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with those options repeated before each file."""
        return super().parse_args(ctx, list(repeat_options(args, FILE_OPTIONS)))


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
    data: Annotated[
        list[Path],
        typer.Option(help="Text files, and .json or .jsonl files of conversations or texts.", metavar="FILES..."),
    ],
    exit_layer: Annotated[
        list[int],
        typer.Option(help="How many of the model's layers run before the adapter; given again, for another adapter."),
    ],
    out: Annotated[
        Path, typer.Option(help="The adapter's folder; a run in it that was stopped, or is to be longer, goes on.")
    ],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Files to measure on; by default the end of the data.", metavar="FILES..."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="End within this time, loading and scoring included.", rich_help_panel=TRAINING)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="The last step; by default 2000, or none with --minutes.", rich_help_panel=TRAINING),
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="An adapter to begin with: a folder or hub name.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per step.", rich_help_panel=TRAINING)] = 16,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Windows worked on at once; fewer take less memory.", rich_help_panel=TRAINING),
    ] = None,
    reuse: Annotated[
        int, typer.Option(help="How many steps use a window; 4 to 8 suit a slow machine.", rich_help_panel=TRAINING)
    ] = 4,
    sequence_length: Annotated[int, typer.Option(help="The most tokens per window.", rich_help_panel=TRAINING)] = 256,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="The adapter's heads; by default as the model's.", rich_help_panel=TRAINING)
    ] = None,
    intermediate_size: Annotated[
        int | None,
        typer.Option(
            help="Give the adapter an MLP of this inner size; without, it is attention alone, as in the paper.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    deep_state_size: Annotated[
        int | None,
        typer.Option(
            help="Show the adapter the model's last state at the position before, through an MLP of this inner size; "
            "without, it sees the exit layer alone, as in the paper.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    draft_head_rank: Annotated[
        int | None,
        typer.Option(
            help="Train a head of two factors of this rank, too; without, the model's head drafts, as in the paper.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    draft_block: Annotated[
        int | None,
        typer.Option(
            help="Draft this many tokens in one pass, 2 to 15; without, one by one, as in the paper.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    trained_confidence: Annotated[
        bool,
        typer.Option(
            "--trained-confidence",
            help="Train what is held against the threshold; without, it is the draft's probability, as in the paper.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    unrolled_drafts: Annotated[
        int,
        typer.Option(help="How many drafts in a row a deep state learns for.", rich_help_panel=TRAINING),
    ] = 2,
    learning_rate: Annotated[float, typer.Option(help="The highest rate of the run.", rich_help_panel=TRAINING)] = 2e-2,
    total_variation: Annotated[
        float,
        typer.Option(
            help="The share of total variation in the loss, beside cross-entropy; 0 to 1.", rich_help_panel=TRAINING
        ),
    ] = 0.0,
    vocabulary: Annotated[
        int, typer.Option(help="How many of the most frequent tokens the loss tells apart.", rich_help_panel=TRAINING)
    ] = 8192,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="How many of the most frequent tokens the adapter may draft; by default all.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep the model's states of all data on disk.", rich_help_panel=TRAINING)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the losses for TensorBoard, too.", rich_help_panel=TRAINING)
    ] = False,
    seed: Annotated[int, typer.Option(help="The seed of the order of the data.", rich_help_panel=TRAINING)] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train an adapter for a model, on conversations or texts; best on its own, which generate-data writes.

    Reports how often drafter and model agree on held-out data, and what the adapter is worth there.

    After Ctrl-C, the same command goes on. More --steps, or --minutes again, train a finished adapter on.

    With several exit layers, an adapter for each learns from the same passes of the model, in a folder of its own.

    torchrun --nproc-per-node 8 --no-python kangaroo train ... shares the work among processes, or GPUs.
    """
    began = time.perf_counter()  # the imports take their time, too

    from ..evaluation.deadline import deadline_of
    from ..training.settings import TrainingSettings
    from ..training.trainer import train_adapters
    from .show import show_training, training_bars

    settings = TrainingSettings(
        model=model,
        data=tuple(data),
        exit_layer=exit_layer[0],
        out=out,
        held_out=tuple(held_out or ()),
        minutes=minutes,
        steps=steps,
        start_from=start_from,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        reuse=reuse,
        sequence_length=sequence_length,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        deep_state_size=deep_state_size,
        draft_head_rank=draft_head_rank,
        draft_block=draft_block,
        trained_confidence=trained_confidence,
        unrolled_drafts=unrolled_drafts,
        learning_rate=learning_rate,
        total_variation=total_variation,
        vocabulary=vocabulary,
        draft_vocabulary=draft_vocabulary,
        cache=cache,
        tensorboard=tensorboard,
        seed=seed,
        device=device,
    )
    runs = settings.with_exits(exit_layer)
    try:
        with training_bars() as progress:
            reports = train_adapters(runs, progress, deadline_of(minutes, began))
    except KeyboardInterrupt as stopped:
        where = str(stopped) or "stopped outside of the steps; what an earlier run kept is still there"
        typer.echo(f"{where}. The same command goes on from there.", err=True)
        raise typer.Exit(INTERRUPTED) from stopped
    if not all(reports):  # another process has them
        return
    if as_json:
        print_json(reports[0] if len(runs) == 1 else dict(zip((run.out.name for run in runs), reports, strict=True)))
        return
    for run, report in zip(runs, reports, strict=True):
        show_training(Console(), run.out, report)
        if warning := warn(report):
            typer.echo(warning, err=True)
        use = ["kangaroo", "generate", "--model", model, "--adapter", str(run.out), "--compare", "--prompt", "..."]
        typer.echo(f"Use it: {shlex.join(use)}")


def warn(report: Mapping[str, Any]) -> str:
    """What a user of a poor adapter should know; empty for a good one."""
    if report["agreement"] < POOR_AGREEMENT:
        return (
            f"This adapter agrees with the model on {report['agreement']:.0%} of the held-out tokens, too few to be of "
            "use. Train it on with more --steps or --minutes, or on more data."
        )
    known = report.get("agreement_on_learned_windows", 0.0)
    if known > report["agreement"] + FAR_BETTER:
        return (
            f"This adapter agrees with the model on {known:.0%} of the tokens that it learned from, and on "
            f"{report['agreement']:.0%} of held-out ones: it knows its data by heart, and more time on the same data "
            "will help little."
        )
    if report.get("speedup", 1) < 1:
        return f"On the held-out prompts, decoding is slower with this adapter ({report['speedup']:.2f}x plain)."
    return ""
