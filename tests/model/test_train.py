"""Training an adapter: it learns, it is what the runtime runs, and a stopped run goes on as if it had not stopped."""

import json
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import make_target, make_tokenizer
from safetensors.torch import load_file

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.target.checkpoint import open_folder
from kangaroo_kernels.model.text import load_tokenizer
from kangaroo_kernels.model.training import data, trainer
from kangaroo_kernels.model.training.adapter_module import TrainableAdapter
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.teacher import Teacher
from kangaroo_kernels.model.training.trainer import train_adapter

TEXT = "the quick brown fox jumps over the lazy dog 0123456789 " * 60


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"), max_position_embeddings=64)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def settings(target: Path, text: Path, out: Path, **changes: Any) -> TrainingSettings:
    given: dict[str, Any] = {"steps": 12, "batch_size": 4, "sequence_length": 32, "learning_rate": 1e-2} | changes
    return TrainingSettings(model=str(target), data=(text,), exit_layer=2, out=out, device="cpu", **given)


def test_agreement_rises(target: Path, text: Path, tmp_path: Path) -> None:
    before = train_adapter(settings(target, text, tmp_path / "one", steps=1, learning_rate=1e-6))
    after = train_adapter(settings(target, text, tmp_path / "many", steps=200))
    assert after["top1_agreement_text"] > before["top1_agreement_text"] + 0.2, (before, after)
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


