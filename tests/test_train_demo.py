"""The trainer of pairs: a preset in one go on a CPU, what it learns from and what it keeps apart, and when it ends."""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import target_training
import train_demo
import train_pair
from calibrate import Calibration, calibrate
from demo_corpus import Document, cut_prompts, installed_documents, stdlib_documents
from presets import DEMO, LARGE, PRESETS, SMOKE, Preset
from target_training import TargetRecipe, TargetTraining, Windows, encode, evaluate, target_config
from transformers import LlamaForCausalLM

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.demo import DemoPair, bundled_pair
from kangaroo_kernels.model.training.settings import TrainingSettings

CPU = torch.device("cpu")
TINY = replace(SMOKE.target, num_hidden_layers=2, context=32, short_context=16, batch_tokens=96, pass_tokens=32)


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
    return replace(SMOKE, sources=lambda: documents, adapter=adapter, target_steps=8, probes=4)


def train(preset: Preset, out: Path, minutes: float, report: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    return train_pair.train_pair(train_pair.Run(preset, out, minutes, CPU, {"preset": "ours"}, report))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the smoke preset by its command, and what each of its stages was given to learn from."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    given: dict[str, Any] = {}

    def spy(name: str, place: int | str) -> None:
        original = getattr(train_pair, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            given[name] = arguments[place] if isinstance(place, int) else named[place]
            return original(*arguments, **named)

        patch.setattr(train_pair, name, noting)

    with pytest.MonkeyPatch.context() as patch:
        for name, place in {"train_tokenizer": 0, "encode": 1, "TrainingSettings": "data", "find_defaults": 1}.items():
            spy(name, place)
        # the steps end it, not the time, however slow the machine is
        command = ["--preset", "smoke", "--minutes", "60", "--device", "cpu", "--out", str(out)]
        result = CliRunner().invoke(train_demo.app, command)
    assert result.exit_code == 0, result.output
    assert f"python tools/gpu_report.py --pair {out}" in result.output
    return {"out": out, "given": given}


def test_the_pair_decodes_losslessly(smoke: dict[str, Any]) -> None:
    prompts, kangaroo = DemoPair(smoke["out"]).prompts(), load(smoke["out"])
    assert len(prompts) == SMOKE.prompts and kangaroo.drafter.exit_layer == SMOKE.adapter["exit_layer"]
    for prompt in prompts.values():
        for sampling in ({}, {"temperature": 0.8, "seed": 3}):
            settings: dict[str, Any] = {"max_new_tokens": 40, "draft_confidence_threshold": 0.05, **sampling}
            drafted = kangaroo.generate(prompt, **settings)
            assert drafted.tokens == kangaroo.generate(prompt, plain=True, **settings).tokens
            assert drafted.stats.drafted > 0


def test_the_record_is_complete(smoke: dict[str, Any]) -> None:
    out = smoke["out"]
    record, target, adapter = (read(out / part / "training.json") for part in ("", "target", "adapter"))
    assert record["command"] == "python tools/train_demo.py --preset smoke --minutes 60"
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert set(record["seconds"]) == {"sources", "tokenizer", "encoding", "target", "adapter", "calibration"}
    assert record["corpus"]["encoded_files"] == record["corpus"]["files"]
    assert {"bits_per_character", "top1_accuracy", "top1_agreement_text", "top1_agreement_self_generated"} == set(
        record["held_out"]
    )
    assert TargetRecipe(**target["recipe"]) == SMOKE.target
    curve = target["curve"]
    assert len(curve) == SMOKE.probes and curve[-1]["step"] == target["steps"] == SMOKE.target_steps
    assert curve[-1]["bits_per_character"] < curve[0]["bits_per_character"] - 0.3  # it learns
    assert adapter["steps"] == SMOKE.adapter["steps"]
    values = read(out / "adapter" / "config.json")
    assert values["num_speculative_tokens"] == record["defaults"]["num_speculative_tokens"]
    for name, weight in load_file(out / "adapter" / "model.safetensors").items():
        assert torch.equal(weight.half().to(weight.dtype), weight), name  # fp16 holds it, too
    for file in out.rglob("*.json"):
        assert str(out) not in file.read_text()


def test_nothing_learns_from_held_out_files(smoke: dict[str, Any]) -> None:
    given, documents = smoke["given"], SMOKE.sources()
    held_out = {document.file: document.text for document in documents if document.held_out}
    assert len(held_out) >= 2
    assert given["train_tokenizer"] and not any(document.held_out for document in given["train_tokenizer"])
    assert given["encode"] == [document for document in documents if not document.held_out]
    assert given["TrainingSettings"] and not held_out.keys() & set(given["TrainingSettings"])
    assert given["find_defaults"]
    for prompt in given["find_defaults"]:
        assert not any(prompt in text for text in held_out.values())
    for prompt in DemoPair(smoke["out"]).prompts().values():
        assert any(prompt in text for text in held_out.values())


def test_without_time_every_stage_does_its_least(few: Preset, tmp_path: Path) -> None:
    adapter = {name: value for name, value in few.adapter.items() if name != "steps"}
    record = train(replace(few, target_steps=math.inf, adapter=adapter), tmp_path, 1e-4)
    assert [read(tmp_path / part / "training.json")["steps"] for part in ("target", "adapter")] == [1, 1]
    assert record["defaults"] is None
    kangaroo = load(tmp_path)
    settings: dict[str, Any] = {"max_new_tokens": 8}
    assert kangaroo.generate([1, 2], **settings).tokens == kangaroo.generate([1, 2], plain=True, **settings).tokens


def test_a_stopped_run_goes_on(few: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = replace(few, within_minutes=False)
    made: list[str] = []
    update, learn = TargetTraining.update, train_pair.train_adapter
    monkeypatch.setattr(TargetTraining, "update", lambda *given: made.append("update") or update(*given))
    monkeypatch.setattr(train_pair, "train_adapter", lambda *given: made.append("adapter") or learn(*given))

    def stop_at(stage: str, note: str) -> Callable[..., None]:
        def report(now: str, _done: int, _total: int, about: str) -> None:
            if (now, note) == (stage, about[: len(note)]):
                raise KeyboardInterrupt

        return report

    with pytest.raises(KeyboardInterrupt):
        train(preset, tmp_path, 60, stop_at("target", "step 5"))  # the second checkpoint was at 4
    with pytest.raises(KangarooError, match="other settings"):
        train_pair.train_pair(train_pair.Run(preset, tmp_path, 60, CPU, {"preset": "theirs"}, lambda *_: None))
    with pytest.raises(KeyboardInterrupt):
        train(preset, tmp_path, 60, stop_at("training", "step 5"))
    assert made == ["update"] * (5 + 4) + ["adapter"]
    curve = read(tmp_path / "target" / "training.json")["curve"]
    assert [point["step"] for point in curve] == [2, 4, 6, 8]
    record = train(preset, tmp_path, 60)
    assert made[10:] == ["adapter"] and record["seconds"]["target"] > 0
    assert not list(tmp_path.rglob("*.pt")) and not (tmp_path / train_pair.RUN_FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nonsense"], ["--preset is nonsense", "demo, large, smoke"]),
        (["--preset", "smoke", "--minutes", "0"], ["--minutes is 0", "above 0"]),
        (["--preset", "demo", "--minutes", "-1"], ["--minutes is -1", "above 0"]),
        (["--preset", "large", "--minutes", "1"], ["needs a finite number of at least 3"]),
        (["--preset", "smoke", "--device", "abacus"], ["'abacus' is unknown"]),
        (["--preset", "large"], ["needs a CUDA GPU"]),
        (["--preset", "smoke", "--out", "FULL"], ["not empty", "--out"]),
        (["--preset", "smoke", "--out", "FULL/file"], ["is a file"]),
        (["--minutes", "2"], ["Missing option '--preset'"]),
    ],
)
def test_refusals(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_pair, "cut_prompts", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(train_demo.app, [part.replace("FULL", str(tmp_path)) for part in arguments])
    assert result.exit_code == 2
    for word in words:
        assert word in " ".join(result.stderr.replace("│", " ").split())
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


# ---- the presets


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_sound(preset: Preset) -> None:
    recipe = preset.target
    assert recipe.batch_tokens % recipe.context == recipe.batch_tokens % recipe.short_context == 0
    settings = TrainingSettings(model="", data=(Path(),), out=Path(), **preset.adapter)
    assert 0 < settings.exit_layer < recipe.num_hidden_layers
    assert settings.sequence_length <= recipe.short_context
    assert 0 <= preset.encoded_by < preset.target_by < preset.adapter_by <= preset.calibrated_by <= 1


def test_the_bundled_pair_was_made_so() -> None:
    pair = bundled_pair()
    target, adapter = (read(folder / "training.json") for folder in (pair.target, pair.adapter))
    assert DEMO.target == TargetRecipe(**target["recipe"])
    assert (DEMO.target_by - DEMO.encoded_by) * DEMO.minutes == pytest.approx(target["minutes"])
    assert (DEMO.adapter_by - DEMO.target_by) * DEMO.minutes == pytest.approx(adapter["settings"]["minutes"])
    assert DEMO.adapter.items() <= adapter["settings"].items()
    held_out = [Document(name, f"before\n{prompt}\nafter") for name, prompt in pair.prompts().items()]
    assert all(document.held_out for document in held_out)
    assert train_pair.held_out_prompts(DEMO, held_out) == pair.prompts()
    with pytest.raises(KangarooError, match=f"no prompt from {held_out[0].path}"):
        train_pair.held_out_prompts(DEMO, held_out[1:])


def test_large_is_as_large_as_it_says(smoke: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(target_config(LARGE.target, load(smoke["out"]).tokenizer))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 268
    recipe = LARGE.target
    assert recipe.short_context == recipe.context and recipe.batch_tokens % recipe.pass_tokens == 0  # one shape


# ---- the corpus


def code(seed: str, lines: int = 30) -> str:
    return "def begin():\n" + "".join(
        f"    value_{seed}_of_line_{'abcdefghij'[n % 10]} = {seed}_{'x' * n}\n" for n in range(lines)
    )


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library in the place of this machine's, with an empty folder of packages in it."""
    folder = tmp_path / "lib"
    (folder / "site-packages").mkdir(parents=True)
    places = {"stdlib": folder, "purelib": folder / "site-packages", "platlib": folder / "site-packages"}
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(places[name]))
    monkeypatch.setattr(sys, "path", [])
    return folder


def test_what_is_read(library: Path) -> None:
    latin = "# coding: latin-1\n# \xe9\n" + code("latin")
    contents = {
        "a.py": code("same").encode(),
        "b.py": code("same").encode(),
        "json/c.py": code("other").encode(),
        "encodings/table.py": code("table").encode(),
        "site-packages/torch/d.py": code("package").encode(),
        "latin.py": latin.encode("latin-1"),
        "broken.py": b"\xff" * 400,
        "numbers.py": b"table = [" + b"0x12, " * 200 + b"]",
    }
    for name, content in contents.items():
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_bytes(content)
    (library / "link.py").symlink_to(library / "nowhere")
    found = {document.path: document for document in stdlib_documents()}
    assert {name for name in found if name.endswith(".py")} == {"a.py", "b.py", "json/c.py", "latin.py"}
    assert found["latin.py"].text == latin and found["latin.py"].file is None
    assert found["a.py"].file == library / "a.py" and found["pydoc_data/topics/while"].file is None
    assert [document.path for document in installed_documents(("json",))] == ["json/c.py"]
    installed = installed_documents()
    assert sorted(document.text for document in installed) == sorted(map(code, ("same", "other", "package")))
    assert {"json/c.py", "site-packages/torch/d.py"} < {document.path for document in installed}
    assert all(document.text == document.file.read_text() for document in installed)


def test_near_copies_are_not_held_out(library: Path) -> None:
    names = [f"module_{index}.py" for index in range(1000)]
    copy, own, *_ = [name for name in names if Document(name, "").held_out]
    original = next(name for name in names if not Document(name, "").held_out)
    (library / original).write_text(code("shared"))
    (library / copy).write_text(code("shared") + code("fresh", 10))
    (library / own).write_text(code("fresh") + code("shared", 10))
    assert {document.path for document in installed_documents()} == {original, own}


def test_the_limit_takes_a_fair_sample(library: Path) -> None:
    for index in range(40):
        (library / f"m{index:02}.py").write_text(code(f"word{'z' * index}"))
    everything = installed_documents()
    names = [document.path for document in everything]
    assert len(names) > 30 and names != sorted(names)
    some = installed_documents(max_characters=sum(len(document.text) for document in everything[:5]))
    assert some == everything[:5]


def test_prompts() -> None:
    body = "".join(f"    line_{'abcdefghij'[n % 10]} = compute(value)\n" for n in range(40))
    texts = {
        "long.py": "import os\n\n\nclass First:\n" + body + "\n\n\n\ndef second():\n" + body,
        "short.py": "def only():\n    pass\n",
        "plain.py": "import os\n" * 100,
        "ending.py": ("def all_of_it():\n" + body)[:250] + "\n",
        "other.py": "async def third():\n" + body,
        "never.py": "def fourth():\n" + body,
    }
    prompts = cut_prompts([Document(name, text) for name, text in texts.items()], 2, 200)
    assert list(prompts) == ["long.py", "other.py"]
    for (name, prompt), beginning in zip(prompts.items(), ("class First:", "async def third():"), strict=True):
        assert prompt.startswith(beginning) and 200 <= len(prompt) <= 260 and not prompt.endswith("\n")
        _, _, rest = texts[name].partition(prompt)
        assert rest.startswith("\n") and len(rest) > 100


# ---- the target's training


@pytest.fixture(scope="module")
def tokenizer(smoke: dict[str, Any]) -> Any:
    return load(smoke["out"]).tokenizer


def training(tokenizer: Any, recipe: TargetRecipe = TINY) -> TargetTraining:
    torch.manual_seed(0)
    tokens = torch.randint(1, 40, (4000,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    return TargetTraining(recipe, tokenizer, Windows(tokens, 0), CPU)


def test_the_runtime_runs_what_was_trained(tokenizer: Any, tmp_path: Path) -> None:
    trained = training(tokenizer)
    for _ in range(3):  # the layers begin as the identity
        trained.update(0.3)
    trained.save(tmp_path)
    tokens = torch.randint(1, 512, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = trained.model(tokens[None]).logits[0]
    logits = Kangaroo.from_pretrained(tmp_path, device="cpu").logits(tokens.tolist())
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.01


def test_an_update_is_of_the_whole_batch_and_windows_grow(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (training(tokenizer, replace(TINY, pass_tokens=count)) for count in (96, 64))
    passes: list[tuple[int, ...]] = []
    add = parts.add_gradients
    monkeypatch.setattr(parts, "add_gradients", lambda *given: passes.append(given[0].shape) or add(*given))
    for share in (0.3, 0.79, 0.81):
        torch.testing.assert_close(parts.update(share), whole.update(share), atol=3e-2, rtol=0)
    assert passes == [(4, 17), (2, 17)] * 2 + [(2, 33), (1, 33)]
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_every_window_comes_once_an_epoch() -> None:
    windows = Windows(torch.arange(1000, dtype=torch.int32), 0)
    starts = torch.cat([windows.batch(3, 10)[:, 0] for _ in range(33)]).tolist()
    assert len(set(starts)) == 99 and len({start % 10 for start in starts}) == 1
    batch = windows.batch(3, 10)
    assert batch.dtype == torch.int64 and torch.equal(batch - batch[:, :1], torch.arange(11).expand(3, 11))
    with pytest.raises(KangarooError, match="1000 tokens, too few for a batch of 200 windows of 10"):
        windows.batch(200, 10)


def test_encoding_ends_in_time(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"{index}.py", f"value = {index}\n") for index in range(7)]
    monkeypatch.setattr(target_training, "ENCODED_AT_ONCE", 2)
    reports: list[Any] = []
    whole = encode(tokenizer, documents, report=lambda *counts: reports.append(counts[1:3]))
    assert whole.dtype == torch.int32 and reports == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert tokenizer.decode(whole.tolist(), skip_special_tokens=True) == "".join(d.text for d in documents)
    assert int((whole == tokenizer.bos_token_id).sum()) == 7
    cut = encode(tokenizer, documents, deadline=time.perf_counter() - 1)
    assert int((cut == tokenizer.bos_token_id).sum()) == 2


def test_evaluation(tokenizer: Any) -> None:
    trained = training(tokenizer)
    trained.update(0.3)
    tokens = trained.windows.tokens[:150]  # four windows of 32 and a rest
    with torch.no_grad():
        rows = [trained.model(tokens[None, start : min(start + 32, 149)]).logits[0] for start in range(0, 149, 32)]
    logits, wanted = torch.cat(rows), tokens[1:].long()
    bits = F.cross_entropy(logits, wanted, reduction="sum").item() / math.log(2)
    characters = len(tokenizer.decode(tokens.tolist()))
    for pass_tokens in (0, 64):
        assert evaluate(trained.model, tokenizer, tokens, 32, pass_tokens) == {
            "bits_per_character": pytest.approx(bits / characters, rel=1e-5),
            "top1_accuracy": pytest.approx((logits.argmax(-1) == wanted).float().mean().item()),
        }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
@pytest.mark.parametrize("works", [True, False])
def test_layers_compile_once_or_run_as_they_are(works: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(1)
        if not works:
            raise RuntimeError("no compiler found")
        return lambda *inputs: calls.append(1) or graph.forward(*inputs)

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_with(function, backend=backend, **given))
    torch._dynamo.reset()
    trained = training(tokenizer)
    with nullcontext() if works else pytest.warns(UserWarning, match="do not compile here and run uncompiled"):
        trained.compile_layers()
    assert len(graphs) == 1 and all(parameter.grad is None for parameter in trained.model.parameters())
    calls.clear()
    evaluate(trained.model, tokenizer, trained.windows.tokens[:100], 32)
    assert not calls
    assert float(trained.update(0.3)) > 0
    assert len(calls) == 3 * TINY.num_hidden_layers * works and len(graphs) == 1
    torch._dynamo.reset()


# ---- the defaults


def test_calibration_ends_in_time_and_measures_the_best_again(smoke: dict[str, Any]) -> None:
    kangaroo, plan = load(smoke["out"]), Calibration(lengths=(2, 3), thresholds=(0.5, 0.1), new_tokens=8, finalists=2)
    reports: list[Any] = []
    rows = calibrate(kangaroo, ["class Stack:"], plan, report=lambda stage, *_: reports.append(stage))
    assert reports == ["calibrating"] * 4 + ["the best again"] * 2
    settings = [(row["num_speculative_tokens"], row["draft_confidence_threshold"]) for row in rows]
    assert sorted(settings) == [(2, 0.1), (2, 0.5), (3, 0.1), (3, 0.5)]
    for part in (rows[:2], rows[2:]):
        assert part[0]["mean_speedup"] >= part[1]["mean_speedup"]
    assert not calibrate(kangaroo, ["class Stack:"], plan, deadline=time.perf_counter() - 1)
