"""The paper's ablation of the adapter (arXiv 2404.18911): five networks between the exit layer and a head.

Three of them have no place in the adapter's format: an MLP alone, two layers, and an LM head of its own. So all are
trained here, side by side on the same passes of the model, and drafted with by the runtime's own operations on the loop
that the host leads.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.contract import DraftVocabulary, Mlp
from kangaroo_kernels.model.commands.show import training_bars
from kangaroo_kernels.model.drafters.adapter import AdapterConfig
from kangaroo_kernels.model.drafters.adapter_weights import BlockWeights, load_adapter
from kangaroo_kernels.model.drafters.kangaroo import KangarooDrafter
from kangaroo_kernels.model.drafters.protocol import PAPER_DRAFT_CONFIDENCE_THRESHOLD, PAPER_NUM_SPECULATIVE_TOKENS
from kangaroo_kernels.model.evaluation.plan import find_shapes
from kangaroo_kernels.model.files import write_whole
from kangaroo_kernels.model.head import Head
from kangaroo_kernels.model.load import resolve_device, resolve_dtype
from kangaroo_kernels.model.target.cache import KVCache, Place
from kangaroo_kernels.model.target.config import LlamaConfig
from kangaroo_kernels.model.target.llama import DecoderLayer, Llama
from kangaroo_kernels.model.training.adapter_module import AdapterBlock, TrainableAdapter, apply_swiglu, swiglu
from kangaroo_kernels.model.training.draft_vocabulary import count_tokens, draft_tokens
from kangaroo_kernels.model.training.losses import in_chunks
from kangaroo_kernels.model.training.optimizers import Optimizers, rise_and_fall
from kangaroo_kernels.model.training.plan import Plan, read_plan
from kangaroo_kernels.model.training.settings import ProgressReport, TrainingSettings
from kangaroo_kernels.model.training.states import Batch, Lessons
from kangaroo_kernels.model.training.teacher import Teacher, autocast
from kangaroo_kernels.packed_weight import PackedWeight

SUFFIX = ".safetensors"
HEAD, TOKENS = "lm_head.weight", "draft_vocabulary"
"""Of the tensors in such a file: a head of its own, and the tokens of its rows."""
STATE_FILE, STATE_SECONDS = "state.pt", 60.0
SEEDS = (0, 1)
"""Of the weights that a training begins with."""
HEAD_RATE = 3e-4
"""AdamW's learning rate for a head, which begins as the model's own rows."""
ATTENTION, LAYER, MLP = "attention", "layer", "mlp"
"""The parts of a form: a block of attention, a layer with both, an MLP."""


class Form(NamedTuple):
    """What stands between the exit layer and the drafts: some parts, and a head of its own or the model's."""

    parts: tuple[str, ...]
    own_head: bool = False


FORMS = {
    "attention alone": Form((ATTENTION,)),
    "attention and an MLP": Form((LAYER,)),
    "attention and a head of its own": Form((ATTENTION,), own_head=True),
    "two layers of attention": Form((ATTENTION, ATTENTION)),
    "an MLP alone": Form((MLP,)),
}


def shape_of(part: str, config: LlamaConfig) -> LlamaConfig:
    """The shape of a part, where ``config`` is that of a layer with an MLP."""
    return replace(config, intermediate_size=0) if part == ATTENTION else config


# ---- training


class MlpBlock(nn.Module):
    """``h + swiglu(rms_norm(h))``, with the weights' names of a layer's MLP."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = swiglu(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """``[B, T, hidden]`` to the same."""
        return hidden + apply_swiglu(self.mlp, self.post_attention_layernorm(hidden)), None


class Network(TrainableAdapter):
    """A form as a PyTorch module; ``forward`` gives the input of the head, ``[B, T, hidden]``, as a list of one."""

    def __init__(self, form: Form, config: LlamaConfig, sequence_length: int) -> None:
        super().__init__(config, sequence_length)
        blocks = [MlpBlock(config) if part == MLP else AdapterBlock(shape_of(part, config)) for part in form.parts]
        self.layers = nn.ModuleList(blocks)

    def forward(
        self,
        exit_hidden: Tensor,
        final: Tensor | None = None,
        passes: int = 1,
        embedded: Tensor | None = None,
    ) -> list[Tensor]:
        """As ``TrainableAdapter.forward`` of the paper's form."""
        hidden, length = exit_hidden, exit_hidden.shape[1]
        for layer in self.layers:
            hidden, _ = layer(hidden, self.cos[:length], self.sin[:length])
        return [self.norm(hidden)]


