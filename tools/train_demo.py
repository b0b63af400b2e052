"""Train the demo pair on the Python standard library: a tokenizer, a small, deep Llama, and its adapter.

    python tools/train_demo.py target --out runs/demo --minutes 72
    python tools/train_demo.py adapter --out runs/demo --minutes 20
    python tools/train_demo.py calibrate --out runs/demo
    python tools/train_demo.py ship --out runs/demo

The target's learning rates follow the share of the time that has passed, so a run fits its ``--minutes`` on any
machine. Muon (Jordan et al., 2024; the update scaled as in arXiv 2502.16982) turns the matrices, AdamW the rest. A
stopped run goes on from its last checkpoint. Every setting and the learning curve land in ``training.json`` beside the
weights.
"""

import json
import math
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from calibrate import calibrate, show, write_defaults
from demo_corpus import Document, stdlib_documents
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.train import TrainingSettings, train_adapter

END_OF_TEXT = "<|endoftext|>"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class TargetRecipe:
    """Every setting of the target's training."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 352
    num_hidden_layers: int = 14
    num_attention_heads: int = 3
    context: int = 512
    short_context: int = 256  # attention's backward pass is half of a CPU's time at 512: most steps run shorter
    short_share: float = 0.8
    batch_tokens: int = 8192
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.01
    decay_from: float = 0.3  # the learning rates fall to zero in a straight line from this share of the time on
    clip: float = 1.0
    seed: int = 0


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words keep a newline and the indentation after it together."""
    tokenizer = Tokenizer(models.BPE())
    words = r" ?[A-Za-z_]+| ?[0-9]{1,3}|(?:\r?\n)+[ ]*| ?[^\sA-Za-z_0-9]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> torch.Tensor:
    """All documents as one row of tokens, each behind an end-of-text token: [N] int64."""
    rows = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return torch.tensor([token for row in rows for token in row.ids])


class Windows:
    """Windows of the corpus in random order, every token once an epoch, from a random phase each time."""

    def __init__(self, tokens: torch.Tensor, seed: int) -> None:
        self.tokens = tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.starts: list[int] = []
        self.length = 0

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """[rows, length + 1] int64."""
        if length != self.length or len(self.starts) < rows:
            phase = int(torch.randint(length, (), generator=self.generator))
            starts = torch.arange(phase, len(self.tokens) - length - 1, length)
            self.starts = starts[torch.randperm(len(starts), generator=self.generator)].tolist()
            self.length = length
        picked, self.starts = self.starts[:rows], self.starts[rows:]
        return torch.stack([self.tokens[start : start + length + 1] for start in picked])


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, characters: int, context: int) -> dict[str, float]:
    """Held-out bits per character and top-1 accuracy of ``model`` over ``tokens``, in windows of ``context``."""
    model.eval()
    bits, right, counted = 0.0, 0, 0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1]
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        bits += float(F.cross_entropy(logits, window[1:], reduction="sum")) / math.log(2)
        right += int((logits.argmax(-1) == window[1:]).sum())
        counted += len(window) - 1
    model.train()
    return {"bits_per_character": bits / characters, "top1_accuracy": right / counted}


def learning_rate_factor(share: float, recipe: TargetRecipe) -> float:
    """Warm-up, plateau and straight decay over the share of the time that has passed."""
    return min(share / recipe.warmup_share, 1.0, max(0.0, 1 - share) / (1 - recipe.decay_from))


def exact_in_both_halves(weight: torch.Tensor) -> torch.Tensor:
    """Round to numbers that bf16 and fp16 both hold exactly, so that either may store the weights."""
    return weight.bfloat16().half().to(weight.dtype)


@app.command()
def target(
    out: Annotated[Path, typer.Option(help="Folder of the run; the target lands in OUT/target.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Training time, evaluation included.")] = 80.0,
) -> None:
    """Train the tokenizer and the target."""
    recipe = TargetRecipe()
    torch.manual_seed(recipe.seed)
    folder = out / "target"
    folder.mkdir(parents=True, exist_ok=True)
    state_path = out / "target_state.pt"

    documents = stdlib_documents()
    seen = [document for document in documents if not document.held_out]
    held_out = [document for document in documents if document.held_out]
    tokenizer = train_tokenizer(seen, recipe.vocab_size)
    tokenizer.save_pretrained(folder)
    windows = Windows(encode(tokenizer, seen), recipe.seed)
    valid = encode(tokenizer, held_out)
    valid_characters = sum(len(document.text) for document in held_out)
    probe = valid[: 1 << 15]
    probe_characters = len(tokenizer.decode(probe.tolist(), skip_special_tokens=True))

    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_attention_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    for layer in model.model.layers:  # every block starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    base_rates = {muon: recipe.muon_lr, adamw: recipe.adamw_lr}

    record: dict[str, Any] = {
        "recipe": asdict(recipe),
        "minutes": minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
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
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        step, elapsed, record["curve"] = state["step"], state["elapsed"], state["curve"]
        windows.generator.manual_seed(recipe.seed + step)

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "muon": muon.state_dict(), "adamw": adamw.state_dict()}
        partial = state_path.with_suffix(".partial")
        torch.save({**state, "step": step, "elapsed": elapsed, "curve": record["curve"]}, partial)
        partial.replace(state_path)
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")

    model.train()
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
            share = elapsed / budget
            for optimizer, rate in base_rates.items():
                for group in optimizer.param_groups:
                    group["lr"] = rate * learning_rate_factor(share, recipe)
            length = recipe.short_context if share < recipe.short_share else recipe.context
            batch = windows.batch(recipe.batch_tokens // length, length)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in base_rates:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            step += 1
            elapsed += time.perf_counter() - began
            if elapsed >= next_probe:
                began = time.perf_counter()
                scores = evaluate(model, probe, probe_characters, recipe.context)
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
    for parameter in model.parameters():
        parameter.data = exact_in_both_halves(parameter.data)
    model.to(torch.bfloat16).save_pretrained(folder)
    record["held_out"] = evaluate(model.float(), valid, valid_characters, recipe.context)
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
def adapter(
    out: Annotated[Path, typer.Option(help="Folder of the run; the adapter lands in OUT/adapter.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Time for the training steps.")] = 20.0,
    exit_layer: Annotated[int, typer.Option(help="Layers of the target before the adapter.")] = 2,
    name: Annotated[str, typer.Option(help="Folder of the adapter within OUT.")] = "adapter",
    windows: Annotated[int, typer.Option(help="Windows of self-generated text.")] = 4096,
) -> None:
    """Train the adapter on text that the target wrote itself, from training files' beginnings."""
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
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}")) as progress:
        bars: dict[str, TaskID] = {}

        def report_step(stage: str, done: int, total: int, note: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(bars[stage], completed=done, note=note)

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
def calibrate_pair(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    name: Annotated[str, typer.Option(help="Folder of the adapter within OUT.")] = "adapter",
    new_tokens: Annotated[int, typer.Option(help="Tokens a decode.")] = 128,
) -> None:
    """Set the adapter's default draft length and threshold by measuring on this machine."""
    documents = {document.path: document for document in stdlib_documents()}
    prompts = [cut_prompt(documents[path].text, beginning) for path, beginning in CALIBRATION_PROMPTS.items()]
    rows = calibrate(Kangaroo.from_pretrained(out / "target", out / name), prompts, new_tokens)
    show(rows[:12])
    write_defaults(out / name, rows[0], rows)


@app.command()
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
    (pair / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    size = sum(file.stat().st_size for file in pair.rglob("*") if file.is_file())
    typer.echo(f"{pair}: {size:,} bytes")


if __name__ == "__main__":
    app()
