"""The trainer of pairs: a preset in one go on a CPU, what it learns from and what it keeps apart, and when it ends."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import calibrate
import demo_corpus
import target_training
import train_demo
import train_pair
from demo_corpus import Document, cut_prompts, installed_documents
from presets import LARGE, PRESETS, SMOKE
from target_training import TargetRecipe, TargetTraining, TrainableTarget, Windows, encode, evaluate, target_values

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.demo import DemoPair

CPU = torch.device("cpu")
TINY = replace(SMOKE.target, num_hidden_layers=2, context=32, short_context=16, batch_tokens=96, pass_tokens=32)


def silent(*_: object) -> None:
    """For whoever is to report to nobody."""


def load(pair: Path) -> Kangaroo:
    """On the CPU, wherever the tests run."""
    return Kangaroo.from_pretrained(pair / "target", pair / "adapter", device="cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of the smoke preset by its command, and what each of its stages was given to learn from."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    given: dict[str, list[Any]] = {"tokenizer": [], "windows": [], "adapter": [], "practice": []}
    encoded: dict[int, list[Document]] = {}

    def spy(name: str, note: Any) -> None:
        original = getattr(train_pair, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            note(arguments, result)
            return result

        patch.setattr(train_pair, name, noting)

    with pytest.MonkeyPatch.context() as patch:
        spy("train_tokenizer", lambda arguments, _: given["tokenizer"].extend(arguments[0]))
        spy("encode", lambda arguments, tokens: encoded.update({id(tokens): arguments[1]}))
        spy("Windows", lambda arguments, _: given["windows"].extend(encoded[id(arguments[0])]))
        spy("train_adapter", lambda arguments, _: given["adapter"].extend(arguments[0].data))
        spy("find_defaults", lambda arguments, _: given["practice"].extend(arguments[2]))
        # the steps end it, not the time, however slow the machine is
        command = ["--preset", "smoke", "--minutes", "60", "--device", "cpu", "--out", str(out)]
        result = CliRunner().invoke(train_demo.app, command)
    assert result.exit_code == 0, result.output
    return {
        "out": out,
        "given": given,
        "output": result.output,
        "record": json.loads((out / "training.json").read_text()),
    }


def test_the_pair_decodes_losslessly(smoke: dict[str, Any]) -> None:
    prompts, kangaroo = DemoPair(smoke["out"]).prompts(), load(smoke["out"])
    assert len(prompts) == SMOKE.prompts
    assert kangaroo.drafter is not None and kangaroo.drafter.exit_layer == SMOKE.adapter.exit_layer
    for prompt in prompts.values():
        for sampling in ({}, {"temperature": 0.8, "seed": 3}):
            settings: dict[str, Any] = {"max_new_tokens": 40, "draft_confidence_threshold": 0.05, **sampling}
            drafted = kangaroo.generate(prompt, **settings)
            assert drafted.tokens == kangaroo.generate(prompt, plain=True, **settings).tokens
            assert drafted.stats.drafted > 0


def test_the_command_says_what_comes_next(smoke: dict[str, Any]) -> None:
    assert f"python tools/gpu_report.py --pair {smoke['out']}" in smoke["output"]


def test_the_record_is_complete(smoke: dict[str, Any]) -> None:
    record, out = smoke["record"], smoke["out"]
    assert record["command"] == "python tools/train_demo.py --preset smoke --minutes 60"
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert set(record["seconds"]) == {"sources", "tokenizer", "encoding", "target", "adapter", "calibration"}
    assert record["corpus"]["encoded_files"] == record["corpus"]["files"] == len(smoke["given"]["windows"])
    assert {"bits_per_character", "top1_accuracy", "top1_agreement_text", "top1_agreement_self_generated"} == set(
        record["held_out"]
    )
    target = json.loads((out / "target" / "training.json").read_text())
    adapter = json.loads((out / "adapter" / "training.json").read_text())
    assert TargetRecipe(**target["recipe"]) == SMOKE.target
    curve = target["curve"]
    assert len(curve) == train_pair.PROBES and curve[-1]["step"] == target["steps"] == SMOKE.target_steps
    assert curve[-1]["bits_per_character"] < curve[0]["bits_per_character"] - 0.3  # it learns
    assert adapter["steps"] == SMOKE.adapter.steps
    values = json.loads((out / "adapter" / "config.json").read_text())
    assert values["num_speculative_tokens"] == record["defaults"]["num_speculative_tokens"]
    for file in out.rglob("*.json"):
        assert str(out) not in file.read_text()


def test_nothing_learns_from_held_out_files(smoke: dict[str, Any]) -> None:
    given = smoke["given"]
    documents = installed_documents(SMOKE.packages)
    held_out = {document.file: document.text for document in documents if document.held_out}
    assert len(held_out) >= 2
    assert given["tokenizer"] and not any(document.held_out for document in given["tokenizer"])
    assert len(given["windows"]) == len(documents) - len(held_out)
    assert not any(document.held_out for document in given["windows"])
    assert given["adapter"] and not held_out.keys() & set(given["adapter"])
    for prompt in given["practice"]:
        assert not any(prompt in text for text in held_out.values())
    for prompt in DemoPair(smoke["out"]).prompts().values():
        assert any(prompt in text for text in held_out.values())


def test_without_time_every_stage_does_its_least(tmp_path: Path) -> None:
    untimed = replace(SMOKE, target_steps=None, adapter=replace(SMOKE.adapter, steps=None))
    record = train_pair.train_pair(untimed, tmp_path, 1e-4, CPU, {}, silent)
    assert json.loads((tmp_path / "target" / "training.json").read_text())["steps"] == 1
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["steps"] == 1
    assert record["defaults"] is None
    kangaroo = load(tmp_path)
    settings: dict[str, Any] = {"max_new_tokens": 8}
    assert kangaroo.generate([1, 2], **settings).tokens == kangaroo.generate([1, 2], plain=True, **settings).tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "nonsense"], ["'nonsense' is not one of", "'large'", "'smoke'"]),
        (["--preset", "smoke", "--minutes", "0"], ["--minutes is 0", "above 0"]),
        (["--preset", "smoke", "--minutes", "nan"], ["--minutes is nan", "above 0"]),
        (["--preset", "large", "--minutes", "1"], ["needs at least 3"]),
        (["--preset", "smoke", "--device", "abacus"], ["'abacus' is unknown"]),
        (["--preset", "smoke", "--out", "FULL"], ["not empty", "--out"]),
        (["--preset", "smoke", "--out", "FULL/file"], ["is a file"]),
        (["--minutes", "2"], ["--minutes", "add --preset large or --preset smoke"]),
        (["--preset", "smoke", "target"], ["--preset stands before 'target'"]),
    ],
)
def test_refusals(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(train_demo.app, [part.replace("FULL", str(tmp_path)) for part in arguments])
    assert result.exit_code == 2
    for word in words:
        assert word in " ".join(result.stderr.replace("│", " ").split())
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_large_wants_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    started: list[Any] = []

    def start(*arguments: Any) -> None:
        started.append(arguments)
        raise KangarooError("enough.")

    monkeypatch.setattr(train_demo, "train_pair", start)
    command = ["--preset", "large", "--out", str(tmp_path / "pair")]
    result = CliRunner().invoke(train_demo.app, command)
    assert result.exit_code == 2 and "needs a CUDA GPU" in result.stderr and not started
    assert "enough." in CliRunner().invoke(train_demo.app, [*command, "--device", "cpu"]).stderr
    assert started[0][:4] == (LARGE, tmp_path / "pair", 8.0, CPU)


def test_no_options_give_help() -> None:
    result = CliRunner().invoke(train_demo.app, [])
    assert result.exit_code == 0 and "calibrate" in result.output and "--preset" in result.output


# ---- the presets


def test_presets_are_sound() -> None:
    assert [name.value for name in train_demo.PresetName] == list(PRESETS)
    for preset in PRESETS.values():
        recipe = preset.target
        assert recipe.batch_tokens % recipe.context == recipe.batch_tokens % recipe.short_context == 0
        assert 0 < preset.adapter.exit_layer < recipe.num_hidden_layers
        assert preset.adapter.sequence_length <= recipe.short_context
        assert 0 < preset.encoded_by < preset.target_by < preset.adapter_by < preset.calibrated_by < 1


def test_large_is_as_large_as_it_says(smoke: dict[str, Any]) -> None:
    tokenizer = load(smoke["out"]).tokenizer
    with torch.device("meta"):
        model = TrainableTarget(LARGE.target, target_values(LARGE.target, tokenizer))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == 268
    recipe = LARGE.target
    assert recipe.short_context == recipe.context and recipe.batch_tokens % recipe.pass_tokens == 0  # one shape


# ---- the corpus


def code(seed: str, lines: int = 30) -> str:
    return "def begin():\n" + "".join(
        f"    value_{seed}_of_line_{'abcdefghij'[n % 10]} = {seed}_{'x' * n}\n" for n in range(lines)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``installed_documents`` looks instead of at this machine's packages."""

    def files(_: tuple[str, ...]) -> dict[str, Path]:
        return {file.name: file for file in tmp_path.glob("*.py")}

    monkeypatch.setattr(demo_corpus, "_installed_files", files)
    return tmp_path


