"""Train an adapter: soft cross-entropy against the target's own distribution (arXiv 2404.18911, section 3.1).

The target is frozen and runs through transformers, a batch of windows at a time; a hook takes the exit layer's hidden
states as they pass. With ``self_generated`` half of the windows are the target's own continuations of the text, made
alternately greedily and by sampling: what the drafter will meet when decoding.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..demo import find_pair
from ..drafters.adapter import check_exit_layer
from ..errors import KangarooError
from ..load import resolve_device, resolve_dtype
from ..target.checkpoint import find_folder
from ..target.config import LlamaConfig, load_config_values, parse_config
from ..text import load_tokenizer

ProgressReport = Callable[[str, int, int, str], None]
"""How training tells what it is doing: ``(stage, done, total, note)``, after every step."""

STATE_FILE = "training_state.pt"
GENERATED_FILE = "self_generated.pt"
CHECKPOINT_SECONDS = 60.0
HELD_OUT_SHARE = 0.03
HELD_OUT_WINDOWS = 64
FILES_AT_ONCE = 64
GENERATING_SHARE = 0.35
"""Of the time until a deadline, the most that the target writes before the steps begin."""


@dataclass(frozen=True)
class TrainingSettings:
    """Every setting of an adapter's training.

    Attributes:
        model: the target's folder or hub name, or ``demo``: the bundled pair's.
        data: text files.
        exit_layer: how many of the target's layers run before the adapter.
        out: the adapter's folder; a run that was stopped goes on from the state in it.
        self_generated: half of every batch is the target's own continuations of the text.
        held_out: text files to measure on; without them, the last 3 % of the data.
        minutes: time for the steps; None runs exactly ``steps`` of them.
        steps: the number of steps where ``minutes`` is None.
        batch_size: windows a step.
        reuse: how many steps use a window on average. The target's pass costs more than the adapter's, so a slow
            machine learns faster from 4 to 8; the latest ``64 * batch_size`` windows then stay in memory.
        sequence_length: tokens a window.
        generated_windows: how many windows the target writes.
        generated_at_once: how many of them side by side; a GPU writes a thousand as fast as one.
        num_attention_heads: of the adapter (as many key-value heads); None takes the target's numbers.
        learning_rate: of Muon (matrices) and AdamW (norms) at its height; it warms up over 2 % of the run and falls to
            zero in a straight line.
        seed: of the windows and the sampling.
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
    """

    model: str
    data: tuple[Path, ...]
    exit_layer: int
    out: Path
    self_generated: bool = False
    held_out: tuple[Path, ...] = ()
    minutes: float | None = None
    steps: int = 1000
    batch_size: int = 16
    reuse: int = 1
    sequence_length: int = 256
    generated_windows: int = 2048
    generated_at_once: int = 64
    num_attention_heads: int | None = None
    learning_rate: float = 3e-3
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("reuse", 1),
            ("sequence_length", 8),
            ("generated_windows", 1),
            ("generated_at_once", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise KangarooError(f"{name} is {value!r}; it must be a whole number of at least {low}.")
        heads = self.num_attention_heads
        if heads is not None and (not isinstance(heads, int) or heads < 1):
            raise KangarooError(f"num_attention_heads is {heads!r}; it must be a whole number of at least 1.")
        if not 0 < self.learning_rate < 1:
            raise KangarooError(f"learning_rate is {self.learning_rate!r}; it must be above 0 and below 1.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise KangarooError(f"minutes is {self.minutes!r}; it must be a finite number above 0.")
        if not self.data:
            raise KangarooError("no data files were given; give at least one text file.")

    def summary(self) -> dict[str, Any]:
        """The settings as they go into a record: how many files, but not where they lay."""
        paths = {"model": Path(self.model).name, "data": len(self.data), "held_out": len(self.held_out)}
        return {name: value for name, value in asdict(self).items() if name not in ("out", "device")} | paths

    def fingerprint(self) -> str:
        """What must be the same for a stopped run to go on."""
        return json.dumps({**asdict(self), "out": "", "device": ""}, default=str, sort_keys=True)


class AdapterBlock(nn.Module):
    """The adapter's attention layer, with the weights' names of the adapter format."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        hidden, head_dim = config.hidden_size, config.head_dim
        q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.input_layernorm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, q_rows, bias=False),
                "k_proj": nn.Linear(hidden, kv_rows, bias=False),
                "v_proj": nn.Linear(hidden, kv_rows, bias=False),
                "o_proj": nn.Linear(q_rows, hidden, bias=False),
            }
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``h + attention(rms_norm(h))``: ``[B, T, hidden]`` to the same; ``cos`` and ``sin`` are ``[T, D]``."""
        normed = self.input_layernorm(hidden)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), dim=-1) * sin for x in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        projected: Tensor = self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        return hidden + projected


class TrainableAdapter(nn.Module):
    """An adapter as a PyTorch module: its ``state_dict`` is the adapter format (docs/architecture.md)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, sequence_length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AdapterBlock(config)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        angles = torch.arange(sequence_length)[:, None] * config.inv_freq(sequence_length)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, exit_hidden: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the input of the target's head."""
        length = exit_hidden.shape[1]
        normed: Tensor = self.norm(self.layers[0](exit_hidden, self.cos[:length], self.sin[:length]))
        return normed


