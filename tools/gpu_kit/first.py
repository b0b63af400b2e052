"""The first minutes on a GPU: is it right, and how fast? ``python .dev/first.py --out DIR [--seconds 265]``.

Stages in processes of their own, each within its time: one that fails, hangs or loses the GPU ends alone. What is
found stands in ``DIR/first.json`` and, a line a stage, in ``DIR/log.txt`` as soon as the stage is over. ``--only a,b``
picks some; ``--smoke`` runs all of them at tiny size on the CPU, the kernels in Triton's interpreter.
Nothing is measured or compared here in a way of its own: the ways are those of ``tools/report``, ``gpu_measure.py`` and
the tests. The cache that Triton is given (``TRITON_CACHE_DIR``) decides what must be compiled; every stage counts it.
"""

# ruff: noqa: E402 (the project's folders first)
import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

KIT = Path(__file__).resolve().parent
ROOT = KIT.parents[1] if KIT.name == "gpu_kit" else KIT.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests"), str(KIT)]

import gpu_measure as gm
import loops
import torch
from random_model import exit_layer_of, random_drafter, random_target
from report import decode as decoding
from report.environment import versions
from report.job import Job, one_line, write_json
from report.parts import Part
from report.runner import GRACE, run_part
from triton import knobs
from triton.runtime import cache

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.launch_config import chained
from kangaroo_kernels.workloads import Settings, workloads


def judge(job, right, *more):
    """The stage's line: how many cells are right, which are not, and what else there is to say."""
    cells = job.values.get("cells", [])
    bad = [cell for cell in cells if "error" in cell or "skipped" in cell or not right(cell)]
    names = "; ".join(" ".join(str(value) for value in list(cell.values())[:4])[:100] for cell in bad[:4])
    wrong = f"WRONG: {names}" if bad else ""
    job.note(line=" ".join([f"{len(cells) - len(bad)} of {len(cells)} right;", *more, wrong]))


# ---- the machine

ASKED = "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,ecc.mode.current"


def said(*command):
    """What a program prints, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    return (done.stdout or done.stderr).strip()


def environment(job):
    """Versions, tools and clocks; then a first launch, for which gcc builds Triton's launcher."""
    tools = {name: said("which", name) for name in ("gcc", "compute-sanitizer", "ncu")}
    own = getattr(cache, "own_key", None)  # sitecustomize.py beside this file has been here
    key = "not adopted" if own is None or not cache.adopted else "same" if own() == cache.triton_key() else "adopted"
    packages = {name: bool(importlib.util.find_spec(name)) for name in ("setuptools", "xdist", "pytest_benchmark")}
    job.note(versions=versions(), cores=os.cpu_count(), triton_key=key, tools=tools, packages=packages)
    job.note(smi=said("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"), line=f"key {key}, no launch yet")
    if not job.smoke:
        job.note(gpu=gm.read_card(job.device)._asdict(), before=gm.snapshot(job.device))
        began, source = time.monotonic(), torch.zeros(gm.STREAMS[0].chunk, dtype=torch.int32, device=job.device)
        gm.read_stream(source, gm.STREAMS[0], 1)
        torch.cuda.synchronize()
        job.note(first_launch_seconds=time.monotonic() - began)
    name = job.values["gpu"]["name"] if "gpu" in job.values else "CPU"
    known = ", ".join(f"{package} {version}" for package, version in job.values["versions"].items())
    lacking = [each for each, there in packages.items() if not there] + ["gcc"] * (not tools["gcc"])
    took = job.values.get("first_launch_seconds", 0)
    job.note(line=f"{name}, key {key}, first launch {took:.1f} s; {known}; lacking: {', '.join(lacking) or 'nothing'}")


# ---- right at real shapes


