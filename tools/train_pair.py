"""One pair in one go: sources, tokenizer, target, adapter, defaults, held-out prompts, within so many minutes.

The folder is laid out as the bundled pair's: ``target/``, ``adapter/`` and ``prompts.json``, each part with the record
of its training, and ``training.json`` over all. Every stage ends at its share of the minutes, and each does at least
the least that leaves a whole pair. Nothing needs a network.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from calibrate import calibrate_until, write_defaults
from demo_corpus import HELD_OUT_PERCENT, NEAR_COPY_SHARE, Document, cut_prompts, installed_documents
from presets import AdapterRecipe, Preset
from target_training import TargetTraining, Windows, encode, evaluate, train_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import kangaroo_kernels
from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.trainer import train_adapter

PROBES = 12
"""Points of the learning curve."""

HELD_OUT_FILES = 48
"""Of which the adapter's agreement is measured."""

Report = Callable[[str, int, int, str], None]
"""How a run tells what it is doing: ``(stage, done, total, note)``."""


class Timetable:
    """When a stage began and how long it took, and when the ones to come must end, on ``time.perf_counter``'s scale."""

    def __init__(self, minutes: float) -> None:
        self.began = time.perf_counter()
        self.seconds = minutes * 60
        self.spent: dict[str, float] = {}

    def at(self, share: float) -> float:
        """The moment at which this share of the minutes has passed."""
        return self.began + share * self.seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage."""
        began = time.perf_counter()
        yield
        self.spent[name] = round(time.perf_counter() - began, 2)


def machine(device: torch.device) -> dict[str, Any]:
    """Where a pair was trained: processor or GPU, and the versions that matter."""
    packages = (kangaroo_kernels, torch, transformers, tokenizers)
    versions = {"python": platform.python_version()} | {module.__name__: module.__version__ for module in packages}
    if device.type != "cuda":
        return {"gpu": None, "cpu_threads": torch.get_num_threads(), "versions": versions}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "memory_gb": round(gpu.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def beginning(documents: list[Document], characters: int) -> list[Document]:
    """The first documents, until they have this many characters."""
    taken, total = [], 0
    for document in documents:
        if total >= characters:
            break
        taken.append(document)
        total += len(document.text)
    return taken


def characters_of(tokenizer: PreTrainedTokenizerFast, tokens: Tensor) -> int:
    """How many characters of text these tokens are."""
    return len(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def train_target(
    training: TargetTraining,
    preset: Preset,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Tensor,
    folder: Path,
    timetable: Timetable,
    report: Report,
) -> dict[str, Any]:
    """Train until the target's share of the time or its steps are over, measure, and write ``folder``.

    Args:
        held_out: ``[N]`` tokens on the training's device.

    Returns:
        The record, which is also ``training.json`` of ``folder``.
    """
    recipe, device = training.recipe, training.device
    compiled = device.type == "cuda" and training.compile_layers()
    probe = held_out[: preset.probe_tokens]
    probe_characters = characters_of(tokenizer, probe)
    began = time.perf_counter()
    seconds = max(timetable.at(preset.target_by) - began, 1e-3)
    step, share, loss = 0, 0.0, torch.zeros(())
    losses: list[Tensor] = []
    curve: list[dict[str, float]] = []
    while step == 0 or share < 1:
        earlier, loss = loss, training.update(share)
        losses.append(loss)
        step += 1
        shown = float(earlier)  # the step before: waiting for this one would leave the GPU idle meanwhile
        passed = time.perf_counter() - began
        share = max(passed / seconds, 0.0 if preset.target_steps is None else step / preset.target_steps)
        report("target", int(1000 * min(share, 1)), 1000, f"step {step}, loss {shown:.3f}" if step > 1 else "step 1")
        if share * PROBES >= len(curve) + 1 or share >= 1:
            scores = evaluate(training.model, probe, probe_characters, recipe.context, recipe.pass_tokens)
            mean_loss = float(torch.stack(losses).mean())
            point = {"step": step, "minutes": passed / 60, "train_loss": mean_loss, **scores}
            curve.append({name: round(value, 4) for name, value in point.items()})
            losses.clear()
    training_seconds = time.perf_counter() - began
    training.save(folder)
    valid = held_out[: preset.held_out_tokens]
    scores = evaluate(training.model, valid, characters_of(tokenizer, valid), recipe.context, recipe.pass_tokens)
    record = {
        "recipe": asdict(recipe),
        "parameters": training.parameters,
        "compiled": compiled,
        "steps": step,
        "tokens_trained": step * recipe.batch_tokens,
        "tokens_per_second": round(step * recipe.batch_tokens / training_seconds),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else None,
        "curve_is_of": f"the first {len(probe)} held-out tokens; held_out is of {len(valid)}, with the stored weights",
        "curve": curve,
        "held_out": scores,
    }
    write_json(folder / "training.json", record)
    return record


def adapter_settings(
    recipe: AdapterRecipe,
    out: Path,
    seen: list[Document],
    held_out: list[Document],
    device: torch.device,
    minutes: float,
) -> TrainingSettings:
    """The adapter's training on the beginning of the training files, half of it on what the target writes itself."""
    limits = {"minutes": minutes} if recipe.steps is None else {"steps": recipe.steps}
    return TrainingSettings(
        model=str(out / "target"),
        data=tuple(document.file for document in beginning(seen, recipe.characters) if document.file is not None),
        held_out=tuple(document.file for document in held_out[:HELD_OUT_FILES] if document.file is not None),
        exit_layer=recipe.exit_layer,
        out=out / "adapter",
        self_generated=True,
        generated_windows=recipe.generated_windows,
        generated_at_once=recipe.generated_at_once,
        num_attention_heads=recipe.num_attention_heads,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        sequence_length=recipe.sequence_length,
        device=str(device),
        **limits,
    )