@pytest.mark.parametrize("heads", [None, 6])
def test_the_runtime_runs_what_was_trained(heads: int | None, target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    train_adapter(settings(target, text, out, num_attention_heads=heads))
    kangaroo = Kangaroo.from_pretrained(target, out)
    config = open_folder(out).config
    assert config.num_attention_heads == (heads or 4) and config.head_dim == 12
    adapter = TrainableAdapter(config, 32)
    adapter.load_state_dict(load_file(out / "model.safetensors"))
    teacher = Teacher(target, 2, torch.device("cpu"))
    tokens = torch.randint(67, (32,), generator=torch.Generator().manual_seed(3))
    exit_hidden, logits = teacher(tokens[None])
    with torch.no_grad():
        wanted = torch.nn.functional.linear(adapter(exit_hidden), teacher.head)[0]
    torch.testing.assert_close(kangaroo.draft_logits(tokens.tolist()), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kangaroo.logits(tokens.tolist()), logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("self_generated", [False, True])
def test_a_stopped_run_goes_on(
    self_generated: bool, target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"self_generated": self_generated, "generated_windows": 8}
    train_adapter(settings(target, text, tmp_path / "whole", **changes))
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)

    def stop_at_seven(stage: str, done: int, total: int, note: str) -> None:
        if stage == "training" and done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        train_adapter(settings(target, text, out, **changes), stop_at_seven)
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    with pytest.raises(KangarooError, match="other settings"):
        train_adapter(settings(target, text, out, seed=5, **changes))
    seen = []
    train_adapter(settings(target, text, out, **changes), lambda stage, done, *_: seen.append((stage, done)))
    assert seen[0] == ("training", 7)  # step 7 was made, but its checkpoint was not
    wanted, got = load_file(tmp_path / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert not list(out.glob("*.pt")) and not list(out.glob("*.partial"))


def test_the_report(target: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    report = train_adapter(settings(target, text, out, self_generated=True, generated_windows=8))
    assert report["steps"] == 12 and report["tokens"] == 12 * 4 * 32
    assert 0 <= report["top1_agreement_self_generated"] <= 1
    assert json.loads((out / "training.json").read_text()) == report
    assert str(tmp_path) not in (out / "training.json").read_text()


def test_held_out_files(target: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("9876543210 god yzal eht " * 40)
    ours = train_adapter(settings(target, text, tmp_path / "a"))
    theirs = train_adapter(settings(target, text, tmp_path / "b", held_out=(other,)))
    assert ours["top1_agreement_text"] != theirs["top1_agreement_text"]


def test_reuse_asks_the_target_less_often(target: Path, text: Path, tmp_path: Path) -> None:
    asked = []
    teach = Teacher.__call__

    def note(self: Teacher, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(windows))
        return teach(self, windows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "__call__", note)
        train_adapter(settings(target, text, tmp_path / "a", reuse=4))
    assert asked.count(1) == 12


def test_half_of_what_is_learned_the_target_wrote(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "generate_windows", lambda *_: torch.full((3, 32), 66))
    own = []
    teach = Teacher.__call__

    def note(self: Teacher, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own.append(int((windows == 66).all(1).sum()))
        return teach(self, windows)

    monkeypatch.setattr(Teacher, "__call__", note)
    train_adapter(settings(target, text, tmp_path / "a", self_generated=True, batch_size=5))
    assert own[:12] == [2, 3] * 6


def test_minutes_count_whatever_the_steps(target: Path, text: Path, tmp_path: Path) -> None:
    assert train_adapter(settings(target, text, tmp_path / "a", minutes=0.005, steps=1))["steps"] > 1


@pytest.mark.parametrize("limits", [{}, {"minutes": 60.0}])
def test_a_deadline_ends_the_steps(limits: dict[str, float], target: Path, text: Path, tmp_path: Path) -> None:
    now = time.perf_counter()
    assert train_adapter(settings(target, text, tmp_path / "past", **limits), deadline=now)["steps"] == 1
    assert train_adapter(settings(target, text, tmp_path / "far"), deadline=now + 3600)["steps"] == 12


def test_one_step_is_always_made(target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # the time is over before the first
    assert train_adapter(settings(target, text, tmp_path / "a"), deadline=0.0)["steps"] == 1


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
    train_adapter(settings(target, text, tmp_path / "a", steps=10**9, learning_rate=0.1), deadline=4.0)
    assert rates == pytest.approx([0.001, 0.075, 0.05, 0.025])


def test_a_deadline_ends_the_targets_own_writing(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = Teacher.continue_text

    def note(self: Teacher, prompts: torch.Tensor, length: int, sample: bool) -> torch.Tensor:
        written.append(len(prompts))
        return write(self, prompts, length, sample)

    monkeypatch.setattr(Teacher, "continue_text", note)
    own = {"self_generated": True, "generated_windows": 7, "generated_at_once": 3}
    train_adapter(settings(target, text, tmp_path / "a", **own))
    assert written == [3, 3, 3, trainer.HELD_OUT_WINDOWS]
    written.clear()
    train_adapter(settings(target, text, tmp_path / "b", **own), deadline=time.perf_counter())
    assert written == [3, trainer.HELD_OUT_WINDOWS]


def test_the_target_teaches_in_the_dtype_it_decodes_in(
    target: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "resolve_dtype", lambda *_: torch.bfloat16)  # as on a GPU
    seen = []
    teach = Teacher.__call__

    def look(self: Teacher, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(self.head.dtype)
        return teach(self, windows)

    monkeypatch.setattr(Teacher, "__call__", look)
    own = {"self_generated": True, "generated_windows": 4, "generated_at_once": 4}
    report = train_adapter(settings(target, text, tmp_path / "a", **own))
    assert report["steps"] == 12 and set(seen) == {torch.bfloat16}


def test_files_are_read_in_order(target: Path, tmp_path: Path) -> None:
    files = []
    for index in range(data.FILES_AT_ONCE + 3):
        files.append(tmp_path / f"{index}.txt")
        files[-1].write_text(f"{index} fox ")
    tokenizer = load_tokenizer(target)
    wanted = [token for file in files for token in tokenizer(file.read_text())["input_ids"]]
    assert data.read_tokens(tuple(files), tokenizer).tolist() == wanted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"sequence_length": 65}, "the model's context holds 64"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"minutes": 0.0}, "minutes"),
        ({"reuse": 0}, "reuse is 0"),
        ({"generated_at_once": 0}, "generated_at_once is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
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
    with pytest.raises(KangarooError, match=r"the text to train on has .* tokens, and one window takes 32; give more"):
        train_adapter(settings(target, short, out))
    with pytest.raises(KangarooError, match=r"the text to train on has"):
        train_adapter(settings(Path("demo"), short, out))
    with pytest.raises(KangarooError, match=r"the held-out text has .*; give more text or a smaller sequence_length"):
        train_adapter(settings(target, text, out, held_out=(short,)))
    short.write_text("hello " * 40)
    with pytest.raises(KangarooError, match=r"the last 3 % of the data\) has .*; give more data, held-out files or a"):
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
    train_adapter(settings(target, text, out, steps=1))
    with pytest.raises(KangarooError, match="already holds an adapter"):
        train_adapter(settings(target, text, out, steps=1))
