"""The profiler of decodes: a trace becomes stages, and the command shows them."""

import json
from itertools import pairwise
from typing import Any

import iteration_profile as ip
import profile_decode
import pytest
import torch
from drafters import on_the_device
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from iteration_profile import Event, Profile, StageRun, by_order, by_ranges, stage_bytes, stage_rows
from pairs import make_adapter, make_target
from safetensors.torch import load_file
from typer.testing import CliRunner

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.commands.facts import footprint
from kangaroo_kernels.model.results import Commit
from kangaroo_kernels.model.spans import NOTHING, span

COMMIT = "kangaroo/commit"
PROMPT = [7, 3, 5, 9, 2, 8]


def complete(category: str, name: str, start: float, length: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": 1, "args": args}


def gpu_trace(iterations: int, replayed: bool) -> dict[str, Any]:
    """As Kineto writes it: verify (kernels a, b), commit (c), 2 us of gap before each kernel; launched long before."""
    events = [{"ph": "M", "name": "process_name"}, complete("gpu_memcpy", "Memcpy DtoH", 1e6, 1, correlation=999)]
    ran, correlation = 5000.0, 0
    for iteration in range(iterations):
        host = 100.0 * iteration
        if not replayed:
            events.append(complete("user_annotation", "kangaroo/verify", host, 50))
            events.append(complete("user_annotation", COMMIT, host + 60, 30))
            events.append(complete("user_annotation", "somebody else's", host, 95))
        for name, launched, length in (("a", 10, 7), ("b", 30, 20), ("c", 70, 3)):
            correlation += 1
            which = 0 if replayed else correlation
            kind = "cuda_driver" if name == "a" else "cuda_runtime"
            events.append(complete(kind, "cuLaunchKernelEx", host + launched, 5, correlation=which))
            events.append(complete("kernel", name, ran + 2, length, correlation=which))
            ran += 2 + length
    events.reverse()  # traces are in no order
    return {"traceEvents": events}


def test_operations_within_operations_count_once():
    spans = (("mm", 0, 9), ("fill", 3, 2), ("add", 9, 4))
    trace = {"traceEvents": [complete("cpu_op", *each) for each in spans]}
    assert [event.name for event, _ in ip.launched_events(trace, on_gpu=False)] == ["mm", "add"]
    with pytest.raises(KangarooError, match=f"no range {COMMIT}"):
        by_ranges(trace, on_gpu=False, last_stage=COMMIT)


@pytest.mark.parametrize("replayed", [False, True])
def test_kernels_belong_to_the_range_that_launched_them(replayed):
    """Replayed ones take their stages from their order."""
    iterations = by_ranges(gpu_trace(3, replayed=False), on_gpu=True, last_stage=COMMIT)
    if replayed:
        iterations = by_order(gpu_trace(3, replayed=True), iterations[-1])
    assert len(iterations) == 3
    for iteration in iterations:  # the gap before an iteration's first kernel is not its own
        assert [(stage.name, [event.name for event in stage.events], stage.us) for stage in iteration] == [
            ("kangaroo/verify", ["a", "b"], 7 + 2 + 20),
            (COMMIT, ["c"], 2 + 3),
        ]
    assert [iteration[0].start for iteration in iterations] == [5002.0 + 36 * number for number in range(3)]


def test_other_kernels_are_no_replay():
    (like,) = by_ranges(gpu_trace(1, replayed=False), on_gpu=True, last_stage=COMMIT)
    more, other = gpu_trace(2, replayed=True), gpu_trace(1, replayed=True)
    more["traceEvents"].append(complete("kernel", "d", 9000, 1, correlation=0))
    next(each for each in other["traceEvents"] if each["name"] == "b")["name"] = "d"
    for trace, count in ((more, 7), (other, 3), ({"traceEvents": []}, 0)):
        with pytest.raises(KangarooError, match=f"graph's {count} kernels are not a launched iteration's"):
            by_order(trace, like if count else [])


def test_the_table_adds_up():
    """Drafts that were not made have kernels, which return at once; they read nothing."""
    names = ["draft/shallow", "draft/step"] * 3 + ["draft/shallow", "verify", "accept", "commit"]
    stages = enumerate(f"kangaroo/{name}" for name in names)
    iteration = [StageRun(name, 10.0 * place, [Event("k", 10.0 * place + 4, 6)]) for place, name in stages]
    commits = [Commit([1], 0, drafted, drafted, 0, stopped=False) for drafted in (1, 3)]
    moved = {"kangaroo/draft/shallow": 3000, "kangaroo/draft/step": 5000, "kangaroo/verify": 70000}
    rows = [tuple(row.values()) for row in stage_rows(Profile([iteration] * 2, commits, 9, {}, graphs=False), moved)]
    assert rows == [
        ("draft/shallow", 4, 40, 16, 4, 3 * 3000, 9 / 40),  # on the newest token, too
        ("draft/step", 3, 30, 12, 3, 2 * 5000, 10 / 30),
        ("verify", 1, 10, 4, 1, 70000, 7),
        ("accept", 1, 10, 4, 1, None, None),
        ("commit", 1, 10, 4, 1, None, None),
        ("iteration", 1, 100, 40, 10, 3 * 3000 + 2 * 5000 + 70000, 0.89),
    ]
    together = [StageRun("kangaroo/draft", 0), StageRun("kangaroo/verify", 10)]
    rows = stage_rows(Profile([together] * 2, commits, 9, {}, graphs=False), moved)
    assert [row["bytes_moved"] for row in rows] == [19000, 70000, 89000], "one stage may be all drafts"


def test_ranges_cost_nothing_while_nobody_looks():
    assert span("kangaroo/verify") is NOTHING


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, "blocks"])
def test_bytes_are_those_of_info(tmp_path, stored, dtype):
    precision = torch.float32 if stored == "blocks" else stored
    model = make_target(tmp_path / "target", hidden_size=64, intermediate_size=96, dtype=precision)
    adapter = make_adapter(tmp_path / "adapter", model, exit_layer=2)
    if stored == "blocks":
        model = write_gguf(tmp_path / "target.gguf", model, GGMLQuantizationType.Q4_1)
    kangaroo = Kangaroo.from_pretrained(model, adapter, device="cpu", dtype=dtype)
    moved = stage_bytes(kangaroo, 0)
    told = footprint(model, adapter, device="cpu", dtype=dtype)
    step = moved["kangaroo/draft/shallow"] + moved["kangaroo/draft/step"]
    assert step == pytest.approx(told.draft_step_bytes, rel=0.02)  # norms are left out
    assert moved["kangaroo/verify"] == pytest.approx(told.verify_pass_bytes, rel=0.02)
    plain = stage_bytes(Kangaroo(kangaroo.target), 0)
    assert sum(plain.values()) == pytest.approx(told.plain_step_bytes, rel=0.02)
    further = stage_bytes(kangaroo, 100)
    kv_bytes = sum(further[name] - moved[name] for name in moved)
    assert kv_bytes == 100 * told.kv_bytes_per_token


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("resident", [False, True])
def test_a_decode_is_seen_stage_by_stage(pair, resident, plain):
    """Led by the host, and with the loop on the device: every iteration, and nothing else."""
    kangaroo = pair.load(device="cpu", dtype="float32")
    if resident:
        on_the_device(kangaroo)
    settings = {"plain": plain} if plain else {"num_speculative_tokens": 2, "draft_confidence_threshold": 0.5}
    profiled = ip.profile_iterations(kangaroo, PROMPT, 2, **settings)
    assert len(profiled.iterations) == len(profiled.commits) == 2
    for iteration, commit in zip(profiled.iterations, profiled.commits, strict=True):
        names = [stage.name.removeprefix("kangaroo/") for stage in iteration]
        made = 2 if resident else commit.drafted
        drafting = [] if plain else ["draft/shallow", "draft/step"] * made + ["draft/shallow"]
        end = ["commit"] if resident or not plain else []
        assert names == [*drafting, "verify", *(["accept"] if end else []), *end]
        for before, after in pairwise(iteration):
            assert after.start == pytest.approx(before.start + before.us)
        verify = next(stage for stage in iteration if stage.name.endswith("verify"))
        assert 0 < sum(event.us for event in verify.events) < verify.us