def name_where(held_out: bool, number: int) -> str:
    """The ``number``-th name that the hash holds out, or does not."""
    names = (f"module_{index}.py" for index in range(10_000))
    return [name for name in names if Document(name, "").held_out == held_out][number]


def test_no_text_comes_twice_and_none_that_cannot_be_read(folder: Path) -> None:
    for name in ("a.py", "b.py"):
        (folder / name).write_text(code("same"))
    (folder / "c.py").write_text(code("other"))
    (folder / "d.py").write_bytes(b"\xff" * 400)
    (folder / "e.py").symlink_to(folder / "nowhere")
    (folder / "f.py").write_text("table = [" + "0x12, " * 200 + "]")
    documents = installed_documents()
    assert sorted(document.text for document in documents) == sorted((code("same"), code("other")))
    assert [document.text for document in documents] == [document.file.read_text() for document in documents]


def test_near_copies_are_not_held_out(folder: Path) -> None:
    original, copy, own = name_where(False, 0), name_where(True, 0), name_where(True, 1)
    (folder / original).write_text(code("shared"))
    (folder / copy).write_text(code("shared") + code("fresh", 10))
    (folder / own).write_text(code("fresh") + code("shared", 10))
    assert {document.path for document in installed_documents()} == {original, own}


def test_the_limit_takes_a_fair_sample(folder: Path) -> None:
    for index in range(40):
        (folder / f"m{index:02}.py").write_text(code(f"word{'z' * index}"))
    everything = [document.path for document in installed_documents()]
    assert len(everything) > 30 and everything != sorted(everything)
    few = installed_documents(max_characters=sum(len(document.text) for document in installed_documents()[:5]))
    assert [document.path for document in few] == everything[:5]


