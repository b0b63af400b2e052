"""Train a pair: the bundled demo pair, one of a few hundred million parameters, or one to see that it works.

    python tools/train_demo.py --preset large --minutes 8
    python tools/train_demo.py --preset smoke
    python tools/train_demo.py --preset demo

``large`` takes one GPU and the Python sources installed on the machine; ``smoke`` runs the same code in seconds on a
CPU; ``demo`` takes an hour and a half on two CPU cores and the standard library. The same command goes on behind the
last stage (target, adapter) that a stopped run has finished. The folder that comes out is laid out as
``model/demo_pair``, with the records of the training.
"""

import json
import shlex
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from command import refuse, require_time
from demo_corpus import Document, beginning, cut_prompts
from presets import PRESETS, Preset
from report.job import write_json
from safetensors.torch import load_file, save_file
from target_training import TargetTraining, encode, evaluate, exact_in_both_halves, train_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.commands.facts import environment
from kangaroo_kernels.model.commands.show import training_bars
from kangaroo_kernels.model.evaluation.calibrate import calibrate, write_defaults
from kangaroo_kernels.model.load import resolve_device
from kangaroo_kernels.model.training.checkpoint import STATE_FILE
from kangaroo_kernels.model.training.generate_data import WritingSettings, write_data
from kangaroo_kernels.model.training.settings import ProgressReport, TrainingSettings
from kangaroo_kernels.model.training.trainer import train_adapter

NAME, RUN_FILE, RECORD, OWN_TEXTS = "train_demo", "run.json", "training.json", "own_texts.jsonl"
SCORES = ("agreement", "expected_acceptance_length", "mean_acceptance_length")
WRITING_SHARE = 0.35
"""Of the adapter's time, the most that the target writes for."""
HELD_OUT_FILES = 64
"""Of which the adapter's agreement is measured, at most."""
PROBES = 24
"""How often the target is measured on the way, on a sixteenth of the held-out tokens."""
ENCODED_BY, CALIBRATED_BY = 0.12, 0.98
"""The shares of the minutes at which encoding and calibration end."""
PRACTICE = 6
"""Prompts of training files that the defaults are found on."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Run:
    """One run of a preset.

    Attributes:
        about: what stands at the beginning of the record; a stopped run goes on where it is the same.
        report: is told ``(stage, done, total, note)``.
        began: on ``time.perf_counter``'s scale.
    """

    preset: Preset
    out: Path
    minutes: float
    device: torch.device
    about: dict[str, Any]
    report: ProgressReport
    began: float = field(default_factory=time.perf_counter)

    def open(self) -> None:
        """Go on where a stopped run like this one lies, or begin in a folder that is new or empty.

        Raises:
            KangarooError: the folder holds something else.
        """
        if (self.out / RUN_FILE).is_file():
            if json.loads((self.out / RUN_FILE).read_text()) != self.about:
                raise KangarooError(f"{self.out} holds a stopped run of other settings; finish it or give a new --out.")
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise KangarooError(f"{self.out} is a file or not empty; give a new folder with --out.")

    def deadline(self, share: float) -> float:
        """When this share of the minutes has passed, on ``time.perf_counter``'s scale."""
        return self.began + share * self.minutes * 60


def train_target(run: Run, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, held_out: Tensor) -> None:
    """Train until the target's time or its steps are over, measure, and write its folder with its record.

    Args:
        tokens: ``[N]`` int32 to train on, and ``held_out`` to measure on; both lie on the run's device.
    """
    preset, recipe = run.preset, run.preset.target
    training = TargetTraining(recipe, tokenizer, tokens, run.device)

    def scores(count: int) -> dict[str, float]:
        return evaluate(training.model, tokenizer, held_out[:count], recipe.context, recipe.pass_tokens)

    step, share, curve, before = 0, 0.0, list[dict[str, float]](), None
    began = time.perf_counter()
    seconds = max(run.deadline(preset.target_by) - began, 1e-3)
    while step == 0 or share < 1:
        loss = training.update(share)
        step += 1
        # the loss of the step before: waiting for this one would leave the GPU idle meanwhile
        note = f"step {step}" if before is None else f"step {step}, loss {float(before):.3f}"
        before = loss
        passed = time.perf_counter() - began
        share = max(passed / seconds, step / preset.target_steps)
        run.report("target", int(1000 * min(share, 1)), 1000, note)
        if share * PROBES >= len(curve) + 1 or share >= 1:
            point = {"step": step, "minutes": passed / 60, "train_loss": float(loss)}
            point |= scores(preset.held_out_tokens // 16)
            curve.append({name: round(value, 4) for name, value in point.items()})
    training.save(run.out / "target")
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "steps": step,
        "tokens_trained": step * recipe.batch_tokens,
        "curve": curve,
        "held_out": scores(preset.held_out_tokens),
    }
    write_json(run.out / "target" / RECORD, record)