def run(*arguments: object) -> Any:
    return CliRunner().invoke(profile_decode.app, [str(each) for each in arguments])


def test_the_command(tmp_path, monkeypatch):
    """On a machine without a GPU it says that it profiles the references, and writes what it promises."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(profile_decode, "ITERATIONS", 2)
    done = run("--context", 8, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Kangaroo, bundled pair; the PyTorch references on the CPU; no figure is about a GPU" in done.output
    assert "verify" in done.output
    assert (tmp_path / "iteration.png").read_bytes().startswith(b"\x89PNG")
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
    assert run("--nvtx", "--context", 300).exit_code == 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(("plain", "persistent"), [(True, False), (False, False), (False, True)])
def test_on_a_gpu(pair, graphs, plain, persistent):
    kangaroo = pair.load(dtype="bfloat16", graphs=graphs, persistent=persistent)
    settings = {"plain": True} if plain else {"num_speculative_tokens": 3, "draft_confidence_threshold": 0.3}
    profiled = ip.profile_iterations(kangaroo, PROMPT, 5, **settings)
    assert profiled.graphs == graphs
    assert len(profiled.iterations) == len(profiled.commits) == 5
    for iteration in profiled.iterations:
        assert iteration[-1].events[0].name == "commit_kernel"
        assert any(event.name == "qkv_rope_kernel" for stage in iteration for event in stage.events)
        assert any(event.name == "draft_loop_kernel" for stage in iteration for event in stage.events) == persistent


def test_a_block_reads_its_layer_once_and_the_head_for_every_draft(pair, tmp_path):
    folder = make_adapter(tmp_path / "block", pair.target, exit_layer=2, draft_block=4, draft_head_rank=12)
    moved = stage_bytes(Kangaroo.from_pretrained(pair.target, folder, device="cpu"), 0)
    own = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    layer = sum(size for name, size in own.items() if name.startswith("layers.0.self_attn"))
    choice = sum(size for name, size in own.items() if name.startswith("draft_head") or "correction" in name)
    shallow, block, step = (f"kangaroo/draft/{name}" for name in ("shallow", "block", "step"))
    assert (moved[block], moved[step]) == (4 * layer, 4 * choice)
    stages = [StageRun(name, 1.0) for name in (shallow, block, shallow)]
    commits = [
        Commit([1, 2], accepted=1, drafted=drafted, draft_steps=1, agreed=1, stopped=False) for drafted in (3, 2)
    ]
    rows = stage_rows(Profile([stages] * 2, commits, 9, {}, graphs=False), moved)
    assert [row["bytes_moved"] for row in rows[:2]] == [2 * moved[shallow], moved[block] + 2.5 * moved[step]]
