"""Training an adapter: it learns, it is what the runtime runs, and a stopped run goes on as if it had not stopped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pairs import TURN_TEMPLATE, make_target, make_tokenizer
from pretended_gpus import pretended_gpus
from safetensors.torch import load_file
from torch import Tensor

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.drafters.adapter import parse_adapter_config
from kangaroo_kernels.model.drafters.parts import Parts
from kangaroo_kernels.model.text import load_tokenizer
from kangaroo_kernels.model.training import card, states, trainer
from kangaroo_kernels.model.training import settings as settings_module
from kangaroo_kernels.model.training import teacher as teacher_module
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter
from kangaroo_kernels.model.training.draft_vocabulary import add_draft_vocabulary
from kangaroo_kernels.model.training.plan import read_plan
from kangaroo_kernels.model.training.processes import Processes
from kangaroo_kernels.model.training.scores import Judged, expected_acceptance_length
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.teacher import Teacher
from kangaroo_kernels.model.training.trainer import train_adapter

TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 60


EVERY_PART = {"draft_head_rank": 20, "draft_block": 3, "trained_confidence": True}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"), max_position_embeddings=64)
    make_tokenizer(folder, eos_token="@", chat_template=TURN_TEMPLATE)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def settings(target: Path, text: Path, out: Path, **changes: Any) -> TrainingSettings:
    given: dict[str, Any] = {"steps": 12, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-2} | changes
    return TrainingSettings(model=str(target), data=(text,), exit_layer=2, out=out, device="cpu", **given)


def state(out: Path) -> dict[str, Any]:
    """What a run has kept in its folder."""
    kept: dict[str, Any] = torch.load(out / "training_state.pt", weights_only=True)
    return kept


def calls(holder: Any, name: str, note: Callable[..., Any], work: Callable[[], Any]) -> list[Any]:
    """What ``note`` makes of the arguments of each call of a function while ``work`` runs."""
    noted, method = [], getattr(holder, name)

    def noting(*arguments: Any, **named: Any) -> Any:
        noted.append(note(*arguments))
        return method(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder, name, noting)
        work()
    return noted


def steps_made(work: Callable[[], Any]) -> list[int]:
    """The numbers of the steps that are made, from 0 on."""
    return calls(trainer.AdapterTraining, "update", lambda training, _: training.step, work)


def lessons_made(work: Callable[[], Any]) -> int:
    """For how many windows of the run the target was asked."""
    return sum(calls(states.Lessons, "_make", lambda lessons, first: len(lessons.windows[first : first + 16]), work))


def test_agreement_rises(target: Path, text: Path, tmp_path: Path) -> None:
    before = train_adapter(settings(target, text, tmp_path / "one", steps=1, learning_rate=1e-6))
    after = train_adapter(settings(target, text, tmp_path / "many", steps=500))
    assert after["agreement"] > before["agreement"] + 0.2, (before, after)
    assert Kangaroo.from_pretrained(target, tmp_path / "many").drafter.first_layer == 2


def test_an_adapter_of_qwen2_is_a_layer_of_llamas(text: Path, tmp_path: Path) -> None:
    """The target's biases are not the adapter's."""
    target = make_tokenizer(make_target(tmp_path / "target", family="qwen2"))
    train_adapter(settings(target, text, tmp_path / "adapter", steps=1))
    kangaroo = Kangaroo.from_pretrained(target, tmp_path / "adapter")
    assert kangaroo.target.config.qkv_bias and not kangaroo.drafter.adapter.config.llama.qkv_bias
    plain = kangaroo.generate([5, 6, 7], max_new_tokens=20, plain=True)
    drafted = kangaroo.generate([5, 6, 7], max_new_tokens=20, draft_confidence_threshold=0.0)
    assert drafted.tokens == plain.tokens and drafted.stats.drafted


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_attention_heads": 6, "intermediate_size": 40},
        {"deep_state_size": 30},
        {"draft_head_rank": 20, "deep_state_size": 30},
        {"draft_block": 3, "draft_head_rank": 20},
        {"trained_confidence": True, "draft_head_rank": 20},
    ],
)
def test_the_runtime_runs_what_was_trained(shape: dict[str, int], target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    train_adapter(settings(target, text, out, **shape))
    kangaroo = Kangaroo.from_pretrained(target, out)
    config = kangaroo.drafter.adapter.config.llama
    parts = kangaroo.drafter.adapter.config.parts
    asked = {"num_attention_heads": 4, "intermediate_size": 0, "head_dim": 12} | shape
    assert {name: getattr(parts, name, getattr(config, name, None)) for name in asked} == asked
    adapter = TrainableAdapter(config, 32, parts)
    adapter.load_state_dict(load_file(out / "model.safetensors"))
    teacher = Teacher(target, torch.device("cpu"), exit_layers=[2])
    tokens = torch.randint(67, (32,), generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "bfloat16", Tensor.float)  # lessons without their rounding
        patch.setattr(teacher_module, "autocast", lambda _: nullcontext())
        (lesson,) = teacher.lessons([tokens])
        head = adapter.draft_head["up"].weight if parts.draft_head_rank else teacher.head
        wanted = adapter(lesson.exit_hidden[None, :, 0], lesson.final[None])[0][0] @ head.T
        targets = teacher.normed(lesson.final) @ teacher.head.T
    ours = kangaroo.logits(tokens.tolist())
    torch.testing.assert_close(kangaroo.draft_logits(tokens.tolist()), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, targets, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logsumexp(-1), lesson.log_total, atol=1e-4, rtol=1e-4)


def test_a_killed_run_goes_on_to_the_same_losses(target: Path, text: Path, tmp_path: Path) -> None:
    """The process is killed by the system in its eighth step, when its last checkpoint is of the fifth."""
    train_adapter(settings(target, text, tmp_path / "whole"))
    killed = settings(target, text, tmp_path / "killed")
    child = f"""
