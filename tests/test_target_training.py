"""What a pair's target learns from, and its training: the corpus, windows of it, updates, measurements."""

import math
import sys
import time
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import demo_corpus
import pytest
import target_training
import torch
from demo_corpus import Document, cut_prompts, installed_documents, stdlib_documents
from presets import SMOKE
from target_training import TargetRecipe, TargetTraining, encode, evaluate, train_tokenizer
from torch.nn import functional as F

from kangaroo_kernels import Kangaroo

TINY = replace(SMOKE.target, num_hidden_layers=2, context=32, short_context=16, batch_tokens=96, pass_tokens=32)


# ---- the corpus


def code(seed: str, lines: int = 30) -> str:
    values = (f"    value_{seed}_of_line_{'abcdefghij'[n % 10]} = {seed}_{'x' * n}\n" for n in range(lines))
    return "def begin():\n" + "".join(values)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library in the place of this machine's, with an empty folder of packages in it."""
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    return tmp_path


def test_what_is_read(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tables nor what cannot be read, no text twice, and in an order that the paths' hashes fix."""
    texts = {name: code(name[0]) for name in ("a.py", "json/c.py", "encodings/t.py", "site-packages/torch/d.py")}
    texts |= {"b.py": code("a"), "numbers.py": "table = [" + "0x12, " * 200 + "]"}
    for name, text in texts.items():
        (library / name).parent.mkdir(exist_ok=True)
        (library / name).write_text(text)
    (library / "broken.py").write_bytes(b"\xff" * 400)
    (library / "link.py").symlink_to(library / "nowhere")
    found = {document.path: document for document in stdlib_documents()}
    assert {name for name in found if name.endswith(".py")} == {"a.py", "b.py", "json/c.py"}
    assert found["a.py"].file == library / "a.py" and found["pydoc_data/topics/while"].file is None
    assert [document.path for document in installed_documents(("json",))] == ["json/c.py"]
    installed = installed_documents()
    assert {"json/c.py", "site-packages/torch/d.py"} < {document.path for document in installed}
    assert sorted(document.text for document in installed) == sorted(map(code, "ajs"))
    assert installed == sorted(installed, key=lambda document: sha256(document.path.encode()).digest())
    monkeypatch.setattr(demo_corpus, "MAX_CHARS", len(installed[0].text) + 1)
    assert installed_documents() == installed[:2]


def test_near_copies_are_not_held_out(library: Path) -> None:
    names = [f"module_{index}.py" for index in range(1000)]
    copy, own, *_ = [name for name in names if Document(name, "").held_out]
    original = next(name for name in names if not Document(name, "").held_out)
    (library / original).write_text(code("shared"))
    (library / copy).write_text(code("shared") + code("fresh", 10))
    (library / own).write_text(code("fresh") + code("shared", 10))
    assert {document.path for document in installed_documents()} == {original, own}


def test_prompts() -> None:
    """They begin with a definition and end between lines with much behind them; two are enough, one a file."""
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
def tokenizer() -> Any:
    return train_tokenizer([Document("some.py", code("same"))], 300)


def training(tokenizer: Any, recipe: TargetRecipe = TINY) -> TargetTraining:
    torch.manual_seed(0)
    tokens = torch.randint(1, 40, (4000,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    return TargetTraining(recipe, tokenizer, tokens, torch.device("cpu"))


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
    tokens = trained.tokens[:150]  # four windows of 32 and a rest that is left out
    with torch.no_grad():
        rows = [trained.model(tokens[None, start : start + 32]).logits[0] for start in range(0, 128, 32)]
    logits, wanted = torch.cat(rows), tokens[1:129].long()
    bits = F.cross_entropy(logits, wanted, reduction="sum").item() / math.log(2)
    characters = len(tokenizer.decode(wanted.tolist()))
    for pass_tokens in (0, 64):
        assert evaluate(trained.model, tokenizer, tokens, 32, pass_tokens) == {
            "bits_per_character": pytest.approx(bits / characters, rel=1e-5),
            "top1_accuracy": pytest.approx((logits.argmax(-1) == wanted).float().mean().item()),
        }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it itself
@pytest.mark.parametrize("works", [True, False])
def test_layers_compile_once_or_run_as_they_are(works: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, calls = list[int](), list[int]()

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(1)
        assert works, "no compiler found"
        return lambda *inputs: calls.append(1) or graph.forward(*inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    trained = training(tokenizer)
    trained.compile_layers()
    tried = len(graphs)
    assert (tried == 1 or not works) and all(parameter.grad is None for parameter in trained.model.parameters())
    calls.clear()
    evaluate(trained.model, tokenizer, trained.tokens[:100], 32, 32)
    assert not calls
    assert float(trained.update(0.3)) > 0
    assert len(calls) == 3 * TINY.num_hidden_layers * works and len(graphs) == tried
    torch._dynamo.reset()