def test_installed_files_are_of_the_library_and_of_packages() -> None:
    everything = demo_corpus._installed_files(())
    assert everything["json/decoder.py"].is_file() and everything["site-packages/torch/nn/functional.py"].is_file()
    assert not any(name.startswith("pydoc_data/") for name in everything)
    some = demo_corpus._installed_files(("json",))
    assert "json/decoder.py" in some and all(name.startswith("json/") for name in some)
    assert all(everything[name] == file for name, file in some.items())


def test_prompts() -> None:
    body = "".join(f"    line_{'abcdefghij'[n % 10]} = compute(value)\n" for n in range(40))
    documents = [
        Document("long.py", "import os\n\n\nclass First:\n" + body + "\n\n\n\ndef second():\n" + body),
        Document("short.py", "def only():\n    pass\n"),
        Document("plain.py", "import os\n" * 100),
        Document("ending.py", ("def all_of_it():\n" + body)[:250] + "\n"),
        Document("other.py", "async def third():\n" + body),
        Document("never.py", "def fourth():\n" + body),
    ]
    prompts = cut_prompts(documents, 2, 200)
    assert list(prompts) == ["long.py", "other.py"]
    for name, beginning in (("long.py", "class First:"), ("other.py", "async def third():")):
        prompt, text = prompts[name], next(document.text for document in documents if document.path == name)
        assert prompt.startswith(beginning) and 200 <= len(prompt) <= 260 and not prompt.endswith("\n")
        assert text[text.index(prompt) + len(prompt)] == "\n" and len(text) - len(prompt) > 100


# ---- the target's training


@pytest.fixture(scope="module")
def tokenizer(smoke: dict[str, Any]) -> Any:
    return load(smoke["out"]).tokenizer


