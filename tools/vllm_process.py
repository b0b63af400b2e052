"""vLLM in a process of its own, since it has an environment of its own: it pins its versions."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

IN_VLLM = """
import json, sys, time
import vllm
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.load(sys.stdin)
    engine = LLM(max_num_seqs=1, **job["engine"])

    def write(prompt, tokens):
        sampling = SamplingParams(temperature=0, max_tokens=tokens, **job["sampling"])
        began = time.perf_counter()
        text = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0].outputs[0]
        return list(text.token_ids), time.perf_counter() - began

    texts, seconds = [], []
    for prompt in job["prompts"]:
        for _ in range(job["warmups"]):
            write(prompt, job["tokens"][-1])
        written = [write(prompt, tokens) for tokens in job["tokens"]]
        texts.append(written[-1][0])
        seconds.append([each for _, each in written])
    counts = {}
    if not job["engine"].get("disable_log_stats", True):
        counts = {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}
    answer = {"version": vllm.__version__, "tokens": texts, "seconds": seconds, "counts": counts}
    with open(job["out"], "w") as file:
        json.dump(answer, file)
"""
"""What vLLM's own Python runs."""


def decode_in_vllm(
    python: Path,
    engine: dict[str, Any],
    prompts: list[list[int]],
    tokens: list[int],
    *,
    sampling: dict[str, Any] | None = None,
    warmups: int = 0,
) -> dict[str, Any]:
    """Write every prompt's text greedily, once for each number of new ``tokens``.

    Args:
        python: of an environment that has vLLM.
        engine: arguments of ``vllm.LLM``.
        prompts: lists of tokens.
        tokens: numbers of new tokens, the largest last.
        sampling: further arguments of ``vllm.SamplingParams``.
        warmups: decodes of each prompt before those that count.

    Returns:
        ``tokens``, the longest text of each prompt; ``seconds``, a list a prompt, one for each number of tokens, with
        the prefill; ``counts``, vLLM's own where ``disable_log_stats`` is False; ``version``.

    Raises:
        RuntimeError: vLLM failed; what it said stands in this process' own output.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script, out = folder / "in_vllm.py", folder / "out.json"
        script.write_text(IN_VLLM)
        job = {"engine": engine, "prompts": prompts, "tokens": tokens, "sampling": sampling or {}, "warmups": warmups}
        told = json.dumps(job | {"out": str(out)}, default=str)
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else each rank wants a NUMA node
        environment.pop("PYTHONPATH", None)  # it has this environment's modules
        done = subprocess.run([python, script], input=told, text=True, cwd=folder, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"vLLM ended with status {done.returncode}; what it says stands above.")
        answer: dict[str, Any] = json.loads(out.read_text())
        return answer