@torch.inference_mode()
def check(job, workload):
    """Relative errors against float64 on one row and on seven; whether the first row has the same bits in both."""
    op, kernel = workload.op, gm.launcher(workload.op)
    seven = workload.make(Settings(7, 32 if job.smoke else 1000, job.dtype, job.device))
    one = gm.first_rows(op, seven, 1)
    together, alone = gm.written(op, kernel, seven), gm.written(op, kernel, one)
    # rows of an appended cache lie in its second dimension, and in the batch of seven the first one's place is the same
    first = [each[:, :1] if op == "qkv_rope" and index else each[:1] for index, each in enumerate(together)]
    errors = {rows: gm.relative_error(op, got, of) for rows, got, of in ((1, alone, one), (7, together, seven))}
    right = max(errors.values()) <= gm.ALLOWED[job.dtype]
    return {"right": right, "same_bits": gm.same_bits(alone, first), "errors": errors}


def kernels(job):
    """Every operation of a layer and of the heads."""
    for shape in job.models:
        for workload in workloads(shape):
            entry = {"model": shape.name, "op": workload.op, "role": workload.role}
            job.cell("cells", entry, partial(check, job, workload))
        job.free()
    judge(job, lambda cell: cell["right"] and (job.smoke or cell["same_bits"]))


# ---- a small pair

WAYS = {
    "graphs": {},
    "launch by launch": {"graphs": False},
    "chained": {},
    "chained, launch by launch": {"graphs": False},
    "in one kernel": {"persistent": True},
    "in one kernel, launch by launch": {"persistent": True, "graphs": False},
}
PROMPT, TOKENS = "class Stack:\n    def push(self, item):\n", 300


def load(job, **settings):
    """The bundled pair; in a smoke run a random one, for the interpreter."""
    if not job.smoke:
        return Kangaroo.from_pretrained("demo", device=job.device, dtype=job.dtype, kernels="triton", **settings)
    target = random_target(job.models[0], job.device, job.dtype, quiet=0.1)
    return Kangaroo(target, random_drafter(target, exit_layer_of(job.models[0])), **settings)


def pair(job):
    """Plain decoding's tokens, in every way to launch. A grid that lost a program is an error of its cell."""
    wanted = {}

    def decodes(way, temperature):
        kangaroo = load(job, **WAYS[way])
        prompt, sampling = PROMPT, {"max_new_tokens": TOKENS, "temperature": temperature, "seed": 5}
        if job.smoke:
            prompt, sampling = [1, 2, 3], {"max_new_tokens": 4}
        with chained("chained" in way):
            plain = kangaroo.generate(prompt, plain=True, **sampling)
            drafted = [kangaroo.generate(prompt, draft_confidence_threshold=each, **sampling) for each in (0.6, 0.0)]
        first = wanted.setdefault(temperature, plain.tokens)
        same = {"plain_same": plain.tokens == first, "drafted_same": all(each.tokens == first for each in drafted)}
        return same | {"tokens_a_step": [each.stats.mean_acceptance_length for each in drafted]}

    for way in list(WAYS)[4:5] if job.smoke else WAYS:
        for temperature in (0.0,) if job.smoke else (0.0, 0.8):
            job.cell("cells", {"way": way, "temperature": temperature}, partial(decodes, way, temperature))
    judge(job, lambda cell: cell["plain_same"] and cell["drafted_same"])


# ---- the persistent loop at sizes that fill the card


def loop(job):
    """The smallest first: what is wrong there says most."""
    for name in ["tiny"] if job.smoke else loops.LOOPS:
        for what, work in (("bits", loops.bits), ("again", loops.again)):
            job.cell("cells", {"shape": name, "what": what}, partial(work, job, name))
            job.free()
    times = [f"{cell['shape']} {cell['us_a_launch']:.0f} us" for cell in job.values["cells"] if "us_a_launch" in cell]
    judge(job, lambda cell: cell["right"], f"{loops.MOST} drafts:", "; ".join(times))


# ---- the project's own tests

WORKERS = 12
CHOSEN = "bits or wherever or captured or thousand or lost or wait or graphs or the_same or (plain_tokens and bfloat16)"
LOOP_TESTS = "tests/kernels/test_draft_loop.py"
PAIR_TEST = "tests/kernels/test_chain.py::test_on_a_gpu_the_tokens_are_the_same"


