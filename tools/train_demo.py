"""Train a pair: the bundled demo pair, one of a few hundred million parameters, or one to see that it works.

    python tools/train_demo.py --preset large --minutes 8
    python tools/train_demo.py --preset smoke
    python tools/train_demo.py --preset demo

``large`` takes one GPU and the Python sources installed on the machine; ``smoke`` runs the same code in seconds on a
CPU; ``demo`` takes an hour and a half on two CPU cores and Python 3.11's standard library, and a stopped run of it goes
on with the same command. tools/presets.py holds them. The folder that comes out is laid out as ``model/demo_pair``;
every setting and the learning curve land in ``training.json`` beside the weights.
"""

import math
import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer
from presets import PRESETS
from train_pair import Run, train_pair

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.commands.show import training_bars
from kangaroo_kernels.model.load import resolve_device

USER_ERROR = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def refuse(sentence: str) -> typer.Exit:
    """Say what was wrong; raise what comes back."""
    typer.echo(f"train_demo: {' '.join(sentence.split())}", err=True)
    return typer.Exit(USER_ERROR)


@app.command(no_args_is_help=True)
def main(
    preset: Annotated[str, typer.Option(help=f"The pair: {', '.join(PRESETS)}.")],
    minutes: Annotated[
        float | None,
        typer.Option(help=f"By default {', '.join(f'{plan.minutes:g} for {name}' for name, plan in PRESETS.items())}."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the pair; by default runs/PRESET.")] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.")] = None,
) -> None:
    """Train the pair of a preset: tokenizer, target, adapter and its defaults."""
    if preset not in PRESETS:
        raise refuse(f"--preset is {preset}; there are {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    minutes = chosen.minutes if minutes is None else minutes
    if not (0 < minutes < math.inf and minutes >= chosen.least_minutes):
        least = f"of at least {chosen.least_minutes:g}" if chosen.least_minutes else "above 0"
        raise refuse(f"--minutes is {minutes:g}; {preset} needs a finite number {least}.")
    out = Path("runs") / preset if out is None else out
    try:
        where = resolve_device(device)
        if chosen.needs_gpu and where.type == "cpu" and device is None:
            raise KangarooError(
                f"the preset {preset} needs a CUDA GPU and PyTorch sees none here; --preset smoke needs none, and "
                "--device cpu insists (one update takes a CPU many minutes)."
            )
        command = f"python tools/train_demo.py --preset {preset} --minutes {minutes:g}"
        with training_bars() as report:
            record = train_pair(Run(chosen, out, minutes, where, {"preset": preset, "command": command}, report))
    except (KangarooError, OSError, torch.OutOfMemoryError) as error:
        raise refuse(str(error)) from error
    held_out = record["held_out"]
    typer.echo(
        f"{out}: a target of {record['parameters']['target'] / 1e6:.1f}M parameters and an adapter of "
        f"{record['parameters']['adapter'] / 1e6:.1f}M in {sum(record['seconds'].values()) / 60:.1f} minutes; on "
        f"held-out files {held_out['bits_per_character']:.3f} bits a character, {held_out['top1_accuracy']:.3f} top-1, "
        f"and the drafter agrees with the target on {held_out['top1_agreement_text']:.3f} of the text and "
        f"{held_out['top1_agreement_self_generated']:.3f} of what the target writes.\n"
        f"Real acceptance and speed: python tools/gpu_report.py --pair {shlex.quote(str(out))}"
    )


if __name__ == "__main__":
    app()