def train_its_adapter(run: Run, seen: list[Document], held_out: list[Document]) -> None:
    """Train the adapter, half of it on what the target writes itself when it continues the other half.

    Its weights fit bf16 and fp16, as the target's. Where it is stopped, the writer's file and the trainer's own
    checkpoints go on.
    """
    preset, out, own, end = run.preset, run.out / "adapter", run.out / OWN_TEXTS, run.deadline(run.preset.adapter_by)
    length = preset.adapter["sequence_length"]
    if not (out / RECORD).exists():
        writing = WritingSettings(
            model=str(run.out / "target"),
            out=own,
            texts=preset.own_texts,
            prompts=_files(beginning(seen, preset.sample)),
            max_new_tokens=length - length // 4,
            at_once=preset.own_at_once,
            minutes=max(WRITING_SHARE * (end - time.perf_counter()) / 60, 1e-3),
            device=str(run.device),
        )
        write_data(writing, run.report)
        as_much = beginning(seen, len(own.read_text(encoding="utf-8")))
        settings = TrainingSettings(
            model=str(run.out / "target"),
            data=(own, *_files(as_much)),
            held_out=_files(held_out)[:HELD_OUT_FILES],
            out=out,
            minutes=None if "steps" in preset.adapter else (preset.adapter_by - preset.target_by) * run.minutes,
            device=str(run.device),
            **preset.adapter,
        )
        train_adapter(settings, run.report, end)
    for leftover in (own, out / STATE_FILE):
        leftover.unlink(missing_ok=True)
    weights = load_file(out / "model.safetensors")
    rounded = {name: exact_in_both_halves(weight).contiguous() for name, weight in weights.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})


def _files(documents: list[Document]) -> tuple[Path, ...]:
    return tuple(document.file for document in documents if document.file is not None)


def train_pair(run: Run) -> dict[str, Any]:
    """Train a pair into ``run.out``; the record, which is also its ``training.json``.

    Raises:
        KangarooError: the folder cannot serve, or the sources of this machine do not suffice.
    """
    preset, out = run.preset, run.out
    run.open()
    transformers.logging.disable_progress_bar()  # of loading a checkpoint, in the midst of ours
    torch.manual_seed(preset.target.seed)
    documents = preset.sources()
    seen = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    prompts = cut_prompts(held_out, preset.prompts, preset.prompt_characters)
    practice = cut_prompts(seen, PRACTICE, preset.prompt_characters)
    if not prompts or not practice:
        raise KangarooError(f"only {len(seen)} sources are installed here, {len(held_out)} of them held out.")
    run.report("sources", 1, 1, f"{len(documents)} files")
    (out / "target").mkdir(parents=True, exist_ok=True)
    write_json(out / RUN_FILE, run.about)
    write_json(out / "prompts.json", [{"name": name, "prompt": prompt} for name, prompt in prompts.items()])
    tokenizer = train_tokenizer(beginning(seen, preset.sample), preset.target.vocab_size)
    tokenizer.save_pretrained(out / "target")
    run.report("tokenizer", 1, 1, "")
    valid = encode(tokenizer, beginning(held_out, 8 * preset.held_out_tokens)).to(run.device)
    tokens = encode(tokenizer, seen, run.deadline(ENCODED_BY), run.report).to(run.device)
    if not (out / "target" / RECORD).exists():
        train_target(run, tokenizer, tokens, valid)
    train_its_adapter(run, seen, held_out)
    kangaroo = Kangaroo.from_pretrained(out / "target", out / "adapter", device=run.device)
    end = run.deadline(CALIBRATED_BY)
    if rows := calibrate(kangaroo, list(practice.values()), preset.calibration, end, run.report):
        write_defaults(out / "adapter", rows)
    target, adapter = (json.loads((out / part / RECORD).read_text()) for part in ("target", "adapter"))
    here = environment()
    record = {
        **run.about,
        "machine": {"cpu_threads": torch.get_num_threads(), "devices": here.devices, "versions": here.versions},
        "corpus": {
            "files": len(seen),
            "tokens": len(tokens),
            "held_out_files": len(held_out),
            "held_out_tokens": len(valid),
        },
        "held_out": target["held_out"] | {key: value for key, value in adapter.items() if key in SCORES},
    }
    write_json(out / RECORD, record)
    (out / RUN_FILE).unlink()
    return record


@app.command(no_args_is_help=True)
def main(
    preset: Annotated[str, typer.Option(help=f"The pair: {', '.join(PRESETS)}.")],
    minutes: Annotated[float | None, typer.Option(help="By default the preset's own.")] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the pair; by default runs/PRESET.")] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.")] = None,
) -> None:
    """Train the pair of a preset: tokenizer, target, adapter and its defaults."""
    if preset not in PRESETS:
        refuse(NAME, f"--preset is {preset}; there are {', '.join(PRESETS)}.")
    chosen = PRESETS[preset]
    minutes = chosen.minutes if minutes is None else minutes
    require_time(NAME, "--minutes", minutes)
    out = Path("runs") / preset if out is None else out
    try:
        where = resolve_device(device)
        if chosen.needs_gpu and where.type == "cpu":
            raise KangarooError(f"{preset} needs a CUDA GPU and there is none here; --preset smoke needs none.")
        command = f"python tools/train_demo.py --preset {preset} --minutes {minutes:g}"
        with training_bars() as report:
            record = train_pair(Run(chosen, out, minutes, where, {"preset": preset, "command": command}, report))
    except (KangarooError, OSError, torch.OutOfMemoryError) as error:
        refuse(NAME, str(error))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in record["held_out"].items())
    typer.echo(f"{out}, on held-out files: {figures}.")
    typer.echo(f"Real acceptance and speed: python tools/gpu_report.py --pair {shlex.quote(str(out))}")


if __name__ == "__main__":
    app()