import os, signal
from pathlib import PosixPath
from kangaroo_kernels.model.training import trainer
from kangaroo_kernels.model.training.plan import read_plan
from kangaroo_kernels.model.training.scores import Judged, expected_acceptance_length
from kangaroo_kernels.model.training.settings import TrainingSettings

def kill(self, share, update=trainer.AdapterTraining.update):
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.CHECKPOINT_SECONDS = 0.0 if self.step < 5 else 3600.0
    update(self, share)

trainer.AdapterTraining.update = kill
trainer.train_adapter({killed!r})
"""
    assert subprocess.run([sys.executable, "-c", child], check=False).returncode == -signal.SIGKILL
    assert state(killed.out)["step"] == 5 and not (killed.out / "config.json").exists()
    with pytest.raises(KangarooError, match="a run with another seed"):
        train_adapter(replace(killed, seed=5))
    made = steps_made(lambda: train_adapter(killed))
    assert made == [5, 6, 7, 8, 9, 10, 11]
    assert state(killed.out)["losses"] == state(tmp_path / "whole")["losses"]
    wanted, got = (load_file(out / "model.safetensors") for out in (tmp_path / "whole", killed.out))
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert not list(killed.out.glob("*.partial"))


def test_ctrl_c_keeps_the_step_and_says_where(target: Path, text: Path, tmp_path: Path) -> None:
    stopped = settings(target, text, tmp_path / "a")

    def interrupt(_stage: str, _done: int, _total: int, note: str) -> None:
        if note.startswith("step 4,"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"a keeps the run after step 4$"):
        train_adapter(stopped, interrupt)
    assert state(stopped.out)["step"] == 4
    shorter = replace(stopped, steps=3)
    assert train_adapter(shorter)["steps"] == 4  # shortened: it is finished where it is


def test_a_finished_run_is_extended(target: Path, text: Path, tmp_path: Path) -> None:
    short = settings(target, text, tmp_path / "a")
    train_adapter(short)
    with pytest.raises(KangarooError, match=r"holds an adapter of 12 steps; raise --steps"):
        train_adapter(short)
    (short.out / "training.json").unlink()  # as if it had been stopped while it was scored
    assert steps_made(lambda: train_adapter(short)) == []
    assert steps_made(lambda: train_adapter(replace(short, steps=15))) == [12, 13, 14]
    assert train_adapter(replace(short, steps=None, minutes=0.01))["steps"] > 15
    text.write_text(TEXT.upper())
    with pytest.raises(KangarooError, match="the data has changed"):
        train_adapter(replace(short, steps=10**6))


def test_a_warm_start_begins_with_the_weights(target: Path, text: Path, tmp_path: Path) -> None:
    first = settings(target, text, tmp_path / "a")
    train_adapter(first)
    train_adapter(replace(first, out=tmp_path / "b", start_from=str(first.out), steps=1, learning_rate=1e-9))
    one, other = (load_file(out / "model.safetensors") for out in (first.out, tmp_path / "b"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=0)
    with pytest.raises(KangarooError, match="other tensors than the one to be trained"):
        train_adapter(replace(first, out=tmp_path / "c", start_from=str(first.out), num_attention_heads=6))
    (first.out / "training_state.pt").unlink()
    with pytest.raises(KangarooError, match="--start-from"):
        train_adapter(first)


@pytest.mark.parametrize(
    ("more", "size", "another", "parts"),
    [
        ("intermediate_size", 40, 8, ("mlp.", "post_attention")),
        ("deep_state_size", 40, 8, ("state_",)),
        ("draft_block", 4, 3, ("block.",)),
        ("trained_confidence", True, False, ("confidence.",)),
    ],
)
def test_an_adapter_of_attention_alone_gets_more(
    more: str, size: int, another: int, parts: tuple[str, ...], target: Path, text: Path, tmp_path: Path
) -> None:
    """Its first draft is the same at first, and every tensor of what is new learns."""
    first = settings(target, text, tmp_path / "a")
    train_adapter(first)
    grown = replace(first, out=tmp_path / "b", start_from=str(first.out), **{more: size})
    train_adapter(replace(grown, steps=1, learning_rate=1e-9))
    one, other = (Kangaroo.from_pretrained(target, out).draft_logits([5, 6, 7, 8]) for out in (first.out, grown.out))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    longer = replace(grown, out=tmp_path / "c")
    train_adapter(longer)
    one, other = (load_file(out / "model.safetensors") for out in (grown.out, longer.out))
    learning = [name for name in one if any(part in name for part in parts)]
    assert len(learning) == (4 if "size" in more else 2)
    for name in learning:
        assert not torch.allclose(one[name], other[name], atol=1e-4), name
    with pytest.raises(KangarooError, match="--" + more.replace("_", "-")):
        train_adapter(replace(grown, out=tmp_path / "d", start_from=str(longer.out), **{more: another}))


def test_a_head_of_its_own_begins_as_the_best_factors(target: Path, text: Path, tmp_path: Path) -> None:
    """And both of them learn; an adapter that had none is a beginning for the rest."""
    head, norm = torch.randn(67, 12), 1 + 0.1 * torch.randn(12)
    config = parse_adapter_config({**json.loads((target / "config.json").read_text()), "hidden_size": 12})
    adapter = TrainableAdapter(config, 8, Parts(draft_head_rank=7))
    adapter.factorize(head, norm)
    left, values, right = torch.linalg.svd(head * norm)
    wanted = left[:, :7] * values[:7] @ right[:7]
    factors = (adapter.draft_head[name].weight for name in ("up", "down"))
    torch.testing.assert_close(torch.matmul(*factors).detach(), wanted, atol=1e-4, rtol=1e-4)
    first = settings(target, text, tmp_path / "a")
    train_adapter(first)
    grown = replace(first, out=tmp_path / "b", start_from=str(first.out), draft_head_rank=20)
    train_adapter(replace(grown, steps=1, learning_rate=1e-9))
    longer = replace(grown, out=tmp_path / "c")
    train_adapter(longer)
    before, one, other = (load_file(run.out / "model.safetensors") for run in (first, grown, longer))
    left, values, right = torch.linalg.svd(
        load_file(target / "model.safetensors")["lm_head.weight"] * before["norm.weight"]
    )
    wanted = left[:, :20] * values[:20] @ right[:20]  # behind the norm that was learned, not behind the target's
    product = one["draft_head.up.weight"] @ one["draft_head.down.weight"]
    torch.testing.assert_close(product, wanted, atol=1e-4, rtol=1e-4)
    assert {name for name in one if name not in before} == {"draft_head.down.weight", "draft_head.up.weight"}
    assert (one["norm.weight"] == 1).all() and not torch.equal(one["norm.weight"], other["norm.weight"])
    for name in one:
        assert not torch.allclose(one[name], other[name], atol=1e-4), name
        if name in before and name != "norm.weight":
            torch.testing.assert_close(one[name], before[name])


def test_a_trained_confidence_changes_nothing_of_the_adapter(target: Path, text: Path, tmp_path: Path) -> None:
    """It learns from the adapter's guesses, and has no share of what their gradients are clipped to."""
    plain = settings(target, text, tmp_path / "a")
    trained = replace(plain, out=tmp_path / "b", trained_confidence=True)
    for run in (plain, trained):
        train_adapter(run)
    one, other = (load_file(run.out / "model.safetensors") for run in (plain, trained))
    assert {*other} - {*one} == {"confidence.weight", "confidence.bias"}
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_exit_layers_side_by_side_learn_as_alone(target: Path, text: Path, tmp_path: Path) -> None:
    """The target is asked once for both. One whose state is older, after ``kill -9``, catches up with the other."""
    alone = settings(target, text, tmp_path / "alone").with_exits([1, 3])
    asked = [lessons_made(lambda: train_adapter(run)) for run in alone]  # noqa: B023
    both = settings(target, text, tmp_path / "both").with_exits([1, 3])
    assert lessons_made(lambda: trainer.train_adapters(both)) == asked[0] == asked[1]
    shutil.rmtree(both[0].out)
    (both[1].out / "training.json").unlink()
    assert steps_made(lambda: trainer.train_adapters(both)) == list(range(12))
    for one, other in zip(alone, both, strict=True):
        assert state(one.out)["losses"] == state(other.out)["losses"]
        wanted, got = (json.loads((run.out / "training.json").read_text()) for run in (one, other))
        assert got["agreement"] == wanted["agreement"]
        assert Kangaroo.from_pretrained(target, other.out).drafter.first_layer == one.exit_layer
    with pytest.raises(KangarooError, match=r"\[2, 2\]; give each of them once"):
        both[0].with_exits([2, 2])


