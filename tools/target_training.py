"""A target's training: recipe, tokenizer, windows of text, the network in plain PyTorch, and one update.

The demo pair's trainer (a CPU, an hour) and the presets (a GPU, minutes) share all of it. Muon (Jordan et al., 2024;
the update scaled as in arXiv 2502.16982) turns the matrices, AdamW the rest; products run in bf16 under autocast,
weights and optimizers stay float32. ``share`` is always the share of a run that has passed, by time or by steps.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import Document
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.target.config import LlamaConfig as TargetConfig
from kangaroo_kernels.model.target.config import parse_config
from kangaroo_kernels.model.training.adapter_module import AdapterBlock

END_OF_TEXT = "<|endoftext|>"

ENCODED_AT_ONCE = 256
"""Documents: an encoding in progress takes a hundred bytes a token."""


@dataclass(frozen=True)
class TargetRecipe:
    """Every setting of the target's training.

    Attributes:
        short_context: tokens of a window for the first ``short_share`` of the run, ``context`` after it.
        batch_tokens: of an update.
        pass_tokens: of a forward and backward pass; an update sums the gradients of as many as it takes.
        warmup_share: the learning rates rise over this share of the run.
        decay_from: they fall to zero in a straight line from this share on.
    """

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 352
    num_hidden_layers: int = 14
    num_attention_heads: int = 3
    num_key_value_heads: int = 3
    context: int = 512
    short_context: int = 256  # attention's backward pass is half of a CPU's time at 512: most steps run shorter
    short_share: float = 0.8
    batch_tokens: int = 8192
    pass_tokens: int = 8192
    muon_lr: float = 5e-3
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.01
    decay_from: float = 0.3
    clip: float = 1.0
    seed: int = 0


def train_tokenizer(documents: list[Document], vocab_size: int, show_progress: bool = False) -> PreTrainedTokenizerFast:
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
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[Document],
    deadline: float = math.inf,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """All documents as one row of tokens, each behind an end-of-text token: ``[N]`` int32.

    After ``deadline`` (``time.perf_counter``) no more documents are begun; the first ``ENCODED_AT_ONCE`` always are.
    ``report`` is told how many documents are done, and of how many.
    """
    parts: list[Tensor] = []
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        if parts and time.perf_counter() > deadline:
            break
        texts = [document.text for document in documents[start : start + ENCODED_AT_ONCE]]
        rows = tokenizer.backend_tokenizer.encode_batch_fast(texts)
        parts += [torch.tensor(row.ids, dtype=torch.int32) for row in rows]
        report(min(start + ENCODED_AT_ONCE, len(documents)), len(documents))
    return torch.cat(parts)


class Windows:
    """Windows of the corpus in random order, every token once an epoch, from a random phase each time.

    The tokens may lie on a GPU: only the places of a batch's windows go there.
    """

    def __init__(self, tokens: Tensor, seed: int) -> None:
        self.tokens = tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.starts = torch.empty(0, dtype=torch.int64)
        self.length = 0

    def batch(self, rows: int, length: int) -> Tensor:
        """``[rows, length + 1]`` int64.

        Raises:
            KangarooError: the corpus has too few tokens for one batch.
        """
        if length != self.length or len(self.starts) < rows:
            phase = int(torch.randint(length, (), generator=self.generator))
            starts = torch.arange(phase, len(self.tokens) - length - 1, length)
            if len(starts) < rows:
                raise KangarooError(
                    f"the corpus has {len(self.tokens)} tokens, too few for a batch of {rows} windows of {length}."
                )
            self.starts = starts[torch.randperm(len(starts), generator=self.generator)]
            self.length = length
        picked, self.starts = self.starts[:rows], self.starts[rows:]
        device = self.tokens.device
        places = picked[:, None].to(device) + torch.arange(length + 1, device=device)
        return self.tokens[places].long()


class Block(AdapterBlock):
    """A decoder layer: the adapter's attention block with an MLP behind it."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__(config)
        hidden, inner = config.hidden_size, config.intermediate_size
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, T, hidden]`` to the same; ``cos`` and ``sin`` are ``[T, D]``."""
        hidden = super().forward(hidden, cos, sin)
        normed = self.post_attention_layernorm(hidden)
        inner = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        projected: Tensor = self.mlp["down_proj"](inner)
        return hidden + projected


RunBlock = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def run_block(block: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The layer as it is; its compiled form has the same signature."""
    output: Tensor = block(hidden, cos, sin)
    return output


