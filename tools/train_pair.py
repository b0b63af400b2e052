"""One pair, stage by stage: sources, tokenizer, target, adapter, defaults, held-out prompts.

The folder is laid out as the bundled pair's: ``target/``, ``adapter/`` and ``prompts.json``, each part with the record
of its training, and ``training.json`` over all. Each stage does at least the least that leaves a whole pair. Nothing
needs a network.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from calibrate import Row, calibrate, write_defaults
from demo_corpus import Document, beginning, cut_prompts
from presets import Preset
from safetensors.torch import load_file, save_file
from target_training import TargetTraining, Windows, encode, evaluate, exact_in_both_halves, train_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.commands.facts import environment
from kangaroo_kernels.model.demo import bundled_pair
from kangaroo_kernels.model.training.checkpoint import write_atomically
from kangaroo_kernels.model.training.settings import ProgressReport, TrainingSettings
from kangaroo_kernels.model.training.trainer import train_adapter

RUN_FILE = "run.json"
TARGET_STATE = "target_state.pt"
HELD_OUT_FILES = 64
"""Of which the adapter's agreement is measured, at most."""


@dataclass
class Run:
    """One run of a preset.

    Attributes:
        about: what stands at the beginning of the record; a stopped run goes on where it is the same.
        report: is told ``(stage, done, total, note)``.
        began: on ``time.perf_counter``'s scale.
        seconds: what each stage took, over all starts of the run.
    """

    preset: Preset
    out: Path
    minutes: float
    device: torch.device
    about: dict[str, Any]
    report: ProgressReport
    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def open(self) -> None:
        """Go on where a stopped run like this one lies, or begin in a folder that is new or empty.

        Raises:
            KangarooError: the folder holds something else.
        """
        if (self.out / RUN_FILE).is_file():
            saved = json.loads((self.out / RUN_FILE).read_text())
            if saved["about"] != self.about:
                raise KangarooError(f"{self.out} holds a stopped run of other settings; finish it or give a new --out.")
            self.seconds = saved["seconds"]
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise KangarooError(f"{self.out} is a file or not empty; give a new folder with --out.")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 2)
            if self.out.is_dir() and not self.preset.within_minutes:
                write_json(self.out / RUN_FILE, {"about": self.about, "seconds": self.seconds})

    def deadline(self, share: float) -> float:
        """When this share of the minutes has passed; never, where the run need not end within them."""
        return self.began + share * self.minutes * 60 if self.preset.within_minutes else math.inf


def write_json(path: Path, content: Any) -> None:
    """One file, a line at its end."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def held_out_prompts(preset: Preset, held_out: list[Document]) -> dict[str, str]:
    """The prompts that go with the pair, by the paths of their documents.

    Raises:
        KangarooError: a prompt of the bundled pair is not in a held-out document of this Python.
    """
    if preset.prompts is not None:
        return cut_prompts(held_out, preset.prompts, preset.prompt_characters)
    prompts, texts = bundled_pair().prompts(), {document.path: document.text for document in held_out}
    missing = [name for name, prompt in prompts.items() if prompt not in texts.get(name, "")]
    if missing:
        raise KangarooError(f"the standard library here has other held-out sources: no prompt from {missing[0]}.")
    return prompts


def train_target(run: Run, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, held_out: Tensor) -> None:
    """Train until the target's time or its steps are over, measure, and write its folder with its record.

    Args:
        tokens: ``[N]`` int32 to train on, and ``held_out`` to measure on; both lie on the run's device.
    """
    preset, recipe, state = run.preset, run.preset.target, run.out / TARGET_STATE
    training = TargetTraining(recipe, tokenizer, Windows(tokens, recipe.seed), run.device)

    def scores(count: int) -> dict[str, float]:
        return evaluate(training.model, tokenizer, held_out[:count], recipe.context, recipe.pass_tokens)

    step, share, passed, losses, curve = 0, 0.0, 0.0, list[Tensor](), list[dict[str, float]]()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        step, share, passed, curve = (saved[name] for name in ("step", "share", "passed", "curve"))
        training.load_state_dict(saved["training"], step)
    began = time.perf_counter() - passed
    own = (preset.target_by - preset.encoded_by) * run.minutes * 60
    seconds = max(run.deadline(preset.target_by) - began if preset.within_minutes else own, 1e-3)
    while step == 0 or share < 1:
        losses.append(training.update(share))
        step += 1
        # the loss of the step before: waiting for this one would leave the GPU idle meanwhile
        note = f"step {step}, loss {float(losses[-2]):.3f}" if len(losses) > 1 else f"step {step}"
        passed = time.perf_counter() - began
        share = max(passed / seconds, step / preset.target_steps)
        run.report("target", int(1000 * min(share, 1)), 1000, note)
        if share * preset.probes >= len(curve) + 1 or share >= 1:
            point = {"step": step, "minutes": passed / 60, "train_loss": float(torch.stack(losses).mean())}
            curve.append({name: round(value, 4) for name, value in (point | scores(preset.probe_tokens)).items()})
            losses.clear()
            if not preset.within_minutes:
                at = {"step": step, "share": share, "passed": time.perf_counter() - began, "curve": curve}
                write_atomically(state, at | {"training": training.state_dict()})
    training.save(run.out / "target")
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "steps": step,
        "tokens_trained": step * recipe.batch_tokens,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if run.device.type == "cuda" else None,
        "curve_is_of": f"the first {preset.probe_tokens} held-out tokens; held_out is of all, with the stored weights",
        "curve": curve,
        "held_out": scores(preset.held_out_tokens),
    }
    write_json(run.out / "target" / "training.json", record)
    state.unlink(missing_ok=True)


def train_its_adapter(run: Run, seen: list[Document], held_out: list[Document]) -> None:
    """Train the adapter, half of it on what the target writes itself."""
    preset = run.preset
    minutes = (preset.adapter_by - preset.target_by) * run.minutes
    files, measured = (
        tuple(document.file for document in documents if document.file is not None)
        for documents in (beginning(seen, preset.adapter_characters), held_out)
    )
    settings = TrainingSettings(
        model=str(run.out / "target"),
        data=files,
        held_out=measured[:HELD_OUT_FILES],
        out=run.out / "adapter",
        self_generated=True,
        minutes=None if "steps" in preset.adapter else minutes,
        device=str(run.device),
        **preset.adapter,
    )
    train_adapter(settings, run.report, run.deadline(preset.adapter_by))


def round_weights(file: Path) -> None:
    """Round the weights of a checkpoint to numbers that bf16 and fp16 both hold, as the target's are."""
    rounded = {name: exact_in_both_halves(weight).contiguous() for name, weight in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})


