"""Train a pair: a preset in one go, or the bundled demo pair stage by stage.

    python tools/train_demo.py --preset large --minutes 8
    python tools/train_demo.py --preset smoke

    python tools/train_demo.py target --out runs/demo --minutes 72
    python tools/train_demo.py adapter --out runs/demo --minutes 20
    python tools/train_demo.py calibrate --out runs/demo
    python tools/train_demo.py ship --out runs/demo

``large`` takes one GPU and the Python sources installed on the machine (tools/presets.py has the arithmetic);
``smoke`` runs the same code in seconds on a CPU. The demo pair's stages take an hour and a half on two CPU cores, and
the standard library: the target's learning rates follow the share of the time that has passed, so a run fits its
``--minutes`` on any machine, and a stopped one goes on from its last checkpoint. Every setting and the learning curve
land in ``training.json`` beside the weights.
"""

import json
import math
import platform
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from calibrate import calibrate, show, write_defaults
from demo_corpus import Document, stdlib_documents
from presets import PRESETS
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from safetensors.torch import load_file, save_file
from target_training import (
    TargetRecipe,
    TargetTraining,
    Windows,
    encode,
    evaluate,
    exact_in_both_halves,
    train_tokenizer,
)
from train_pair import Report, characters_of, train_pair, write_json

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.kangaroo import resolve_device
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.trainer import train_adapter

USER_ERROR = 2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class PresetName(str, Enum):
    """The names of ``PRESETS``, for the command line."""

    large = "large"
    smoke = "smoke"


@contextmanager
def bars() -> Iterator[Report]:
    """A bar for every stage, on stderr."""
    stages: dict[str, TaskID] = {}
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int, note: str) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(stages[stage], completed=done, total=total, note=note)

        yield report


def refuse(sentence: str) -> typer.Exit:
    """Say what was wrong; raise what comes back."""
    typer.echo(f"train_demo: {' '.join(sentence.split())}", err=True)
    return typer.Exit(USER_ERROR)


def check_minutes(minutes: float) -> None:
    """Refuse a time in which nothing could be done, or that has no end."""
    if not 0 < minutes < math.inf:
        raise refuse(f"--minutes is {minutes:g}; it must be a finite number above 0.")


