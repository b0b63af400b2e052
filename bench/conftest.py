"""What every benchmark records beside its times: the machine and the versions."""

import platform
from collections import defaultdict
from statistics import median

import pytest
import torch
import triton


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["kangaroo"] = {
        "command": "pytest " + " ".join(config.invocation_params.args),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def pytest_report_header(config):
    if torch.cuda.is_available():
        return (
            f"kangaroo benchmarks: {torch.cuda.get_device_name()}; this version has references alone, timed on the CPU"
        )
    return "kangaroo benchmarks: no CUDA GPU; the PyTorch references are timed on the CPU"


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


def pytest_terminal_summary(terminalreporter, config):
    """Tokens a second of each decoder and the ratios, medians over prompts."""
    session = getattr(config, "_benchmarksession", None)
    speeds = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        info = bench.extra_info
        if "decoder" in info:
            row = speeds[bench.group]
            row[info["decoder"]] = info["tokens_per_second"]
            row["steps of " + info["decoder"]] = info.get("decode_tokens_per_second", 0.0)
    whole = [row for row in speeds.values() if {"plain", "kangaroo", "transformers"} <= row.keys()]
    if not whole:
        return
    terminalreporter.section("decoding, median over prompts")
    for decoder in ("plain", "kangaroo", "transformers"):
        terminalreporter.line(f"{decoder:>14}  {median(row[decoder] for row in whole):7.0f} tokens/s, prefill included")
    ratios = (("kangaroo", "plain"), ("steps of kangaroo", "steps of plain"), ("plain", "transformers"))
    for above, below in ratios:
        ratio = median(row[above] / row[below] for row in whole)
        terminalreporter.line(f"{above} / {below}: {ratio:.2f}")