def run_tests(job, chosen, *options):
    """pytest, its outcomes counted as they come; a warning of somebody else's is no failure."""
    import guard
    import pytest
    from report.tests import SMOKE_TESTS, Counter

    os.environ["GUARD_LOG"] = str((job.folder / "lost.txt").resolve())
    always = ["-p", "guard", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "-q"]
    chosen = SMOKE_TESTS if job.smoke else ("-m", "gpu", *chosen)
    status = pytest.main([*chosen, *options, *always], plugins=[Counter(job)])
    names = sorted(set(guard.compiled))
    job.note(exit_status=int(status), compiled=len(guard.compiled), compiled_names=names, hits=len(guard.hits))
    counts = ", ".join(f"{job.values.get(name, 0)} {name}" for name in ("passed", "failed", "skipped", "not_run"))
    failed = "; ".join(each["test"].rpartition("/")[2] for each in job.values.get("failures", [])[:3])
    job.note(line=f"{counts} {failed}")


def tests(job):
    """Those that hold bits, graphs and waiting, on many cores: most of a test's time is the host's."""
    workers = 2 if job.smoke else min(WORKERS, max(1, (os.cpu_count() or 1) - 2))
    chosen = ("tests/kernels", "tests/model", f"--ignore={LOOP_TESTS}", "-k", CHOSEN)
    run_tests(job, chosen, "-n", str(workers), "--max-worker-restart=24")


def loop_tests(job):
    """The persistent kernel has the card for itself."""
    run_tests(job, (LOOP_TESTS,))


# ---- speed

MATRICES = ("qkv", "output", "gate_up", "down", "head")


@torch.inference_mode()
def stream(job, workload, rows, ceiling):
    """As ``bench/bench_kernels.py`` times a kernel: right first, then replays over more than the L2 holds."""
    op, kernel = workload.op, gm.launcher(workload.op)
    settings, moved = Settings(rows, 256, job.dtype, job.device), workload.bytes_moved(rows, 256, job.dtype.itemsize)
    free = 0 if job.smoke else torch.cuda.mem_get_info(job.device)[0]
    count = 1 if job.smoke else gm.sets_needed(moved, gm.read_card(job.device).l2_bytes, free)
    sets = [workload.make(settings) for _ in range(count)]
    error = gm.relative_error(op, gm.written(op, kernel, sets[0]), sets[0])
    if not error <= gm.ALLOWED[job.dtype]:
        raise RuntimeError(f"wrong, so not timed: relative error {error:.2g}")
    if job.smoke:
        return {"us": 0.0, "share": 0.0}
    calls = [partial(kernel, *positional, **named) for positional, named in sets]
    us = gm.time_graph(calls, gm.repetitions_for(count, moved / ceiling / 1e3))
    return {"us": us.p50, "us_p20": us.p20, "us_p80": us.p80, "share": moved / us.p50 / 1e3 / ceiling}


def streams(job):
    """The card's ceilings, then the five matrices of a step: one row, seven rows, one row in a chained launch."""
    ceiling = 1.0
    if not job.smoke:
        measured = gm.measure_ceiling(job.device)
        ceiling = measured.read
        job.note(read_gigabytes=measured.read, copy_gigabytes=measured.copy, fastest=measured.stream._asdict())
        job.free()
    for shape in job.models[:2]:
        for rows, how in ((1, ""), (7, ""), (1, "chained")):
            for workload in workloads(shape):
                if workload.role in MATRICES and workload.op != "sample_head":
                    entry = {"model": shape.name, "role": workload.role, "rows": rows, "how": how}
                    with chained(bool(how)):
                        job.cell("cells", entry, partial(stream, job, workload, rows, ceiling))
                    job.free()
    job.note(after=None if job.smoke else gm.snapshot(job.device))
    timed = [cell for cell in job.values["cells"] if "us" in cell and cell["rows"] == 1 and not cell["how"]]
    shown = "; ".join(f"{cell['role']} {cell['us']:.1f} us {cell['share']:.0%}" for cell in timed)
    judge(job, lambda cell: True, f"read {ceiling:.0f} GB/s;", shown)


