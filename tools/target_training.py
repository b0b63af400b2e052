"""A target's training: recipe, tokenizer, one update of transformers' Llama, and its evaluation.

Products run in bf16 under autocast; weights and optimizers stay float32. ``share`` is always the share of a run that
has passed, by time or by steps.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_corpus import Document
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kangaroo_kernels.model.errors import KangarooError
from kangaroo_kernels.model.training.optimizers import Optimizers
from kangaroo_kernels.model.training.settings import ProgressReport

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
        show_progress=False,
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
    report: ProgressReport = lambda *_: None,
) -> Tensor:
    """All documents as one row of tokens, each behind an end-of-text token: ``[N]`` int32.

    After ``deadline`` (``time.perf_counter``) no more documents are begun; the first ``ENCODED_AT_ONCE`` always are.
    ``report`` is told ``("encoding", documents done, all, "files")``.
    """
    parts: list[Tensor] = []
    while len(parts) < len(documents) and (not parts or time.perf_counter() <= deadline):
        texts = [document.text for document in documents[len(parts) : len(parts) + ENCODED_AT_ONCE]]
        rows = tokenizer.backend_tokenizer.encode_batch_fast(texts)
        parts += [torch.tensor(row.ids, dtype=torch.int32) for row in rows]
        report("encoding", len(parts), len(documents), "files")
    return torch.cat(parts)


def target_config(recipe: TargetRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The target's configuration: a Llama with tied embeddings."""
    default = LlamaConfig()
    return LlamaConfig(
        **{name: value for name, value in asdict(recipe).items() if hasattr(default, name)},  # of a model's shape
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class TargetTraining:
    """A target with its optimizers, from the first update to the folder that others load.

    Args:
        tokens: ``[N]`` integers to train on, on ``device``.

    Attributes:
        model: transformers' Llama, float32 on ``device``.
    """

    def __init__(
        self, recipe: TargetRecipe, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, device: torch.device
    ) -> None:
        self.recipe, self.tokens, self.device = recipe, tokens, device
        if len(tokens) <= recipe.context:
            raise KangarooError(
                f"the data has {len(tokens)} tokens, and one window takes {recipe.context + 1}; give more data."
            )
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(target_config(recipe, tokenizer)).float().to(device)
        layers = self.model.model.layers
        for layer in layers:  # every layer starts as the identity
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
        rates = recipe.muon_lr, recipe.adamw_lr
        on_gpu = device.type == "cuda"
        self.optimizers = Optimizers(self.model, matrices, rates, recipe.weight_decay, fused=on_gpu)
        if on_gpu:
            self.compile_layers()

    def windows(self, count: int, length: int) -> Tensor:
        """``[count, length + 1]`` int64, from random places of the tokens."""
        starts = torch.randint(len(self.tokens) - length, (count, 1), generator=self.generator)
        return self.tokens[starts + torch.arange(length + 1)].long()

    def add_gradients(self, batch: Tensor, weight: float) -> Tensor:
        """One forward and backward pass of ``[B, T + 1]`` tokens; ``weight`` times the mean loss, on the device."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = weight * F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    def update(self, share: float) -> Tensor:
        """One update; the mean loss of its tokens, still on the device, so that nobody waits for it."""
        recipe = self.recipe
        length = recipe.short_context if share < recipe.short_share else recipe.context
        batch = self.windows(recipe.batch_tokens // length, length)
        parts = batch.split(max(1, recipe.pass_tokens // length))
        losses = [self.add_gradients(part, len(part) / len(batch)) for part in parts]
        factor = min(share / recipe.warmup_share, 1.0, max(0.0, 1 - share) / (1 - recipe.decay_from))
        self.optimizers.step(factor, recipe.clip)
        return torch.stack(losses).sum()

    def compile_layers(self) -> None:
        """Compile the layers, once for all of them, before the time of the training begins."""
        torch._dynamo.config.suppress_errors = True  # what does not compile here runs as it is
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)
        length = self.recipe.short_context
        self.add_gradients(self.windows(max(1, self.recipe.pass_tokens // length), length), 1.0)
        self.model.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Round the weights to what is stored, and write ``model.safetensors`` and ``config.json``."""
        for parameter in self.model.parameters():
            parameter.data = exact_in_both_halves(parameter.data)
        state = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in self.model.named_parameters()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(folder)


@torch.inference_mode()
def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, tokens: Tensor, context: int, pass_tokens: int
) -> dict[str, float]:
    """Held-out bits per character and top-1 accuracy of ``model`` over the whole windows of ``[N]`` tokens.

    Windows of ``context`` go through together, ``pass_tokens`` at a time, in bf16 on a GPU and in float32 on a CPU.
    """
    bits, right, device = 0.0, 0, tokens.device.type
    rows = tokens.unfold(0, context + 1, context)
    for batch in rows.split(max(1, pass_tokens // context)):
        wanted = batch[:, 1:].flatten().long()
        # compiled layers would be compiled once more for each of these shapes
        with torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16, device == "cuda"):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float().flatten(0, 1)
        bits += float(F.cross_entropy(logits, wanted, reduction="sum")) / math.log(2)
        right += int((logits.argmax(-1) == wanted).sum())
    count = len(rows) * context
    characters = len(tokenizer.decode(tokens[1 : count + 1].tolist(), skip_special_tokens=True))
    return {"bits_per_character": bits / characters, "top1_accuracy": right / count}


def exact_in_both_halves(weight: Tensor) -> Tensor:
    """Round to numbers that bf16 and fp16 both hold exactly, so that either may store the weights."""
    return weight.bfloat16().half().to(weight.dtype)