class TrainableTarget(nn.Module):
    """A Llama with tied embeddings; its ``state_dict`` has transformers' names without the leading ``model.``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, recipe: TargetRecipe, values: dict[str, Any]) -> None:
        super().__init__()
        config = parse_config(values)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        angles = torch.arange(recipe.context)[:, None] * config.inv_freq(recipe.context)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.layers.named_parameters():  # every layer starts as the identity
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, run: RunBlock = run_block) -> Tensor:
        """``[B, T]`` tokens to logits ``[B, T, V]``; ``run`` is ``run_block`` or its compiled form."""
        hidden, length = self.embed_tokens(tokens), tokens.shape[1]
        for layer in self.layers:
            hidden = run(layer, hidden, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(hidden), self.embed_tokens.weight)


def target_values(recipe: TargetRecipe, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The target's ``config.json``."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


class TargetTraining:
    """A target with its optimizers, from the first update to the folder that others load.

    Attributes:
        model: float32 on ``device``.
        optimizers: each with its learning rate at its height.
        run: how a layer runs in an update.
    """

    def __init__(
        self, recipe: TargetRecipe, tokenizer: PreTrainedTokenizerFast, windows: Windows, device: torch.device
    ) -> None:
        self.recipe, self.windows, self.device = recipe, windows, device
        self.values = target_values(recipe, tokenizer)
        self.model = TrainableTarget(recipe, self.values).to(device)
        self.run: RunBlock = run_block
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.ndim == 2]
        matrix_ids = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in matrix_ids]
        muon = torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(
            others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )
        self.optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "muon": (muon, recipe.muon_lr),
            "adamw": (adamw, recipe.adamw_lr),
        }

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def add_gradients(self, batch: Tensor, weight: float) -> Tensor:
        """One forward and backward pass of ``[B, T + 1]`` tokens; ``weight`` times the mean loss, on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(batch[:, :-1], self.run)
        loss = weight * F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def update(self, share: float) -> Tensor:
        """One update; the mean loss of its tokens, still on the device, so that nobody waits for it."""
        recipe = self.recipe
        for optimizer, rate in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor(share, recipe)
        length = recipe.short_context if share < recipe.short_share else recipe.context
        batch = self.windows.batch(recipe.batch_tokens // length, length)
        parts = batch.split(max(1, recipe.pass_tokens // length))
        losses = [self.add_gradients(part, len(part) / len(batch)) for part in parts]
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer, _ in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def compile_layers(self) -> bool:
        """Compile the layers, once for all of them; False, with a warning, where that does not work here.

        Evaluation runs them as they are: its windows have other shapes.
        """
        recipe = self.recipe
        batch = self.windows.batch(max(1, recipe.pass_tokens // recipe.short_context), recipe.short_context)
        self.run = torch.compile(run_block, dynamic=False)
        try:
            self.add_gradients(batch, 1.0)
        except torch.OutOfMemoryError:  # uncompiled it would take more
            raise
        except Exception as error:  # each part of the compiler has its own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the layers do not compile here and run uncompiled ({reason})", stacklevel=2)
            self.run = run_block
        self.model.zero_grad(set_to_none=True)
        return self.run is not run_block

    def state_dict(self) -> dict[str, Any]:
        """What a stopped run needs to go on."""
        optimizers = {name: optimizer.state_dict() for name, (optimizer, _) in self.optimizers.items()}
        return {"model": self.model.state_dict(), **optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        for name, (optimizer, _) in self.optimizers.items():
            optimizer.load_state_dict(state[name])

    def save(self, folder: Path) -> None:
        """Round the weights to what is stored, and write ``model.safetensors`` and ``config.json``."""
        for parameter in self.model.parameters():
            parameter.data = exact_in_both_halves(parameter.data)
        state = {f"model.{name}": tensor.to("cpu", torch.bfloat16) for name, tensor in self.model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.values, indent=2) + "\n")


@torch.inference_mode()
def evaluate(
    model: TrainableTarget, tokens: Tensor, characters: int, context: int, pass_tokens: int = 0
) -> dict[str, float]:
    """Held-out bits per character and top-1 accuracy of ``model`` over ``tokens``, in windows of ``context``.

    Whole windows go through together, ``pass_tokens`` at a time (one by one where it is less than a window), in bf16 on
    a GPU and in float32 on a CPU.
    """
    bits, right, counted = 0.0, 0, 0
    whole = (len(tokens) - 1) // context
    rows = tokens.unfold(0, context + 1, context)[:whole] if whole else tokens.new_empty(0, context + 1)
    batches = [*rows.split(max(1, pass_tokens // context)), tokens[None, whole * context :]]
    for batch in batches:
        if batch.numel() < 2:
            continue
        inputs, wanted = batch[:, :-1], batch[:, 1:].flatten().long()
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
            logits = model(inputs).float().flatten(0, 1)
        bits += float(F.cross_entropy(logits, wanted, reduction="sum")) / math.log(2)
        right += int((logits.argmax(-1) == wanted).sum())
        counted += len(wanted)
    return {"bits_per_character": bits / characters, "top1_accuracy": right / counted}


def learning_rate_factor(share: float, recipe: TargetRecipe) -> float:
    """Warm-up, plateau and straight decay."""
    return min(share / recipe.warmup_share, 1.0, max(0.0, 1 - share) / (1 - recipe.decay_from))


def exact_in_both_halves(weight: Tensor) -> Tensor:
    """Round to numbers that bf16 and fp16 both hold exactly, so that either may store the weights."""
    return weight.bfloat16().half().to(weight.dtype)