def find_defaults(
    preset: Preset, out: Path, prompts: list[str], device: torch.device, deadline: float, report: Report
) -> list[dict[str, float]]:
    """Make the fastest setting that there is time to find the adapter's default; what was measured, best first."""
    plan = preset.calibration
    settings = [(length, threshold) for threshold in plan.thresholds for length in plan.lengths]
    kangaroo = Kangaroo.from_pretrained(out / "target", out / "adapter", device=device)
    rows: list[dict[str, float]] = []
    for row in calibrate_until(deadline, kangaroo, prompts, plan.new_tokens, settings):
        rows.append(row)
        report("calibrating", len(rows), len(settings), f"{row['mean_acceptance_length']:.2f} tokens a step")
    rows.sort(key=lambda row: -row["mean_speedup"])
    if rows:
        write_defaults(out / "adapter", rows[0], rows)
    return rows


def write_json(path: Path, content: Any) -> None:
    """One file, a line at its end."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def train_pair(
    preset: Preset, out: Path, minutes: float, device: torch.device, about: dict[str, Any], report: Report
) -> dict[str, Any]:
    """Train a pair into ``out``, an empty or new folder.

    Args:
        about: what else belongs at the beginning of the record: the command.

    Returns:
        The record, which is also ``training.json`` of ``out``.

    Raises:
        KangarooError: the sources of this machine do not suffice.
    """
    timetable = Timetable(minutes)
    transformers.logging.disable_progress_bar()  # of loading a checkpoint, in the midst of ours
    torch.manual_seed(preset.target.seed)
    for part in ("target", "adapter"):
        (out / part).mkdir(parents=True, exist_ok=True)

    with timetable.stage("sources"):
        report("reading sources", 0, 1, "")
        documents = installed_documents(preset.packages, preset.max_characters)
        seen = [document for document in documents if not document.held_out]
        held_out = [document for document in documents if document.held_out]
        prompts = cut_prompts(held_out, preset.prompts, preset.prompt_characters)
        practice = cut_prompts(seen, preset.calibration.prompts, preset.prompt_characters)
        if not prompts or not practice:
            raise KangarooError(f"only {len(seen)} sources are installed here, {len(held_out)} of them held out.")
        report("reading sources", 1, 1, f"{sum(len(document.text) for document in documents) / 1e6:.1f} MB")
    with timetable.stage("tokenizer"):
        report("tokenizer", 0, 1, "")
        tokenizer = train_tokenizer(beginning(seen, preset.tokenizer_characters), preset.target.vocab_size)
        tokenizer.save_pretrained(out / "target")
        report("tokenizer", 1, 1, "")
    with timetable.stage("encoding"):
        valid = encode(tokenizer, beginning(held_out, 8 * preset.held_out_tokens)).to(device)
        tokens = encode(
            tokenizer,
            seen,
            timetable.at(preset.encoded_by),
            lambda done, total: report("encoding", done, total, "files"),
        ).to(device)

    with timetable.stage("target"):
        training = TargetTraining(preset.target, tokenizer, Windows(tokens, preset.target.seed), device)
        target = train_target(training, preset, tokenizer, valid, out / "target", timetable, report)
        del training  # frees the GPU for the adapter's
    with timetable.stage("adapter"):
        deadline = timetable.at(preset.adapter_by)
        left = max(0.01, round((deadline - time.perf_counter()) / 60, 2))
        settings = adapter_settings(preset.adapter, out, seen, held_out, device, left)
        adapter = train_adapter(settings, report, deadline)
    with timetable.stage("calibration"):
        rows = find_defaults(preset, out, list(practice.values()), device, timetable.at(preset.calibrated_by), report)

    write_json(out / "prompts.json", [{"name": name, "prompt": prompt} for name, prompt in prompts.items()])
    record = {
        **about,
        "minutes": minutes,
        "machine": machine(device),
        "seconds": timetable.spent,
        "corpus": {
            "files": len(seen),
            "characters": sum(len(document.text) for document in seen),
            "encoded_files": int((tokens == tokenizer.bos_token_id).sum()),
            "tokens": len(tokens),
            "held_out_files": len(held_out),
            "held_out_tokens": len(valid),
            "split": f"by a hash of the path, {HELD_OUT_PERCENT} % held out; no text twice; without the held-out files "
            f"of whose long lines more than {NEAR_COPY_SHARE:.0%} are in training files",
        },
        "parameters": {"target": target["parameters"], "adapter": adapter["parameters"]},
        "tokens_trained": {"target": target["tokens_trained"], "adapter": adapter["tokens"]},
        "held_out": target["held_out"] | {key: value for key, value in adapter.items() if key.startswith("top1")},
        "defaults": rows[0] if rows else None,
    }
    write_json(out / "training.json", record)
    return record