def find_defaults(run: Run, prompts: list[str]) -> list[Row]:
    """Make the fastest setting that there is time to find the adapter's default; what was measured, best first."""
    kangaroo = Kangaroo.from_pretrained(run.out / "target", run.out / "adapter", device=run.device)
    rows = calibrate(kangaroo, prompts, run.preset.calibration, run.deadline(run.preset.calibrated_by), run.report)
    if rows:
        write_defaults(run.out / "adapter", rows)
    return rows


def train_pair(run: Run) -> dict[str, Any]:
    """Train a pair into ``run.out``; the record, which is also its ``training.json``.

    Raises:
        KangarooError: the folder cannot serve, or the sources of this machine do not suffice.
    """
    preset, out = run.preset, run.out
    run.open()
    transformers.logging.disable_progress_bar()  # of loading a checkpoint, in the midst of ours
    torch.manual_seed(preset.target.seed)
    with run.stage("sources"):
        run.report("sources", 0, 1, "")
        documents = preset.sources()
        seen = [document for document in documents if not document.held_out]
        held_out = [document for document in documents if document.held_out]
        prompts = held_out_prompts(preset, held_out)
        practice = cut_prompts(seen, preset.practice, preset.prompt_characters)
        if not prompts or not practice:
            raise KangarooError(f"only {len(seen)} sources are installed here, {len(held_out)} of them held out.")
        run.report("sources", 1, 1, f"{len(documents)} files")
        (out / "target").mkdir(parents=True, exist_ok=True)
        write_json(out / "prompts.json", [{"name": name, "prompt": prompt} for name, prompt in prompts.items()])
    with run.stage("tokenizer"):
        run.report("tokenizer", 0, 1, "")
        tokenizer = train_tokenizer(beginning(seen, preset.tokenizer_characters), preset.target.vocab_size)
        tokenizer.save_pretrained(out / "target")
        run.report("tokenizer", 1, 1, "")
    with run.stage("encoding"):
        valid = encode(tokenizer, beginning(held_out, 8 * preset.held_out_tokens)).to(run.device)
        tokens = encode(tokenizer, seen, run.deadline(preset.encoded_by), run.report).to(run.device)
    with run.stage("target"):
        if not (out / "target" / "training.json").exists():
            train_target(run, tokenizer, tokens, valid)
    with run.stage("adapter"):
        if not (out / "adapter" / "training.json").exists():
            train_its_adapter(run, seen, held_out)
        round_weights(out / "adapter" / "model.safetensors")
    with run.stage("calibration"):
        rows = find_defaults(run, list(practice.values()))

    target, adapter = (json.loads((out / part / "training.json").read_text()) for part in ("target", "adapter"))
    here = environment()
    record = {
        **run.about,
        "minutes": run.minutes,
        "machine": {"cpu_threads": torch.get_num_threads(), "devices": here.devices, "versions": here.versions},
        "seconds": run.seconds,
        "corpus": {
            "files": len(seen),
            "characters": sum(len(document.text) for document in seen),
            "encoded_files": int((tokens == tokenizer.bos_token_id).sum()),
            "tokens": len(tokens),
            "held_out_files": len(held_out),
            "held_out_tokens": len(valid),
        },
        "parameters": {"target": target["parameters"], "adapter": adapter["parameters"]},
        "tokens_trained": {"target": target["tokens_trained"], "adapter": adapter["tokens"]},
        "held_out": target["held_out"] | {key: value for key, value in adapter.items() if key.startswith("top1")},
        "defaults": rows[0] if rows else None,
    }
    write_json(out / "training.json", record)
    (out / RUN_FILE).unlink(missing_ok=True)
    return record