def decode(job):
    """The first model's decode at the shortest context; drafting in one kernel behind all else."""
    shape, context = job.models[0], decoding.contexts_of(job)[0]
    decoders, prompt = decoding.Decoders(shape, job), decoding.random_prompt(shape, context)
    plain, _, synthetic = decoding.WAYS

    def whole(way, on):
        kangaroo = decoders("synthetic" if way == synthetic else "chained" if on else "kangaroo")
        kangaroo.runner.clear()  # a captured graph keeps what it was captured with
        with chained(on):
            found = decoding.measure(kangaroo, prompt, way, 4.0, job)
        return {"ms_a_step": found.get("us_per_step", 1e6 / found["tokens_per_second"]) / 1e3} | found

    def step(drafting, drafts):
        kangaroo = decoders(decoding.DRAFTING[drafting])
        kangaroo.runner.clear()
        with chained(drafting == decoding.CHAINED):
            return {"ms_a_step": decoding.measure_step(kangaroo, prompt, drafts, job)["us_per_step"] / 1e3}

    for way in (plain, synthetic):
        for on in (False, True):
            job.cell("cells", {"way": way, "chained": on}, partial(whole, way, on))
    for drafting in decoding.DRAFTING:
        for drafts in (2,) if job.smoke else decoding.STEP_DRAFTS:
            job.cell("cells", {"way": drafting, "drafts": drafts}, partial(step, drafting, drafts))
    shown = []
    for cell in (each for each in job.values["cells"] if "ms_a_step" in each):
        how = f"{cell['drafts']} drafts" if "drafts" in cell else "chained" * cell["chained"]
        speed = f" {cell['tokens_per_second']:.0f}/s" if "tokens_per_second" in cell else ""
        shown.append(f"{cell['way']} {how} {cell['ms_a_step']:.2f} ms{speed}")
    judge(job, lambda cell: True, "; ".join(shown))


# ---- all of them

STAGES = {  # seconds that each is likely to need, and those that it may have
    environment: (10, 30),
    kernels: (15, 45),
    pair: (15, 45),
    loop: (25, 60),
    tests: (45, 75),
    loop_tests: (20, 45),
    streams: (25, 50),
    decode: (35, 70),
}


def work(given):
    """One stage, in its own process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job, compiled, hits = Job(given.piece, given.folder, given.seconds, given.smoke), [], []
    knobs.compilation.listener = lambda **event: (hits if event["cache_hit"] else compiled).append(event["src"].name)
    torch.manual_seed(0)
    try:
        next(stage for stage in STAGES if stage.__name__ == given.stage)(job)
    finally:
        asked = {"compiled": len(compiled), "compiled_names": sorted(set(compiled)), "hits": len(hits)}
        job.note(**asked | job.values)


def main():
    """Every stage; what there is stays written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", nargs="?")
    parser.add_argument("--piece", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("first"))
    parser.add_argument("--seconds", type=float, default=265)
    parser.add_argument("--only", default="")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if given.stage:
        return work(given)
    given.out.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if not given.only or stage.__name__ in given.only.split(",")]
    key = KIT / "key.json"
    about = {"commit": json.loads(key.read_text()).get("commit") if key.is_file() else None, "smoke": given.smoke}
    began, found = time.monotonic(), {"about": about | {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}}
    for index, stage in enumerate(stages):
        left = given.seconds - (time.monotonic() - began) - GRACE
        seconds = max(5.0, min(STAGES[stage][1], left - sum(STAGES[each][0] for each in stages[index + 1 :])))
        part, command = Part(stage.__name__, 1, ""), (sys.executable, str(KIT / "first.py"))
        piece = found[part.name] = run_part(part, seconds, given.out, smoke=given.smoke, command=command)
        write_json(given.out / "first.json", found)
        line = f"{part.name:12}{piece['seconds']:6.1f} s {piece['status']}: {piece.get('line') or piece.get('at')}"
        line += f" [{piece.get('compiled')} compiled, {piece.get('hits')} found]"
        with (given.out / "log.txt").open("a", encoding="utf-8") as log:
            for text in (line, *piece.get("output", ())):
                print(text, flush=True)
                log.write(text + "\n")
        if time.monotonic() - began > given.seconds:
            break
    return None


if __name__ == "__main__":
    main()
