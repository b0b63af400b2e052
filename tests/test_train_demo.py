"""The trainer of pairs: a preset in one go on a CPU, what it learns from and what it keeps apart, and when it ends."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import train_demo
from demo_corpus import Document
from presets import DEMO, LARGE, PRESETS, SMOKE, Preset
from safetensors.torch import load_file, save_file
from target_training import TargetRecipe, TargetTraining, target_config
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.demo import DemoPair, bundled_pair
from kangaroo_kernels.model.training.settings import TrainingSettings

CPU = torch.device("cpu")


def load(pair: Path) -> Kangaroo:
    """On the CPU, wherever the tests run."""
    return Kangaroo.from_pretrained(pair / "target", pair / "adapter", device="cpu")


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def few() -> Preset:
    """The smoke preset in fewer steps, on sources that were read once."""
    everything = SMOKE.sources()
    documents = [document for index, document in enumerate(everything) if document.held_out or index < 20]
    adapter = {**SMOKE.adapter, "steps": 8, "sequence_length": 16}
    return replace(SMOKE, sources=lambda: documents, adapter=adapter, target_steps=8)


def train(preset: Preset, out: Path, minutes: float, report: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    return train_demo.train_pair(train_demo.Run(preset, out, minutes, CPU, {"preset": "ours"}, report))


GIVEN = {"train_tokenizer": 0, "encode": 1, "WritingSettings": "prompts", "TrainingSettings": "data", "calibrate": 1}
"""What learns, and where it is told what from."""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the smoke preset by its command, and what each of its stages was given to learn from."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    # the steps end it, not the time, however slow the machine is
    command = ["--preset", "smoke", "--minutes", "60", "--device", "cpu", "--out", str(out)]
    spies = {name: Mock(wraps=getattr(train_demo, name)) for name in GIVEN}
    with patch.multiple(train_demo, **spies):
        result = CliRunner().invoke(train_demo.app, command)
    assert result.exit_code == 0, result.output
    assert f"python tools/gpu_report.py --pair {out}" in result.output
    last = {name: dict(enumerate(spy.call_args.args)) | spy.call_args.kwargs for name, spy in spies.items()}
    return {"out": out, "given": {name: last[name][place] for name, place in GIVEN.items()}}


def test_the_record_is_complete(smoke: dict[str, Any]) -> None:
    out = smoke["out"]
    assert len(DemoPair(out).prompts()) == SMOKE.prompts
    assert load(out).drafter.first_layer == SMOKE.adapter["exit_layer"]
    record, target, adapter = (read(out / part / "training.json") for part in ("", "target", "adapter"))
    assert record["command"] == "python tools/train_demo.py --preset smoke --minutes 60"
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert {"bits_per_character", "top1_accuracy", *train_demo.SCORES} == set(record["held_out"])
    assert TargetRecipe(**target["recipe"]) == SMOKE.target
    first, *_, last = curve = target["curve"]
    assert len(curve) == train_demo.PROBES and last["step"] == target["steps"] == SMOKE.target_steps
    assert last["bits_per_character"] < first["bits_per_character"] - 0.3  # it learns
    assert adapter["steps"] == SMOKE.adapter["steps"]
    values, (defaults, *_) = read(out / "adapter" / "config.json"), read(out / "adapter" / "calibration.json")
    assert values["num_speculative_tokens"] == defaults["num_speculative_tokens"]
    assert not any(str(out) in file.read_text() for file in out.rglob("*.json"))


def test_nothing_learns_from_held_out_files(smoke: dict[str, Any]) -> None:
    given, documents = smoke["given"], SMOKE.sources()
    held_out = {document.file: document.text for document in documents if document.held_out}
    assert len(held_out) >= 2
    assert given["train_tokenizer"] and not any(document.held_out for document in given["train_tokenizer"])
    assert given["encode"] == [document for document in documents if not document.held_out]
    own, *texts = given["TrainingSettings"]
    assert own.name == train_demo.OWN_TEXTS and texts and not held_out.keys() & set(texts)
    assert given["WritingSettings"] and not held_out.keys() & set(given["WritingSettings"])
    assert given["calibrate"]
    for prompt in given["calibrate"]:
        assert not any(prompt in text for text in held_out.values())
    for prompt in DemoPair(smoke["out"]).prompts().values():
        assert any(prompt in text for text in held_out.values())


def test_without_time_every_stage_does_its_least(few: Preset, tmp_path: Path) -> None:
    adapter = {name: value for name, value in few.adapter.items() if name != "steps"}
    train(replace(few, target_steps=math.inf, adapter=adapter), tmp_path, 1e-4)
    assert [read(tmp_path / part / "training.json")["steps"] for part in ("target", "adapter")] == [1, 1]
    assert not (tmp_path / "adapter" / "calibration.json").exists()
    kangaroo = load(tmp_path)
    settings: dict[str, Any] = {"max_new_tokens": 8}
    assert kangaroo.generate([1, 2], **settings).tokens == kangaroo.generate([1, 2], plain=True, **settings).tokens


def test_a_stopped_run_goes_on(few: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    update, learn = TargetTraining.update, train_demo.train_adapter
    monkeypatch.setattr(TargetTraining, "update", lambda *given: made.append("update") or update(*given))
    file = tmp_path / "adapter" / "model.safetensors"

    def learn_small_weights(*given: Any) -> None:
        made.append("adapter")
        learn(*given)
        save_file({name: weight * 1e-5 for name, weight in load_file(file).items()}, file)

    def stop(stage: str, *_: Any) -> None:
        if stage == "training":
            raise KeyboardInterrupt

    monkeypatch.setattr(train_demo, "train_adapter", learn_small_weights)
    with pytest.raises(KeyboardInterrupt):
        train(few, tmp_path, 60, stop)
    with pytest.raises(KangarooError, match="other settings"):
        train_demo.train_pair(train_demo.Run(few, tmp_path, 60, CPU, {"preset": "theirs"}, lambda *_: None))
    train(few, tmp_path, 60)
    assert made == ["update"] * 8 + ["adapter"] * 2
    for name, weight in load_file(file).items():
        assert torch.equal(weight.half().to(weight.dtype), weight), name  # fp16 holds what bf16 does
    assert not (tmp_path / train_demo.RUN_FILE).exists()


# ---- the presets


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_sound(preset: Preset) -> None:
    recipe = preset.target
    assert recipe.batch_tokens % recipe.context == recipe.batch_tokens % recipe.short_context == 0
    settings = TrainingSettings(model="", data=(Path(),), out=Path(), **preset.adapter)
    assert 0 < settings.exit_layer < recipe.num_hidden_layers
    assert settings.sequence_length <= recipe.short_context
    assert train_demo.ENCODED_BY < preset.target_by < preset.adapter_by < train_demo.CALIBRATED_BY


def test_the_bundled_pair_was_made_so() -> None:
    pair = bundled_pair()
    target, adapter = (read(folder / "training.json") for folder in (pair.target, pair.adapter))
    assert DEMO.target == TargetRecipe(**target["recipe"])
    assert DEMO.target_by * DEMO.minutes == pytest.approx(target["minutes"])
    assert (DEMO.adapter_by - DEMO.target_by) * DEMO.minutes == pytest.approx(adapter["settings"]["minutes"])
    assert DEMO.adapter.items() <= adapter["settings"].items()
    assert DEMO.own_texts == adapter["settings"]["generated_windows"]
    assert DEMO.prompts == len(pair.prompts())
    assert all(Document(name, "").held_out for name in pair.prompts())


def test_large_is_as_large_as_it_says() -> None:
    recipe = LARGE.target
    with torch.device("meta"):
        model = LlamaForCausalLM(target_config(recipe, SimpleNamespace(bos_token_id=0, eos_token_id=0)))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 268