def test_lessons_on_disk_are_those_in_memory(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = settings(target, text, tmp_path / "kept", cache=True, steps=4)
    train_adapter(kept)
    train_adapter(replace(kept, out=tmp_path / "made", cache=False))
    assert state(kept.out)["losses"] == state(tmp_path / "made")["losses"]
    assert lessons_made(lambda: train_adapter(replace(kept, steps=5))) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(KangarooError, match=r"the states take 0.00063 GB, and the disk of .* has 0.0001 GB left"):
        train_adapter(replace(kept, out=tmp_path / "full"))


def test_a_run_goes_on_with_its_data_elsewhere(target: Path, text: Path, tmp_path: Path) -> None:
    run = settings(target, text, tmp_path / "a", steps=2)
    train_adapter(run)
    moved = tmp_path / "moved.txt"
    moved.write_text(text.read_text())
    assert steps_made(lambda: train_adapter(replace(run, data=(moved,), steps=3))) == [2]


def test_a_damaged_state_is_told_of(target: Path, text: Path, tmp_path: Path) -> None:
    run = settings(target, text, tmp_path / "a", steps=2)
    train_adapter(run)
    file = run.out / "training_state.pt"
    whole = file.read_bytes()
    for content in (whole[:1000], b"something else"):
        file.write_bytes(content)
        with pytest.raises(KangarooError, match=r"training_state.pt is damaged .*take a new folder"):
            train_adapter(replace(run, steps=3))


def test_what_cannot_be_is_refused_before_a_step(target: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(KangarooError, match=r"num_attention_heads is 7; the model's hidden size, 48, must be a mul"):
        train_adapter(settings(target, text, tmp_path / "a", num_attention_heads=7))
    with pytest.raises(KangarooError, match="the --held-out files hold no text"):
        train_adapter(settings(target, text, tmp_path / "a", held_out=(empty,)))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wanted", [None, "7"])
@pytest.mark.parametrize("name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"])
def test_few_kernels_of_the_cpus_library_stay(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wanted: str | None
) -> None:
    """Every step has shapes of its own; a caller's own bound holds."""
    monkeypatch.setenv(name, wanted or "")
    if wanted is None:
        monkeypatch.delenv(name)
    train_adapter(settings(target, text, tmp_path / "a", steps=1))
    assert os.environ[name] == (wanted or "32")


def test_lessons_that_had_to_go_are_made_again(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for 72 windows of 104; memory stays bounded, and what comes back has the same bits."""
    monkeypatch.setattr(states, "ROOM", {"cpu": 72 * 32 * teacher_module.bytes_per_token(48)})
    run = settings(target, text, tmp_path / "a", steps=60, reuse=1)
    most = calls(states.Lessons, "_make", lambda lessons, _: len(lessons.kept), lambda: train_adapter(run))
    assert len(most) > 7 and max(most) <= 72
    plan = read_plan(replace(run, out=tmp_path / "b"))
    lessons = states.Lessons(Teacher(target, torch.device("cpu"), exit_layers=[2]), plan.corpus.windows)
    first = lessons[3]
    for index in range(99):
        _ = lessons[index]
    assert 3 not in lessons.kept
    assert all(torch.equal(*pair) for pair in zip(first, lessons[3], strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says where memory lies")
def test_kept_lessons_do_not_lie_on_the_heap(target: Path, text: Path, tmp_path: Path) -> None:
    """There they would keep the temporaries of all steps from giving their memory back."""
    plan = read_plan(settings(target, text, tmp_path / "a"))
    lessons = states.Lessons(Teacher(target, torch.device("cpu"), exit_layers=[2]), plan.corpus.windows)
    kept = [part for index in range(40) for part in lessons[index]]
    heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    first, last = (int(end, 16) for end in heap.split()[0].split("-"))
    assert not any(first <= part.data_ptr() < last for part in kept)


def test_reuse_asks_the_target_less_often(target: Path, text: Path, tmp_path: Path) -> None:
    once, often = (
        lessons_made(lambda: train_adapter(settings(target, text, tmp_path / str(reuse), steps=20, reuse=reuse)))  # noqa: B023
        for reuse in (1, 4)
    )
    assert often < once


EXACT = """
import contextlib, sys
import torch
from pathlib import PosixPath
from kangaroo_kernels.model.training import states, teacher, trainer
from kangaroo_kernels.model.training.settings import TrainingSettings

torch.Tensor.bfloat16 = torch.Tensor.float  # float32 throughout, so that another order of sums is all that differs
teacher.autocast = trainer.autocast = lambda _: contextlib.nullcontext()
asked, make = [], states.Lessons._make
states.Lessons._make = lambda lessons, first: (asked.append(first), make(lessons, first))
"""


def test_two_processes_make_the_steps_of_one(target: Path, text: Path, tmp_path: Path) -> None:
    """torchrun shares a step's windows out, and each window's lesson is asked for by one process alone."""
    how = {"batch_size": 16, "reuse": 1, "steps": 4, **EVERY_PART}
    one, two = (settings(target, text, tmp_path / name, **how) for name in ("one", "two"))
    for run in (one, two):
        code = EXACT + f"report = trainer.train_adapter({run!r})\nprint(sorted(asked), bool(report), flush=True)"
        (tmp_path / "run.py").write_text(code)
        alone = [sys.executable, "run.py"]
        shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run.py"]
        done = subprocess.run(alone if run is one else shared, cwd=tmp_path, capture_output=True, text=True, check=True)
        run.out.joinpath("said").write_text(done.stdout)
    wanted, got = (state(run.out) for run in (one, two))
    assert got["step"] == wanted["step"] == 4 and got["positions"] == wanted["positions"]
    assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    for name, tensor in wanted["adapter"].items():
        torch.testing.assert_close(got["adapter"][name], tensor, rtol=1e-2, atol=1e-2, msg=name)
    assert (one.out / "said").read_text() == "[0, 16, 32, 48] True\n"
    said = sorted((two.out / "said").read_text().splitlines())
    assert said == ["[0, 32] True", "[16, 48] False"]


def test_each_process_trains_on_its_own_gpu(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpus(monkeypatch) as current:

        @contextmanager
        def join(device: torch.device) -> Iterator[Processes]:
            current.index = 1  # as the second of two processes does
            yield Processes(1, 2)

        monkeypatch.setattr(trainer, "join_processes", join)
        teacher = Mock(side_effect=KangarooError("far enough"))
        monkeypatch.setattr(trainer, "Teacher", teacher)
        with pytest.raises(KangarooError, match="far enough"):
            train_adapter(replace(settings(target, text, tmp_path / "run"), device="cuda"))
    assert teacher.call_args.args[1] == torch.device("cuda:1")


THREE_DRAFTS = [3 * 32, 3 * 16, 3 * 16, 32, 16, 16]


@pytest.mark.parametrize(
    ("more", "positions"),
    [({}, [3 * 32, 32]), ({"deep_state_size": 20, "unrolled_drafts": 3}, THREE_DRAFTS), (EVERY_PART, THREE_DRAFTS)],
)
def test_parts_of_a_batch_make_its_step(
    more: dict[str, Any],
    positions: list[int],
    target: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a deep state or a block, a step's second and third draft learn on half of the positions."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    for module in (teacher_module, trainer):
        monkeypatch.setattr(module, "autocast", lambda _: nullcontext())
    whole = settings(target, text, tmp_path / "a", steps=4, **more)
    parts = replace(whole, out=tmp_path / "b", micro_batch_size=3)
    train_adapter(whole)
    sizes = calls(trainer.DraftLoss, "backward", lambda _, guesses, *rest: len(guesses), lambda: train_adapter(parts))
    assert sizes == positions * 4
    assert state(parts.out)["losses"] == pytest.approx(state(whole.out)["losses"], rel=1e-4)
    for name, tensor in state(whole.out)["adapter"].items():
        torch.testing.assert_close(state(parts.out)["adapter"][name], tensor, rtol=1e-2, atol=1e-3, msg=name)
    assert steps_made(lambda: train_adapter(replace(parts, steps=5, micro_batch_size=1))) == [4]


def test_the_report(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    report = train_adapter(settings(target, text, out))
    assert report["steps"] == 12 and report["positions"] == 12 * 4 * 32
    assert report["parameters"] == sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert [point["step"] for point in report["curve"]] == list(range(1, 13))
    assert 0 <= report["agreement"] <= 1 <= report["expected_acceptance_length"]
    assert report["mean_acceptance_length"] >= 1 and report["speedup"] > 0
    assert json.loads((out / "training.json").read_text()) == report
    page = (out / "README.md").read_text()
    assert (
        f"| {report['agreement']:,} |" in page and "one layer of attention behind the model's first\n2 layers" in page
    )
    assert "curve.png" in page and (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (out / "training.json").read_text() + page


def test_without_matplotlib_there_is_no_picture(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "can_draw", lambda: False)
    train_adapter(settings(target, text, tmp_path / "a", steps=1))
    assert "curve.png" not in (tmp_path / "a" / "README.md").read_text()
    assert not (tmp_path / "a" / "curve.png").exists()


def test_the_expected_length_is_that_of_decoding() -> None:
    """Three windows by hand: a chain of six and a bonus token, an unsure draft that ends a step, a wrong one."""
    assert expected_acceptance_length([[Judged([True] * 7, [0.9] * 7)]]) == 7
    assert expected_acceptance_length([[Judged([True] * 4, [0.9, 0.1, 0.9, 0.9])]]) == (3 + 2) / 2
    first, later = Judged([True, False, False], [0.9] * 3), Judged([False, True, True], [0.9] * 3)
    assert expected_acceptance_length([[first]]) == (2 + 1) / 2
    assert expected_acceptance_length([[first, later]]) == 3 + 1
    assert expected_acceptance_length([[Judged([], [])]]) == 0


def test_the_curve_keeps_to_its_points() -> None:
    points = trainer.curve([float(step) for step in range(1, 251)])
    assert len(points) == 84 and points[0] == {"step": 3, "loss": 2.0} and points[-1] == {"step": 250, "loss": 250.0}


def test_the_most_frequent_tokens_are_drafted(target: Path, text: Path, tmp_path: Path) -> None:
    """The special ones, too. A run that began without a draft vocabulary goes on to one, and back."""
    out, given = tmp_path / "adapter", settings(target, text, tmp_path / "adapter")
    assert steps_made(lambda: train_adapter(given)) == list(range(12))
    assert steps_made(lambda: train_adapter(replace(given, steps=13, draft_vocabulary=20))) == [12]
    tokenizer = load_tokenizer(target)
    counted = Counter(tokenizer(TEXT)["input_ids"])
    special = {*tokenizer.all_special_ids}
    drafted = set(Kangaroo.from_pretrained(target, out).drafter.adapter.head.vocabulary.tokens.tolist())
    assert special <= drafted and len(drafted) == 20
    least = min(counted[token] for token in drafted - special)
    assert {token for token in counted if counted[token] > least} <= drafted
    train_adapter(replace(given, steps=14))
    assert Kangaroo.from_pretrained(target, out).drafter.adapter.head.vocabulary is None


def test_scores_are_those_of_the_drafted_tokens(target: Path, text: Path, tmp_path: Path) -> None:
    """An adapter that may draft one token besides the special ones hardly ever agrees."""
    few = train_adapter(settings(target, text, tmp_path / "few", steps=300, draft_vocabulary=3))
    whole = train_adapter(settings(target, text, tmp_path / "whole", steps=300))
    assert few["curve"] == whole["curve"]
    assert few["agreement"] < whole["agreement"] / 2


def test_an_adapter_gets_a_draft_vocabulary_without_training(target: Path, text: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "trained", tmp_path / "again"
    train_adapter(settings(target, text, out, steps=1))
    shutil.copytree(out, again)
    added = add_draft_vocabulary(str(target), again, [text], 20)
    assert (added.tokens, added.vocab_size) == (20, 67)
    tokens = Kangaroo.from_pretrained(target, again).drafter.adapter.head.vocabulary.tokens
    share = Counter(load_tokenizer(target)(TEXT)["input_ids"])
    assert added.coverage == pytest.approx(sum(share[token] for token in tokens.tolist()) / share.total(), abs=1e-3)
    assert 0.5 < added.coverage < 1


@pytest.mark.parametrize(("size", "message"), [(67, "from 1 to 66"), (2, "2 special tokens"), (0, "at least 1")])
def test_draft_vocabularies_that_cannot_serve(
    size: int, message: str, target: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(KangarooError, match=message):
        train_adapter(settings(target, text, tmp_path / "adapter", draft_vocabulary=size))
    assert not (tmp_path / "adapter").exists()


def test_losses_for_tensorboard(target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss once, and after a resumption those behind the state anew."""
    shown: dict[int, float] = {}
    made: list[tuple[Path, int]] = []
    board = SimpleNamespace(add_scalar=lambda name, value, step: shown.update({step: value}), flush=lambda: None)

    def writer(folder: Path, purge_step: int) -> SimpleNamespace:
        made.append((folder, purge_step))
        return board

    with pytest.raises(KangarooError, match="tensorboard is not installed; pip install"):
        monkeypatch.setattr(settings_module, "find_spec", lambda _: None)
        settings(target, text, tmp_path / "a", tensorboard=True)
    monkeypatch.setattr(settings_module, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    run = settings(target, text, tmp_path / "a", tensorboard=True)
    train_adapter(run)
    train_adapter(replace(run, steps=14))
    assert made == [(run.out, 1), (run.out, 13)]
    assert shown == dict(enumerate(state(run.out)["losses"], 1))


def test_held_out_files(target: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("9876543210 god yzal eht " * 40)
    ours = train_adapter(settings(target, text, tmp_path / "a"))
    theirs = train_adapter(settings(target, text, tmp_path / "b", held_out=(other,)))
    assert ours["agreement"] != theirs["agreement"]
    by_heart = train_adapter(settings(target, text, tmp_path / "c", held_out=(other,), steps=300))
    assert by_heart["agreement_on_learned_windows"] > by_heart["agreement"] + 0.2
    assert ours["curve"] != theirs["curve"]  # 3 % more to learn from


def test_conversations_are_learned_where_the_assistant_speaks(target: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defgh"}]
    chat.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(9)))
    report = train_adapter(settings(target, chat, tmp_path / "a", batch_size=8))
    assert report["positions"] == 12 * 8 * len("defgh@")


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_either_loss_falls(share: float, target: Path, text: Path, tmp_path: Path) -> None:
    run = settings(target, text, tmp_path / "a", steps=200, total_variation=share, vocabulary=20)
    curve = train_adapter(run)["curve"]
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]


def test_a_loss_that_is_no_number_ends_the_run(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "rise_and_fall", lambda _: math.nan)
    with pytest.raises(KangarooError, match=r"the loss is nan at step \d+; take a lower learning_rate"):
        train_adapter(settings(target, text, tmp_path / "a"))


@pytest.mark.parametrize("limits", [{}, {"minutes": 60.0}])
def test_a_deadline_ends_everything(limits: dict[str, float], target: Path, text: Path, tmp_path: Path) -> None:
    now, told = time.perf_counter(), list[str]()
    run = settings(target, text, tmp_path / "past", held_out=(text,), **limits)
    past = train_adapter(run, lambda stage, *_: told.append(stage), deadline=now)
    assert told == ["training", "scoring", "scoring"]  # of 64 held-out windows, one, and one that was learned
    assert past["steps"] == 1 and "agreement" in past and "speedup" not in past
    assert train_adapter(settings(target, text, tmp_path / "far"), deadline=now + 3600)["steps"] == 12


def test_minutes_bound_scoring_too(target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves a second a look: no work begins after its end, and steps leave time for scoring."""
    looks = count(0)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    run = settings(target, text, tmp_path / "a", minutes=2, steps=None)
    report = train_adapter(run)
    assert state(run.out)["elapsed"] < 0.85 * 120
    assert "speedup" in report and next(looks) <= 120 + 30  # a step of decoding looks a few times


def test_the_rate_falls_towards_a_deadline(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, rates = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    step = torch.optim.AdamW.step

    def note(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        clock[0] += 1
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    monkeypatch.setattr(trainer, "SCORING_SHARE", 0.2)
    train_adapter(settings(target, text, tmp_path / "a", steps=10**9, learning_rate=0.1), deadline=5.0)
    assert rates == pytest.approx([0.001, 0.075, 0.05, 0.025])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"sequence_length": 65}, "the model's context holds 64"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"minutes": 0.0}, "minutes"),
        ({"reuse": 0}, "reuse is 0"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"total_variation": 1.5}, "total_variation is 1.5"),
        ({"start_from": "nowhere/at/all"}, "nowhere"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"held_out": (Path("nowhere.txt"),)}, "nowhere.txt"),
        ({"device": "abacus"}, "device"),
    ],
)
def test_settings_that_cannot_serve(
    changes: dict[str, Any], words: str, target: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(KangarooError, match=words):
        train_adapter(replace(settings(target, text, tmp_path / "a"), **changes))
    assert not (tmp_path / "a").exists()


def test_files_that_cannot_serve(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with pytest.raises(KangarooError, match="no data files"):
        TrainingSettings(model=str(target), data=(), exit_layer=2, out=out)
    short = tmp_path / "short.txt"
    short.write_text("hello")
    with pytest.raises(KangarooError, match=r"the data makes 1 windows of at most 32 tokens .* give more data"):
        train_adapter(settings(target, short, out))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KangarooError, match=r"binary.txt is not UTF-8 text \(byte 0\)"):
        train_adapter(settings(target, binary, out))
    with pytest.raises(KangarooError, match=r"data file .*gone.txt cannot be read: No such file or directory\."):
        train_adapter(settings(target, tmp_path / "gone.txt", out))
    bare = make_target(tmp_path / "bare")
    with pytest.raises(KangarooError, match="no tokenizer"):
        train_adapter(settings(bare, text, out))
    with pytest.raises(KangarooError, match="exit_layer is 4"):
        train_adapter(TrainingSettings(model=str(target), data=(text,), exit_layer=4, out=out))
    with pytest.raises(KangarooError, match="is a file"):
        train_adapter(settings(target, text, text))
    assert not out.exists()