@contextmanager
def told() -> Iterator[None]:
    """A stage's decorator: a user's mistake becomes one sentence and exit code 2."""
    try:
        yield
    except (KangarooError, OSError) as error:
        raise refuse(str(error)) from error


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    preset: Annotated[PresetName | None, typer.Option(help="Train this pair in one go.")] = None,
    minutes: Annotated[float | None, typer.Option(help="All of it; 8 for large, 0.5 for smoke.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the pair; by default runs/PRESET.")] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.")] = None,
) -> None:
    """Train a pair: with --preset in one go, else the bundled demo pair's stages one by one."""
    given = {"--preset": preset, "--minutes": minutes, "--out": out, "--device": device}
    if context.invoked_subcommand is not None:
        first = next((name for name, value in given.items() if value is not None), None)
        if first is not None:
            raise refuse(f"{first} stands before '{context.invoked_subcommand}'; its own options come after it.")
        return
    if preset is None:
        first = next((name for name, value in given.items() if value is not None), None)
        if first is not None:
            raise refuse(f"{first} says how to train, but not what; add --preset {' or --preset '.join(PRESETS)}.")
        typer.echo(context.get_help())
        return
    chosen = PRESETS[preset.value]
    minutes = chosen.minutes if minutes is None else minutes
    check_minutes(minutes)
    if minutes < chosen.least_minutes:
        raise refuse(f"--minutes is {minutes:g}; {preset.value} needs at least {chosen.least_minutes:g}.")
    out = Path("runs") / preset.value if out is None else out
    try:
        where = resolve_device(device)
        if chosen.needs_gpu and where.type == "cpu" and device is None:
            raise KangarooError(
                f"the preset {preset.value} needs a CUDA GPU and PyTorch sees none here; --preset smoke needs none, "
                "and --device cpu insists (one update takes a CPU many minutes)."
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise KangarooError(f"{out} is a file or not empty; give a new folder with --out.")
        command = ["python", "tools/train_demo.py", "--preset", preset.value, "--minutes", f"{minutes:g}"]
        with bars() as report:
            about = {"preset": preset.value, "command": shlex.join(command)}
            record = train_pair(chosen, out, minutes, where, about, report)
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


@app.command()
@told()
def target(
    out: Annotated[Path, typer.Option(help="Folder of the run; the target lands in OUT/target.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Training time, evaluation included.")] = 80.0,
) -> None:
    """Train the demo pair's tokenizer and target."""
    check_minutes(minutes)
    recipe = TargetRecipe()
    torch.manual_seed(recipe.seed)
    folder = out / "target"
    folder.mkdir(parents=True, exist_ok=True)
    state_path = out / "target_state.pt"

    documents = stdlib_documents()
    seen = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    console = Console(stderr=True)
    tokenizer = train_tokenizer(seen, recipe.vocab_size, show_progress=console.is_terminal)
    tokenizer.save_pretrained(folder)
    windows = Windows(encode(tokenizer, seen), recipe.seed)
    valid = encode(tokenizer, held_out)
    valid_characters = sum(len(document.text) for document in held_out)
    probe = valid[: 1 << 15]
    probe_characters = characters_of(tokenizer, probe)

    training = TargetTraining(recipe, tokenizer, windows, torch.device("cpu"))
    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "minutes": minutes,
        "parameters": training.parameters,
        "corpus": {
            "python": platform.python_version(),
            "files": len(seen),
            "tokens": len(windows.tokens),
            "held_out_files": len(held_out),
            "held_out_tokens": len(valid),
            "held_out_characters": valid_characters,
        },
        "machine": {"cpu_threads": torch.get_num_threads(), "torch": torch.__version__},
        "curve_is_of": "the first 32768 held-out tokens; held_out is of all of them",
        "curve": [],
    }
    step, elapsed = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        training.load_state_dict(state["training"])
        step, elapsed, record["curve"] = state["step"], state["elapsed"], state["curve"]
        windows.generator.manual_seed(recipe.seed + step)

    def checkpoint() -> None:
        partial = state_path.with_suffix(".partial")
        state = {"training": training.state_dict(), "step": step, "elapsed": elapsed, "curve": record["curve"]}
        torch.save(state, partial)
        partial.replace(state_path)
        write_json(folder / "training.json", record)

    budget = minutes * 60
    next_probe = elapsed + 180
    losses: list[float] = []
    columns = (
        SpinnerColumn(),
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("target", total=int(budget), loss="")
        while elapsed < budget:
            began = time.perf_counter()
            losses.append(float(training.update(elapsed / budget)))
            step += 1
            elapsed += time.perf_counter() - began
            if elapsed >= next_probe:
                began = time.perf_counter()
                scores = evaluate(training.model, probe, probe_characters, recipe.context)
                mean_loss = sum(losses) / len(losses)
                record["curve"].append(
                    {"step": step, "minutes": round(elapsed / 60, 2), "train_loss": round(mean_loss, 4)}
                    | {name: round(score, 4) for name, score in scores.items()}
                )
                losses.clear()
                elapsed += time.perf_counter() - began
                next_probe = elapsed + 180
                checkpoint()
                progress.console.print(record["curve"][-1])
            progress.update(bar, completed=int(elapsed), loss=f"step {step} loss {losses[-1] if losses else 0:.3f}")

    record["steps"] = step
    record["tokens_trained"] = step * recipe.batch_tokens
    training.save(folder)
    record["held_out"] = evaluate(training.model, valid, valid_characters, recipe.context)
    checkpoint()
    typer.echo(json.dumps(record["held_out"]))


def utf8_files(documents: list[Document]) -> tuple[Path, ...]:
    """The documents that are files in UTF-8 (a few sources declare another encoding)."""
    files = []
    for document in documents:
        if document.file is not None:
            try:
                document.file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            files.append(document.file)
    return tuple(files)


@app.command()
@told()
def adapter(
    out: Annotated[Path, typer.Option(help="Folder of the run; the adapter lands in OUT/adapter.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time for the training steps.")] = 20.0,
    exit_layer: Annotated[int, typer.Option(min=1, help="Layers of the target before the adapter.")] = 2,
    name: Annotated[str, typer.Option(help="Folder of the adapter within OUT.")] = "adapter",
    windows: Annotated[int, typer.Option(min=1, help="Windows of self-generated text.")] = 4096,
) -> None:
    """Train the adapter on text that the target wrote itself, from training files' beginnings."""
    check_minutes(minutes)
    documents = stdlib_documents()
    settings = TrainingSettings(
        model=str(out / "target"),
        data=utf8_files([document for document in documents if not document.held_out]),
        held_out=utf8_files([document for document in documents if document.held_out]),
        exit_layer=exit_layer,
        out=out / name,
        self_generated=True,
        generated_windows=windows,
        num_attention_heads=8,
        batch_size=8,
        reuse=8,
        learning_rate=2e-2,
        minutes=minutes,
        sequence_length=256,
    )
    with bars() as report_step:
        report = train_adapter(settings, report_step)
    typer.echo(json.dumps({key: value for key, value in report.items() if key.startswith("top1")}))


PROMPTS = {
    "functools.py": "def _c3_merge(",
    "multiprocessing/connection.py": "class Listener(",
    "unittest/suite.py": "class TestSuite(",
    "asyncio/events.py": "class TimerHandle(",
    "distutils/version.py": "class StrictVersion ",
    "lib2to3/pgen2/tokenize.py": "class Untokenizer:",
    "test/test_fractions.py": "class FractionTest(",
    "test/test_weakset.py": "class TestWeakSet(",
}
"""Held-out files and where in them the demo's prompts begin."""


def cut_prompt(text: str, beginning: str, characters: int = 480) -> str:
    """From ``beginning`` on, whole lines, about ``characters`` of them.

    Without the last newline: a line's end and the next one's indentation are one token, and a newline alone is what
    files end with.
    """
    start = text.index(beginning)
    return text[start : text.index("\n", start + characters)]


CALIBRATION_PROMPTS = {
    "argparse.py": "class HelpFormatter(",
    "json/encoder.py": "class JSONEncoder(",
    "tarfile.py": "class _Stream:",
    "sched.py": "class scheduler:",
    "test/test_queue.py": "class BaseQueueTestMixin(",
    "logging/handlers.py": "class BaseRotatingHandler(",
}
"""Training files and where in them the calibration's prompts begin; the demo's prompts judge the result."""


@app.command("calibrate")
@told()
def calibrate_pair(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    name: Annotated[str, typer.Option(help="Folder of the adapter within OUT.")] = "adapter",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a decode.")] = 128,
) -> None:
    """Set the adapter's default draft length and threshold by measuring on this machine."""
    documents = {document.path: document for document in stdlib_documents()}
    prompts = [cut_prompt(documents[path].text, beginning) for path, beginning in CALIBRATION_PROMPTS.items()]
    rows = calibrate(Kangaroo.from_pretrained(out / "target", out / name), prompts, new_tokens)
    show(rows[:12])
    write_defaults(out / name, rows[0], rows)


@app.command()
@told()
def ship(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    pair: Annotated[Path, typer.Option(help="Where the package keeps its pair.")] = Path("model/demo_pair"),
) -> None:
    """Copy target, adapter and prompts from held-out files into the package."""
    documents = {document.path: document for document in stdlib_documents()}
    prompts = []
    for path, beginning in PROMPTS.items():
        if not documents[path].held_out:
            raise typer.BadParameter(f"{path} was trained on; prompts must come from held-out files.")
        prompts.append({"name": path, "prompt": cut_prompt(documents[path].text, beginning)})
    for part in ("target", "adapter"):
        (pair / part).mkdir(parents=True, exist_ok=True)
        for file in sorted((out / part).glob("*.json")):
            shutil.copy(file, pair / part / file.name)
        tensors = load_file(out / part / "model.safetensors")
        rounded = {name: exact_in_both_halves(tensor).bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(rounded, pair / part / "model.safetensors", metadata={"format": "pt"})
    write_json(pair / "prompts.json", prompts)
    size = sum(file.stat().st_size for file in pair.rglob("*") if file.is_file())
    typer.echo(f"{pair}: {size:,} bytes")


if __name__ == "__main__":
    app()