def training(tokenizer: Any, recipe: TargetRecipe = TINY, **changes: Any) -> TargetTraining:
    torch.manual_seed(0)
    tokens = torch.randint(1, 40, (4000,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    return TargetTraining(replace(recipe, **changes), tokenizer, Windows(tokens, 0), CPU)


def test_the_runtime_runs_what_was_trained(tokenizer: Any, tmp_path: Path) -> None:
    trained = training(tokenizer)
    for _ in range(3):  # the layers begin as the identity
        trained.update(0.3)
    trained.save(tmp_path)
    tokens = torch.randint(1, 512, (20,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = trained.model(tokens[None])[0]
    logits = Kangaroo.from_pretrained(tmp_path, device="cpu").logits(tokens.tolist())
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert wanted.std() > 0.01


def test_an_update_is_of_the_whole_batch(tokenizer: Any) -> None:
    whole, parts = training(tokenizer, pass_tokens=96), training(tokenizer, pass_tokens=64)
    passes: list[int] = []
    add = parts.add_gradients

    def counted(batch: torch.Tensor, weight: float) -> torch.Tensor:
        passes.append(len(batch))
        return add(batch, weight)

    parts.add_gradients = counted  # type: ignore[method-assign]
    for _ in range(2):
        wanted, got = whole.update(0.3), parts.update(0.3)
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=0)
    assert passes == [4, 2, 4, 2]
    assert all(parameter.grad is None for parameter in parts.model.parameters())


def test_windows_grow_when_their_share_is_over(tokenizer: Any) -> None:
    trained = training(tokenizer)
    lengths: list[int] = []
    add = trained.add_gradients
    trained.add_gradients = lambda batch, weight: lengths.append(batch.shape[1] - 1) or add(batch, weight)  # type: ignore
    trained.update(0.79)
    trained.update(0.81)
    assert lengths == [16] * 3 + [32] * 3


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
    reports: list[tuple[int, int]] = []
    whole = encode(tokenizer, documents, report=lambda *counts: reports.append(counts))
    assert whole.dtype == torch.int32 and reports == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert tokenizer.decode(whole.tolist(), skip_special_tokens=True) == "".join(d.text for d in documents)
    assert int((whole == tokenizer.bos_token_id).sum()) == 7
    cut = encode(tokenizer, documents, deadline=time.perf_counter() - 1)
    assert int((cut == tokenizer.bos_token_id).sum()) == 2


def test_evaluation(tokenizer: Any) -> None:
    trained = training(tokenizer)
    trained.update(0.3)
    tokens = trained.windows.tokens[:150]  # four windows of 32 and a rest
    scores = evaluate(trained.model, tokens, 300, 32)
    with torch.no_grad():
        rows = [trained.model(tokens[None, start : min(start + 32, 149)])[0] for start in range(0, 149, 32)]
    logits, wanted = torch.cat(rows), tokens[1:].long()
    bits = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item() / math.log(2)
    assert scores["bits_per_character"] == pytest.approx(bits / 300, rel=1e-5)
    assert scores["top1_accuracy"] == pytest.approx((logits.argmax(-1) == wanted).float().mean().item())
    assert evaluate(trained.model, tokens, 300, 32, pass_tokens=64) == pytest.approx(scores, rel=1e-5)


def test_layers_that_do_not_compile_run_as_they_are(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def run(*_: Any) -> None:
            raise RuntimeError("no compiler found\nat all")

        return run

    trained = training(tokenizer)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"do not compile here and run uncompiled \(no compiler found\)"):
        assert not trained.compile_layers()
    assert float(trained.update(0.3)) > 0


def test_compiled_layers_are_used_in_updates_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(function: Any, **_: Any) -> Any:
        return lambda *arguments: calls.append(1) or function(*arguments)

    trained = training(tokenizer)
    monkeypatch.setattr(torch, "compile", counting)
    assert trained.compile_layers()
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    calls.clear()
    evaluate(trained.model, trained.windows.tokens[:100], 100, 32)
    assert not calls
    trained.update(0.3)
    assert len(calls) == 3 * TINY.num_hidden_layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
def test_one_compilation_serves_all_layers(tokenizer: Any) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(1)
        return graph.forward

    trained = training(tokenizer, num_hidden_layers=4)
    trained.run = torch.compile(target_training.run_block, dynamic=False, backend=backend)
    for _ in range(2):
        trained.update(0.3)
    assert len(graphs) == 1
    torch._dynamo.reset()


# ---- the defaults


def test_calibration_ends_in_time(smoke: dict[str, Any]) -> None:
    kangaroo = load(smoke["out"])
    settings = [(2, 0.5), (3, 0.1)]
    later = calibrate.calibrate_until(math.inf, kangaroo, ["class Stack:"], 8, settings)
    rows = [(row["num_speculative_tokens"], row["draft_confidence_threshold"]) for row in later]
    assert rows == settings
    assert not list(calibrate.calibrate_until(time.perf_counter() - 1, kangaroo, ["class Stack:"], 8, settings))
