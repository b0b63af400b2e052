"""What every benchmark records beside its times: the machine and the versions."""

import platform
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from gpu_card import read_card, snapshot
from gpu_measure import measure_ceiling

from kangaroo_kernels import launch_config

ON_GPU = torch.cuda.is_available()
BEFORE = snapshot(torch.device("cuda", torch.cuda.current_device())) if ON_GPU else None
"""The state of the GPU before any benchmark."""

CEILINGS = []
"""The measured bandwidth of the GPU's memory; empty until a benchmark asks for it."""


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["kangaroo"] = {
        "command": "pytest " + " ".join(config.invocation_params.args),
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if ON_GPU:
        device = torch.device("cuda", torch.cuda.current_device())
        folder = launch_config.configs_folder()
        machine_info["kangaroo"]["gpu"] = {
            **read_card(device)._asdict(),
            "before": BEFORE,
            "after": snapshot(device),
            "launch_configs": [name for name in launch_config.files_for(device) if (folder / name).is_file()],
            "ceiling": [{**ceiling._asdict(), "stream": ceiling.stream._asdict()} for ceiling in CEILINGS],
        }


WITHOUT_A_GPU = (
    "no CUDA GPU here: the kernels' PyTorch references run on the CPU at small shapes; no figure is about a GPU"
)


def pytest_report_header(config):
    if not ON_GPU:
        return f"kangaroo benchmarks: {WITHOUT_A_GPU}"
    card = read_card(torch.device("cuda", torch.cuda.current_device()))
    return (
        f"kangaroo benchmarks: {card.name}, {card.multiprocessors} multiprocessors, L2 {card.l2_bytes >> 20} MiB; "
        "the kernels beside PyTorch on the GPU, decoding and packed weights on the CPU"
    )


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def ceiling():
    """The GPU's read-only streaming ceiling, measured on the first use."""
    CEILINGS.append(measure_ceiling(torch.device("cuda", torch.cuda.current_device())))
    return CEILINGS[-1]


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's tables
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = session.benchmarks if session else []
    summarise_decoding(terminalreporter, benchmarks)
    summarise_smollm2(terminalreporter, benchmarks)
    summarise_kernels(terminalreporter, benchmarks)


def summarise_decoding(terminalreporter, benchmarks):
    """Tokens a second of each decoder and the ratios, medians over prompts."""
    speeds = defaultdict(dict)
    for bench in benchmarks:
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


def summarise_smollm2(terminalreporter, benchmarks):
    """Tokens a second and CPU time a token of each decoder, prefill included, medians over prompts."""
    rows = defaultdict(list)
    for bench in benchmarks:
        if "smollm2" in bench.extra_info:
            rows[bench.extra_info["smollm2"]].append(bench.extra_info)
    if not rows:
        return
    terminalreporter.section("SmolLM2-135M-Instruct on one thread, median over prompts")
    for decoder, infos in rows.items():
        speed, cpu = (median(info[key] for info in infos) for key in ("tokens_per_second", "cpu_ms_per_token"))
        same, new = (sum(info[key] for info in infos) for key in ("same_tokens", "new_tokens"))
        terminalreporter.line(
            f"{decoder:>14}  {speed:5.1f} tokens/s, {cpu:5.1f} ms of CPU a token, prefill included; "
            f"{same} of {new} tokens as plain decoding"
        )


def summarise_kernels(terminalreporter, benchmarks):
    """Time, bandwidth and its share of the card's ceiling, and how many times longer PyTorch takes."""
    if any(bench.extra_info.get("way") == "reference" for bench in benchmarks):
        terminalreporter.section("kernels")
        terminalreporter.line(WITHOUT_A_GPU)
    groups = defaultdict(dict)
    for bench in benchmarks:
        if "share_of_ceiling" in bench.extra_info:
            groups[bench.group][bench.extra_info["way"]] = bench.extra_info
    if not groups:
        return
    ceiling = CEILINGS[-1]
    terminalreporter.section("kernels on the GPU")
    terminalreporter.line(
        f"the card reads {ceiling.read:.0f} GB/s at most ({ceiling.stream.num_warps} warps, {ceiling.stream.loads} "
        f"loads, {ceiling.buffer_bytes >> 20} MiB) and copies {ceiling.copy:.0f} GB/s, read and written"
    )
    width = max(map(len, groups))
    terminalreporter.line(f"{'':{width}} {'us p50':>9} {'GB/s':>6} {'ceiling':>8} {'x eager':>8} {'x compiled':>11}")
    for group, ways in groups.items():
        shown = ways.get("kernel") or next(iter(ways.values()))
        ratios = [
            f"{ways[way]['us']['p50'] / shown['us']['p50']:.2f}" if way in ways and "kernel" in ways else "-"
            for way in ("eager", "compiled")
        ]
        label = "" if "kernel" in ways else f"  ({shown['way']})"
        terminalreporter.line(
            f"{group:{width}} {shown['us']['p50']:9.1f} {shown['gigabytes_per_second']:6.0f} "
            f"{shown['share_of_ceiling']:8.1%} {ratios[0]:>8} {ratios[1]:>11}{label}"
        )