class Teacher:
    """The frozen target, giving the exit layer's hidden states and the final logits of a batch in one pass.

    ``dtype`` is that of the weights and of what lies between the layers: the one in which the runtime will decode.
    """

    def __init__(self, folder: Path, exit_layer: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self._exit_hidden = torch.empty(0)
        self.model.model.layers[exit_layer].register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        self._exit_hidden = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def __call__(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T]`` tokens to exit hidden states ``[B, T, hidden]`` and logits ``[B, T, V]``, both float32."""
        logits = self.model(input_ids=windows.to(self.device), use_cache=False).logits
        return self._exit_hidden.float(), logits.float()

    @property
    def head(self) -> Tensor:
        """The LM head ``[V, hidden]``."""
        weight: Tensor = self.model.lm_head.weight
        return weight

    @torch.no_grad()
    def continue_text(self, prompts: Tensor, length: int, sample: bool) -> Tensor:
        """``[B, P]`` prompts to ``[B, length]`` windows, written on without stopping at an end-of-text token."""
        settings: dict[str, Any] = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        )
        written: Tensor = self.model.generate(
            prompts.to(self.device),
            attention_mask=torch.ones_like(prompts, device=self.device),
            max_new_tokens=length - prompts.shape[1],
            min_new_tokens=length - prompts.shape[1],
            pad_token_id=0,
            cache_implementation="static",  # a growing cache is copied at every step
            disable_compile=True,  # on a GPU a static cache would have it compiled: minutes for seconds of work
            **settings,
        )
        return written.cpu()


class Lessons:
    """What the target said of the latest ``capacity`` windows, kept to be learned from more than once."""

    def __init__(self, capacity: int) -> None:
        self.kept: deque[tuple[Tensor, Tensor]] = deque(maxlen=capacity)

    def draw(
        self, exit_hidden: Tensor, logits: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Take in the windows of a batch and draw ``count`` of all; a full batch comes back as it is."""
        if len(exit_hidden) == count:
            return exit_hidden, logits
        self.kept.extend(zip(exit_hidden.bfloat16(), logits.bfloat16(), strict=True))
        drawn = [self.kept[index] for index in torch.randint(len(self.kept), (count,), generator=generator).tolist()]
        return torch.stack([pair[0] for pair in drawn]).float(), torch.stack([pair[1] for pair in drawn]).float()


def read_tokens(files: tuple[Path, ...], tokenizer: Any) -> Tensor:
    """All files as one row of tokens: ``[N]`` int64.

    Raises:
        KangarooError: a file that is missing or not UTF-8.
    """
    tokens: list[int] = []
    for start in range(0, len(files), FILES_AT_ONCE):  # a fast tokenizer spreads them over the cores
        texts = []
        for file in files[start : start + FILES_AT_ONCE]:
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise KangarooError(f"data file {file} cannot be read: {error.strerror}.") from error
            except UnicodeDecodeError as error:
                raise KangarooError(f"data file {file} is not UTF-8 text (byte {error.start}).") from error
        for row in tokenizer(texts, verbose=False)["input_ids"]:
            tokens += row
    return torch.tensor(tokens, dtype=torch.int64)


def random_windows(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``[count, length]`` windows from random places of ``tokens``."""
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return tokens.unfold(0, length, 1)[starts]


def generate_windows(
    teacher: Teacher,
    tokens: Tensor,
    settings: TrainingSettings,
    progress: ProgressReport,
    deadline: float = math.inf,
) -> Tensor:
    """The target's continuations of random places in the text: ``[generated_windows, sequence_length]``.

    A quarter of each window is the text's. Kept in ``out`` as they come, so that a stopped run goes on. After
    ``deadline`` no more are begun: there are fewer then, but some.
    """
    path = settings.out / GENERATED_FILE
    done = list(torch.load(path, weights_only=True)) if path.exists() else []
    group = settings.generated_at_once
    while (written := sum(map(len, done))) < settings.generated_windows:
        if done and time.perf_counter() > deadline:
            break
        generator = torch.Generator().manual_seed(settings.seed + 1 + len(done))
        prompts = random_windows(tokens, group, max(1, settings.sequence_length // 4), generator)
        torch.manual_seed(settings.seed + 1 + len(done))
        done.append(teacher.continue_text(prompts, settings.sequence_length, sample=len(done) % 2 == 1))
        write_atomically(path, done)
        progress("generating", written + group, settings.generated_windows, "")
    return torch.cat(done)[: settings.generated_windows]


def write_atomically(path: Path, content: Any) -> None:
    """``torch.save`` that leaves either the old file or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def agreement(teacher: Teacher, adapter: TrainableAdapter, windows: Tensor, batch_size: int) -> float:
    """The share of positions where drafter and target rank the same token first."""
    same = 0
    with torch.no_grad(), _autocast(teacher.device):
        for batch in windows.split(batch_size):
            exit_hidden, logits = teacher(batch)
            guesses = F.linear(adapter(exit_hidden), teacher.head)
            same += int((guesses.argmax(-1) == logits.argmax(-1)).sum())
    return same / windows.numel()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def save_adapter(out: Path, values: dict[str, Any], adapter: TrainableAdapter, dtype: torch.dtype) -> None:
    """Write the adapter format; ``config.json`` comes last, so a folder that has one is whole."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in adapter.state_dict().items()}
    partial = out / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, out / "model.safetensors")
    partial = out / "config.json.partial"
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, out / "config.json")


def adapter_config_values(target_values: dict[str, Any], settings: TrainingSettings) -> dict[str, Any]:
    """The adapter's ``config.json``: the target's, with one layer and without biases."""
    own_heads = {}
    if settings.num_attention_heads is not None:
        heads, head_dim = settings.num_attention_heads, parse_config(target_values).head_dim
        own_heads = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
    dropped = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "id2label", "label2id")
    kept = {name: value for name, value in target_values.items() if value is not None and name not in dropped}
    return {
        **kept,
        "architectures": ["KangarooAdapter"],
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "exit_layer": settings.exit_layer,
        **own_heads,
    }


def train_adapter(
    settings: TrainingSettings, progress: ProgressReport = lambda *_: None, deadline: float = math.inf
) -> dict[str, Any]:
    """Train an adapter and write it to ``settings.out``.

    Args:
        settings: all of it.
        progress: is told after every step.
        deadline: when the steps end at the latest, as ``time.perf_counter`` counts, loading and writing text before
            them included; one step is always made. The learning rate falls towards the limit that comes first.

    Returns:
        A report: settings, steps, tokens seen, the loss over time, and the top-1 agreement on held-out text.

    Raises:
        KangarooError: before any work, for settings, files or folders that cannot serve.
    """
    device = resolve_device(settings.device)
    folder = find_folder(find_pair(settings.model, None)[0], "model")
    target_values = load_config_values(folder, "model")
    check_exit_layer(settings.exit_layer, parse_config(target_values, folder / "config.json"))
    values = adapter_config_values(target_values, settings)
    config = parse_config(values)
    if settings.sequence_length > config.context_length:
        raise KangarooError(
            f"sequence_length is {settings.sequence_length}, the model's context holds {config.context_length}."
        )
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise KangarooError(f"{folder} holds no tokenizer; training on text needs one.")
    tokens = read_tokens(settings.data, tokenizer)
    cut = int(len(tokens) * (1 - HELD_OUT_SHARE))
    held_out = read_tokens(settings.held_out, tokenizer) if settings.held_out else tokens[cut:]
    tokens = tokens if settings.held_out else tokens[:cut]
    measured, more = "held-out text", "more text"
    if not settings.held_out:
        measured += f" (the last {100 * HELD_OUT_SHARE:.0f} % of the data)"
        more = "more data, held-out files"
    for name, row in (("text to train on", tokens), (measured, held_out)):
        if len(row) < settings.sequence_length:
            raise KangarooError(
                f"the {name} has {len(row)} tokens, and one window takes {settings.sequence_length}; give {more} or a "
                "smaller sequence_length."
            )
    if settings.out.exists() and not settings.out.is_dir():
        raise KangarooError(f"{settings.out} is a file; give a folder for the adapter.")
    state_path = settings.out / STATE_FILE
    saved: dict[str, Any] | None = None
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        if saved["fingerprint"] != settings.fingerprint():
            raise KangarooError(
                f"{settings.out} holds a stopped run with other settings; finish it or take a new folder."
            )
    elif (settings.out / "config.json").exists():
        raise KangarooError(f"{settings.out} already holds an adapter; take a new folder.")
    settings.out.mkdir(parents=True, exist_ok=True)

    teacher = Teacher(
        folder, settings.exit_layer, device, resolve_dtype(None, device, parse_config(target_values).dtype)
    )
    valid = random_windows(held_out, HELD_OUT_WINDOWS, settings.sequence_length, torch.Generator().manual_seed(1))
    pool: Tensor | None = None
    valid_own: Tensor | None = None
    if settings.self_generated:
        now = time.perf_counter()
        pool = generate_windows(teacher, tokens, settings, progress, now + GENERATING_SHARE * (deadline - now))
        torch.manual_seed(settings.seed)
        valid_own = teacher.continue_text(
            valid[:, : settings.sequence_length // 4], settings.sequence_length, sample=False
        )

    torch.manual_seed(settings.seed)
    adapter = TrainableAdapter(config, settings.sequence_length).to(device)
    adapter.norm.load_state_dict(teacher.model.model.norm.state_dict())
    matrices = [parameter for parameter in adapter.parameters() if parameter.ndim == 2]
    gains = [parameter for parameter in adapter.parameters() if parameter.ndim == 1]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=settings.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(gains, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    step, elapsed, curve = 0, 0.0, []
    if saved is not None:
        adapter.load_state_dict(saved["adapter"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        step, elapsed, curve = saved["step"], saved["elapsed"], saved["curve"]

    lessons = Lessons(64 * settings.batch_size)
    began = time.perf_counter() - elapsed
    saved_at, losses = time.perf_counter(), []
    steps = settings.steps if settings.minutes is None else math.inf
    seconds = min(math.inf if settings.minutes is None else settings.minutes * 60, max(deadline - began, 1e-3))
    while True:
        share = max(step / steps, (time.perf_counter() - began) / seconds)
        if share >= 1 and step:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * max(0.0, min(share / 0.02 + 0.01, 1 - share))
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (step + 1))
        fresh = max(1, settings.batch_size // settings.reuse)
        own = 0 if pool is None else (fresh + step % 2) // 2
        batch = random_windows(tokens, fresh - own, settings.sequence_length, generator)
        if pool is not None:
            batch = torch.cat((batch, pool[torch.randint(len(pool), (own,), generator=generator)]))
        with _autocast(device):
            exit_hidden, logits = lessons.draw(*teacher(batch), settings.batch_size, generator)
            guesses = F.linear(adapter(exit_hidden), teacher.head)
        loss = F.cross_entropy(guesses.float().flatten(0, 1), logits.softmax(-1).flatten(0, 1))
        adapter.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        step += 1
        note = f"step {step}, loss {losses[-1]:.3f}"
        if math.isfinite(steps):
            progress("training", step, settings.steps, note)
        else:
            progress("training", int(min(time.perf_counter() - began, seconds)), math.ceil(seconds), note)
        if time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
            saved_at = time.perf_counter()
            curve.append({"step": step, "loss": round(sum(losses) / len(losses), 4)})
            losses.clear()
            state = {
                "fingerprint": settings.fingerprint(),
                "adapter": adapter.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "elapsed": time.perf_counter() - began,
                "curve": curve,
            }
            write_atomically(state_path, state)

    report = {
        "settings": settings.summary(),
        "steps": step,
        "tokens": step * settings.batch_size * settings.sequence_length,
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "curve": curve,
        "top1_agreement_text": agreement(teacher, adapter, valid, settings.batch_size),
    }
    if valid_own is not None:
        report["top1_agreement_self_generated"] = agreement(teacher, adapter, valid_own, settings.batch_size)
    save_adapter(settings.out, values, adapter, parse_config(target_values).dtype)
    (settings.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    for leftover in (STATE_FILE, GENERATED_FILE):
        (settings.out / leftover).unlink(missing_ok=True)
    return report