class Trial:
    """A form in training.

    Attributes:
        network: what stands before the head.
        head: ``[R, hidden]``, the rows of the drafted tokens: a parameter, or the model's own.
    """

    def __init__(self, form: str, seed: int, plan: Plan, settings: TrainingSettings, teacher: Teacher, rows: Tensor):
        torch.manual_seed(seed)
        self.form, self.seed = form, seed
        self.network = Network(FORMS[form], plan.config, settings.sequence_length).to(teacher.device)
        self.network.norm.load_state_dict(teacher.model.model.norm.state_dict())
        matrices = [each for each in self.network.parameters() if each.ndim == 2]
        self.optimizers = Optimizers(self.network, matrices, (settings.learning_rate, settings.learning_rate))
        self.head, self.head_optimizers = rows, list[torch.optim.Optimizer]()
        if FORMS[form].own_head:
            self.head = nn.Parameter(rows.float().clone())
            self.head_optimizers.append(torch.optim.AdamW([self.head], weight_decay=0.0))

    @property
    def name(self) -> str:
        """Its form, its parameters and its seed."""
        own = [self.head] if self.head_optimizers else []
        parameters = sum(each.numel() for each in (*self.network.parameters(), *own))
        return f"{self.form}, {parameters / 1e6:.2g}M, seed {self.seed}"

    def learn(self, batch: Batch, wanted: list[Tensor], factor: float) -> float:
        """One step by cross-entropy at ``factor`` times the rates; gives the loss.

        ``wanted`` has the model's probabilities of the drafted tokens for each chunk of the learned positions.
        """
        device = batch.exit_hidden.device
        with autocast(device):
            rows = self.network(batch.exit_hidden[:, :, 0].float())[0].flatten(0, 1)[batch.places]
        given, total = rows.detach().requires_grad_(), 0.0
        for part, probabilities in zip(in_chunks(given), wanted, strict=True):
            logits = F.linear(given[part].bfloat16(), self.head.bfloat16()).float()
            loss = F.cross_entropy(logits, probabilities, reduction="sum") / len(given)
            loss.backward()
            total += float(loss.detach())
        rows.backward(given.grad)
        for optimizer in self.head_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = HEAD_RATE * factor
            optimizer.step()
            optimizer.zero_grad()
        self.optimizers.step(factor)
        return total

    def state(self) -> dict[str, Any]:
        """What a stopped run needs to go on."""
        return {
            "network": self.network.state_dict(),
            "head": self.head,
            "optimizers": self.optimizers.state_dict(),
            "head_optimizers": [each.state_dict() for each in self.head_optimizers],
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave."""
        self.network.load_state_dict(state["network"])
        self.head.data.copy_(state["head"])
        self.optimizers.load_state_dict(state["optimizers"])
        for optimizer, saved in zip(self.head_optimizers, state["head_optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def write(self, file: Path, tokens: Tensor, exit_layer: int, dtype: torch.dtype) -> None:
        """Write what ``TrialAdapter`` reads."""
        tensors = {name: each.to("cpu", dtype).contiguous() for name, each in self.network.state_dict().items()}
        if self.head_optimizers:
            tensors[HEAD] = self.head.detach().to("cpu", dtype)
        save_file(tensors | {TOKENS: tokens.int()}, file, {"form": self.form, "exit_layer": str(exit_layer)})


def train(model: str, data: list[Path], exit_layer: int, steps: int, out: Path) -> dict[str, Path]:
    """Train what is not trained yet; gives the file of each network by its name. A stopped training goes on.

    Raises:
        KangarooError: settings or files that cannot be used.
    """
    size = find_shapes(model).shape.inner
    settings = TrainingSettings(model, tuple(data), exit_layer, out, steps=steps, intermediate_size=size)
    files = sorted(out.glob(f"*{SUFFIX}"), key=lambda file: int(file.stem.split()[0])) if out.is_dir() else []
    if len(files) < len(FORMS) * len(SEEDS):
        with training_bars() as report:
            files = _train(settings, read_plan(settings), steps, report)
    return {file.stem.split(maxsplit=1)[1]: file for file in files}


def _train(settings: TrainingSettings, plan: Plan, steps: int, report: ProgressReport) -> list[Path]:
    """All forms with all seeds, side by side."""
    device, windows = resolve_device(settings.device), plan.corpus.windows
    dtype = resolve_dtype(None, device, plan.target.config.dtype)
    teacher = Teacher(plan.target.path, device, dtype, [settings.exit_layer])
    size = min(settings.vocabulary, len(teacher.head))
    tokens = draft_tokens(count_tokens(windows, len(teacher.head)), size, plan.target)
    rows = teacher.head[tokens.to(device)].bfloat16()
    lessons = Lessons(teacher, windows)
    trials = [Trial(form, seed, plan, settings, teacher, rows) for form in FORMS for seed in SEEDS]
    settings.out.mkdir(parents=True, exist_ok=True)
    state, first, kept_at = settings.out / STATE_FILE, 0, time.perf_counter()
    whose = [plan.fingerprint, steps]
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["whose"] != whose:
            raise KangarooError(f"{settings.out} holds a training of other data or steps; take a new folder.")
        first = saved["step"]
        for trial, each in zip(trials, saved["trials"], strict=True):
            trial.go_on(each)
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        batch = lessons.batch(lessons.draw(step, settings.batch_size, settings.reuse, generator))
        wanted = [F.linear(batch.normed[part], rows).float().softmax(-1) for part in in_chunks(batch.normed)]
        losses = [trial.learn(batch, wanted, rise_and_fall(step / steps)) for trial in trials]
        report("training", step + 1, steps, f"losses {min(losses):.3f} to {max(losses):.3f}")
        if time.perf_counter() - kept_at > STATE_SECONDS:
            kept_at = time.perf_counter()
            reached = {"whose": whose, "step": step + 1, "trials": [trial.state() for trial in trials]}
            write_whole(state, partial(torch.save, reached))
    files = [settings.out / f"{place} {trial.name}{SUFFIX}" for place, trial in enumerate(trials)]
    for trial, file in zip(trials, files, strict=True):
        trial.write(file, tokens, settings.exit_layer, plan.target.config.dtype)
    return files


# ---- drafting


class TrialAdapter:
    """A trained network in the place of an adapter: a ``DraftNetwork``.

    Args:
        file: what ``Trial.write`` wrote.
        target: the model that it was trained for.
    """

    state: Mlp | None = None
    block: BlockWeights | None = None

    def __init__(self, file: Path, target: Llama) -> None:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata()
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        exit_layer, form = int(facts["exit_layer"]), FORMS[facts["form"]]
        self.target = target
        vocabulary = DraftVocabulary(tensors.pop(TOKENS).to(target.device), target.config.vocab_size)
        own = tensors.pop(HEAD, None)
        rows = target.weights.head.select(vocabulary.tokens) if own is None else self._packed(own)
        self.head = Head(self._rounded(tensors["norm.weight"]), rows, target.config.rms_norm_eps, vocabulary)
        size = next((len(tensor) for name, tensor in tensors.items() if name.endswith("up_proj.weight")), 0)
        shape = replace(target.config, qkv_bias=False, output_bias=False, mlp_bias=False, intermediate_size=size)
        self.config = AdapterConfig(
            shape, exit_layer, PAPER_NUM_SPECULATIVE_TOKENS, PAPER_DRAFT_CONFIDENCE_THRESHOLD, False, vocabulary
        )
        self.parts = [self._part(part, f"layers.{place}.", tensors) for place, part in enumerate(form.parts)]

    def _part(self, part: str, prefix: str, tensors: dict[str, Tensor]) -> DecoderLayer | Mlp:
        """A part that runs, of the tensors whose names begin so."""
        target = self.target
        own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        if part == MLP:
            gate, up, down = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            norm = self._rounded(own["post_attention_layernorm.weight"])
            return Mlp(norm, self._packed(torch.cat((gate, up))), self._packed(down))
        shape = shape_of(part, self.config.llama)
        weights = load_adapter(
            [("norm.weight", tensors["norm.weight"]), *((f"layers.0.{name}", each) for name, each in own.items())],
            shape,
            target.device,
            target.dtype,
            target.backend.layout,
            rounded_to=target.weights.rounded_to,
        )
        return DecoderLayer(shape, weights.layer, target.backend)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.target.weights.rounded_to or self.target.dtype).to(self.target.device, self.target.dtype)

    def _packed(self, tensor: Tensor) -> PackedWeight:
        return PackedWeight(self._rounded(tensor), layout=self.target.backend.layout)

    def new_cache(self) -> KVCache:
        """An empty cache with a layer for each part; that of an MLP stays unused."""
        return KVCache(self.config.llama, len(self.parts), self.target.device, self.target.kv_dtype)

    def run(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        reach: int | None = None,
        active: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As ``DraftNetwork.run``."""
        hidden, operations = exit_hidden, self.target.backend.for_rows(exit_hidden.shape[0])
        for place, part in enumerate(self.parts):
            end = out if place == len(self.parts) - 1 else None
            if isinstance(part, DecoderLayer):
                hidden = part(hidden, cache, place, position, reach=reach, active=active, out=end)
            else:
                inner = operations.gate_up(
                    hidden, part.norm, part.gate_up, eps=self.config.llama.rms_norm_eps, active=active
                )
                hidden = operations.linear_residual(inner, part.down, hidden, active=active, out=end)
        return hidden

    def append(
        self,
        exit_hidden: Tensor,
        cache: KVCache,
        position: Place,
        states: Tensor | None = None,
        *,
        active: Tensor | None = None,
    ) -> None:
        """As ``DraftNetwork.append``; a second layer's keys need the first one's output."""
        self.run(exit_hidden, cache, position, active=active)


def load(model: str, file: Path, dtype: str | None) -> Kangaroo:
    """A model that drafts with a trained network.

    Raises:
        KangarooError: a model that cannot be used.
    """
    pair = Kangaroo.from_pretrained(model, dtype=dtype)
    return Kangaroo(pair.target, KangarooDrafter(pair.target, TrialAdapter(file, pair.target)), pair.tokenizer)
