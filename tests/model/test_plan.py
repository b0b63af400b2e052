"""``kangaroo plan``: held to measured figures, and what it refuses."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.commands import cli
from kangaroo_kernels.model.drafters.vocabulary import write_draft_vocabulary
from kangaroo_kernels.model.evaluation.acceptance import PAPER, Profile, read_profile
from kangaroo_kernels.model.evaluation.machines import CPU, find_machine
from kangaroo_kernels.model.evaluation.plan import Found, Plan, find_shapes
from kangaroo_kernels.workloads import ModelShape

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu"
TEXT = 200
"""Tokens of the records' texts, prompt included, about."""


def record(name: str) -> Any:
    return json.loads((RECORDS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def demo() -> Found:
    return find_shapes("demo")


@pytest.fixture(scope="module")
def smollm2() -> Found:
    """Named by its shape, so that the model need not be installed; with the form of the adapter that was measured."""
    shape = find_shapes("SmolLM2-135M")
    return Found(shape.shape, shape.form.with_parts(intermediate_size=1536, draft_vocabulary=8192))


def plain(shape: ModelShape, **more: Any) -> float:
    plan = Plan(shape, CPU, length=TEXT, **more)
    return 1 / plan.seconds(plan.plain)


def over_measured(found: Found, row: dict[str, Any], exit_layer: int, most: int | None, speed: str) -> float:
    """The planned speedup over a measured one, with the acceptance, or also the draft length, of that measurement."""
    profile = read_profile({"total": row}, "a record")
    plan = Plan(found.shape, CPU, profile, found.form, length=TEXT)
    predicted = plan.predict(exit_layer, most or len(profile.accepted))
    measured, length = (
        each["value"] if isinstance(each, dict) else each for each in (row[speed], row["mean_acceptance_length"])
    )
    assert predicted.tokens_per_step == pytest.approx(length, rel=0.12)  # records count steps that could not draft
    assert predicted.speedup == pytest.approx(predicted.tokens_per_step / predicted.break_even_tokens_per_step)
    return predicted.speedup / measured


def test_plain_decoding_as_recorded(demo: Found, smollm2: Found) -> None:
    """Two figures were fitted to the medians of the first two groups; the others are what came of it."""
    bench, larger = record("decode")["benchmarks"], record("smollm2")["benchmarks"]
    small = [each["extra_info"]["decode_tokens_per_second"] for each in bench if each["param"].endswith("-plain")]
    large = {
        dtype: [each["extra_info"]["tokens_per_second"] for each in larger if each["param"].endswith(dtype)]
        for dtype in ("-plain", "32")
    }
    assert len(small) == 8 and [len(group) for group in large.values()] == [4, 4]
    spec_bench = [each["plain_tokens_per_second"]["value"] for each in record("smollm2_spec_bench")["categories"]]
    for measured, planned, off in (
        (small, plain(demo.shape), 0.15),
        (large["-plain"], plain(smollm2.shape), 0.15),
        (large["32"], plain(smollm2.shape, itemsize=4), 0.35),
        (spec_bench, plain(smollm2.shape), 0.17),
        ([each["plain_tokens_per_second"] for each in record("demo_pair")["prompts"]], plain(demo.shape), 0.26),
        ([each["plain_tokens_per_second"] for each in record("demo_smollm2")["prompts"]], plain(smollm2.shape), 0.15),
    ):
        for speed in measured:
            assert speed == pytest.approx(planned, rel=off)


def test_speedups_as_recorded(demo: Found, smollm2: Found) -> None:
    """With the acceptance of each measurement; the ranges are those that docs/architecture.md names.

    Rejection sampling works on rows of probabilities, of which the plan knows nothing.
    """
    found = {
        name: [over_measured(smollm2, row, 3, 6, "processor_speedup") for row in record(name)["categories"]]
        for name in ("smollm2_spec_bench", "smollm2_tasks_alone", "smollm2_third_alone")
    }
    for name in ("lookup", "tree", "tree_lookup"):
        rows = record(f"smollm2_third_{name}")["categories"]
        found[name] = [over_measured(smollm2, row, 3, None, "processor_speedup") for row in rows]
    alone = find_shapes("SmolLM2-135M")  # in the paper's form
    rows = record("smollm2_paper_form")["categories"]
    found["smollm2_paper_form"] = [over_measured(alone, row, 3, 6, "processor_speedup") for row in rows]
    rows = record("smollm2_experiment_exits")["rows"]
    found["smollm2_exits"] = [
        over_measured(alone, row, int(row["category"].split()[-1]), 6, "processor_speedup") for row in rows
    ]
    found["demo_pair"] = [over_measured(demo, row, 4, 6, "speedup") for row in record("demo_pair")["prompts"]]
    for name in ("drafting", "positions", "domains", "temperature"):
        rows = [row for row in record(f"experiment_{name}")["rows"] if row["settings"].get("acceptance") != "rejection"]
        most = [row["settings"].get("num_speculative_tokens", 6) for row in rows]
        found[name] = [
            over_measured(demo, *each, "processor_speedup") for each in zip(rows, [4] * len(rows), most, strict=True)
        ]
    exits = enumerate(record("experiment_exits")["rows"], start=1)
    found["exits"] = [over_measured(demo, row, layer, 6, "processor_speedup") for layer, row in exits]
    ranges = {name: (round(min(each), 2), round(max(each), 2), len(each)) for name, each in found.items()}
    assert ranges == {
        "smollm2_spec_bench": (0.95, 1.0, 14),
        "smollm2_tasks_alone": (0.97, 1.01, 14),
        "smollm2_third_alone": (0.93, 0.98, 14),
        "lookup": (0.98, 1.02, 14),
        "tree": (1.07, 1.11, 14),
        "tree_lookup": (1.07, 1.12, 14),
        "smollm2_paper_form": (0.93, 0.99, 14),
        "smollm2_exits": (0.97, 0.98, 5),
        "demo_pair": (0.98, 1.06, 8),
        "drafting": (0.83, 1.23, 45),
        "positions": (0.9, 0.97, 2),
        "domains": (0.9, 0.99, 8),
        "temperature": (0.99, 1.14, 5),
        "exits": (1.0, 1.1, 5),
    }


def test_the_documents_table_of_a_card(smollm2: Found) -> None:
    """What docs/architecture.md says of Llama-3.1-8B on an H100 is what the plan says."""
    text = (RECORDS.parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
    llama = find_shapes("Llama-3.1-8B")
    forms: dict[str, tuple[int, ...]] = {
        "attention alone": (),
        "an MLP, 16,384 tokens": (14336, 16384),
        "an MLP, 16,384 tokens, deep state of 4,096": (14336, 16384, 4096),
    }
    rows = [("the paper's", PAPER, form) for form in forms]
    ways = {"": "alone", " beside lookup": "lookup", " in trees": "tree", " in both": "tree_lookup"}
    for whose, name in ways.items():
        profile = read_profile(record(f"smollm2_third_{name}"), "a record")
        rows.append((f"SmolLM2's{whose}", profile, "an MLP, 16,384 tokens"))
    for whose, profile, form in rows:
        plan = Plan(llama.shape, find_machine("H100"), profile, llama.form.with_parts(*forms[form]))
        found = plan.predict(2, len(profile.accepted))
        figures = f"{found.tokens_per_step:.2f} | {found.kangaroo_tokens_per_second:.0f} | {found.speedup:.2f}x"
        assert f"| {whose} | {form} | {figures} |" in text, f"| {whose} | {form} | {figures} |"


def test_the_form_of_an_adapter(demo: Found, pair: Pair, tmp_path: Path) -> None:
    """Each part adds what it reads and launches; the bundled adapter has eight heads where its target has three."""
    shape, paper, _ = find_shapes("Llama-3.1-8B")
    mlp, deep = paper.with_parts(14336), paper.with_parts(deep_state_size=1024)
    drafts = {form: Plan(shape, CPU, form=form).draft(2) for form in (paper, mlp, deep, paper.with_parts(None, 8192))}
    plain_draft, with_mlp, with_deep, with_fewer_rows = drafts.values()
    assert plain_draft == Plan(shape, CPU).draft(2)
    assert with_mlp.size - plain_draft.size == 2 * 3 * 4096 * 14336
    assert with_deep.size - plain_draft.size == 2 * 3 * 4096 * 1024
    assert plain_draft.size - with_fewer_rows.size == 2 * 4096 * (128256 - 8192)
    assert [each.operations - 2 * 5 for each in drafts.values()] == [4, 6, 6, 4]
    assert Plan(shape, CPU, form=mlp).bytes_per_card - Plan(shape, CPU).bytes_per_card == 2 * 3 * 4096 * 14336
    assert Plan(shape, CPU, form=deep).bytes_per_card - Plan(shape, CPU).bytes_per_card == 2 * 3 * 4096 * 1024
    rows = Plan(shape, CPU, form=paper.with_parts(None, 8192))
    assert rows.bytes_per_card - Plan(shape, CPU).bytes_per_card == 2 * 4096 * 8192  # they are gathered
    factors, block = paper.with_parts(draft_head_rank=512), paper.with_parts(draft_block=4)
    narrow, first = Plan(shape, CPU, form=factors), Plan(shape, CPU, form=block)
    assert plain_draft.size - narrow.draft(2).size == 2 * (4096 * 128256 - 512 * (4096 + 128256))
    assert narrow.draft(2).operations - plain_draft.operations == 1
    assert narrow.bytes_per_card - Plan(shape, CPU).bytes_per_card == 2 * 512 * (4096 + 128256)
    assert first.draft(2).size - plain_draft.size == 2 * 4096 * 4096  # the correction
    assert (demo.form.shape.heads, demo.form.shape.kv_heads, demo.form.shape.inner) == (8, 8, 0)

    folder = shutil.copytree(pair.adapter, tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"mlp": True, "intermediate_size": 24, "deep_state_size": 9})
    )
    write_draft_vocabulary(folder, torch.arange(10))
    found = find_shapes(str(pair.target), str(folder))
    assert (found.form.shape.inner, found.form.shape.vocab_size, found.form.parts.deep_state_size) == (24, 10, 9)
    assert found.adapter is not None and found.adapter.exit_layer == config["exit_layer"]
    assert (
        "an MLP of 24" in (said := found.form.describe(found.shape)) and "10 rows" in said and "deep state of 9" in said
    )


def test_a_block_takes_one_draft_step() -> None:
    """And its head for each further draft; drafts beyond its places are not made."""
    shape, paper, _ = find_shapes("Vicuna-7B")
    chain, block = Plan(shape, CPU), Plan(shape, CPU, form=paper.with_parts(draft_block=4))
    one, four = (Plan(shape, CPU, form=paper.with_parts(draft_block=4)).predict(2, most) for most in (1, 4))
    assert block.predict(2, 6) == four
    step = [plan.predict(2, 1).break_even_tokens_per_step * plan.seconds(plan.plain) for plan in (chain, block)]
    correction = CPU.seconds_per_operation + 2 * 4096 * 4096 / CPU.bandwidth
    assert step[1] - step[0] == pytest.approx(correction)
    grown = (four.break_even_tokens_per_step - one.break_even_tokens_per_step) * block.seconds(block.plain)
    rows = block.layers(shape.layers - 2) + block.head
    verified = block.seconds(rows, 1 + four.drafts_per_step) - block.seconds(rows, 1 + one.drafts_per_step)
    head = block.seconds(block.head) + correction
    assert grown - verified == pytest.approx((four.drafts_per_step - 1) * head)
    assert "4 in a pass" in block.adapter.describe(shape)
    measured = Plan(shape, CPU, Profile.of([0.5, 0.25], 1.6, "a block", 1.0), block.form)
    assert not any("draft steps" in each for each in measured.assumptions())  # its steps are the plan's own
    assert "head of rank 64" in paper.with_parts(draft_head_rank=64).describe(shape)


def test_a_profile_gives_back_what_it_was_read_from():
    accepted, drafts = [0.8, 0.6, 0.3], 2.6
    profile = Profile.of(accepted, drafts, "a test")
    shares, made = profile.first(3)
    assert shares == accepted
    assert sum(made) == pytest.approx(drafts)
    assert profile.first(2)[1] == made[:2]
    assert profile.first(4)[0][3] == pytest.approx(0.15)  # half as often, as the third after the second
    assert 1 + sum(PAPER.first(6)[0]) == pytest.approx(1.93)
    assert Profile.of([0.0], 1.0, "never right").first(3) == ([0.0] * 3, [1.0, 0.0, 0.0])


def test_what_takes_no_draft_step_costs_none() -> None:
    """It is verified all the same. A tree has more drafts than places, and takes a draft step for each place."""
    of = Profile.of
    chain, looked_up = (of([0.5, 0.25], 1.6, "a test", draft_steps) for draft_steps in (1.6, 0.4))
    assert (chain.steps_per_draft, looked_up.steps_per_draft) == (1, 0.25)
    tree = of([0.5, 0.25], 9, "a tree", 2)
    assert (tree.steps_per_draft, tree.rows_per_draft, chain.rows_per_draft) == (1, 4.5, 1)
    plans = [Plan(find_shapes("Vicuna-7B").shape, CPU, profile) for profile in (chain, looked_up)]
    dear, cheap = (plan.predict(2, 2) for plan in plans)
    saved = dear.plain_ms * (dear.break_even_tokens_per_step - cheap.break_even_tokens_per_step)
    assert saved == pytest.approx(dear.draft_ms * (1.6 - 0.4))
    row, rows = (
        Plan(find_shapes("Vicuna-7B").shape, CPU, each).predict(2, 2) for each in (of([0.5, 0.25], 2, ""), tree)
    )
    assert (row.drafts_per_step, rows.drafts_per_step) == (2, 9)
    assert rows.verify_ms / row.verify_ms > 1.5
    assert (cheap.drafts_per_step, cheap.verify_ms) == (dear.drafts_per_step, dear.verify_ms)
    said = [[each for each in plan.assumptions() if "a place's draft" in each.lower()] for plan in plans]
    assert not said[0] and "takes 0.25 draft steps and 1.00 rows, as in the profile of 2 places" in said[1][0]


def test_reports_that_hold_a_profile():
    rates = {"acceptance_rate_per_position": [0.5, 0.25], "draft_acceptance_rate": 0.5}
    counts = {"acceptance_histogram": [2, 1, 1], "num_spec_steps": 4, "num_draft_tokens": 6}
    found = [read_profile(report, "x") for report in ({"total": rates}, {"comparison": rates}, rates)]
    assert found == [read_profile({"categories": [{}, counts]}, "x")] * 3
    assert found[0].accepted == (0.5, 0.25)
    assert found[0].steps_per_draft == 1
    rates |= {"draft_steps": 3, "verification_steps": 4}
    counts |= {"num_draft_steps": 3}
    halves = [read_profile(report, "x") for report in (rates, {"categories": [counts]})]
    assert halves == [replace(found[0], steps_per_draft=0.5)] * 2
    for report in ({"total": rates, "model": "m"}, {"categories": [counts], "settings": {"model": "m"}}):
        assert (
            read_profile(report, "x").source == "as often right as those of m, 1.75 tokens a step in the steps "
            "that drafted, by x"
        )
    impossible = [rates | {"acceptance_rate_per_position": [share]} for share in (5, -0.5, math.nan)]
    without = [[], {}, {"total": {"draft_acceptance_rate": 0}}, {"acceptance_rate_per_position": []}, {"categories": 5}]
    for report in (*without, {"categories": {"a": 1}}, *impossible):
        with pytest.raises(KangarooError, match="x has no acceptance rates"):
            read_profile(report, "x")


def test_cards_that_share_a_model():
    shape = find_shapes("llama-3.1-70b").shape
    alone, shared = (Plan(shape, find_machine("H100"), cards=cards) for cards in (1, 4))
    assert shared.bytes_per_card == alone.bytes_per_card / 4
    exchanges = (2 * shape.layers + 1) * shared.machine.exchange
    operations = (5 * shape.layers + 1) * shared.machine.seconds_per_operation
    assert shared.seconds(shared.plain) - exchanges - operations == pytest.approx(
        (alone.seconds(alone.plain) - operations) / 4
    )
    assert sum("cards share" in sentence for sentence in shared.assumptions()) == 1


def test_every_gpu_is_named_an_assumption():
    for name in ("a100", "H100", "H200"):
        plan = Plan(find_shapes("Vicuna-7B").shape, find_machine(name))
        assert plan.assumptions()[0].startswith(f"{name.upper()}: assumed, not measured")
    assert "assumed" not in Plan(find_shapes("Vicuna-7B").shape, CPU).assumptions()[0]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["kangaroo", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    picture, profile = tmp_path / "plan.png", tmp_path / "profile.json"
    profile.write_text(json.dumps({"acceptance_rate_per_position": [0.5], "draft_acceptance_rate": 0.5}))
    command = ("--model", pair.target / "config.json", "--card", "H100", "--profile", profile, "--exit-layer", 2)
    assert run(monkeypatch, *command, "--picture", picture, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for place, sentence in (("p.foo", "must end in .png, .svg or .pdf"), ("gone/p.png", "there is no folder")):
        assert run(monkeypatch, *command, "--picture", tmp_path / place) == 2
        assert sentence in capsys.readouterr().err
    assert found["num_speculative_tokens"] == 1, "the profile's own"
    assert found["speedup"] == pytest.approx(found["speedup_by_exit_layer"]["2"][0])
    assert set(found["speedup_by_exit_layer"]) == {"1", "2"}
    assert run(monkeypatch, *command, "--adapter", pair.adapter, "--draft-vocabulary", 9, "--json") == 0
    with_adapter = json.loads(capsys.readouterr().out)
    assert with_adapter["draft_ms"] < found["draft_ms"] and "9 rows" in with_adapter["assumptions"][3]
    folder = shutil.copytree(pair.adapter, tmp_path / "adapter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_speculative_tokens": 3}))
    assert run(monkeypatch, *command[:4], "--adapter", folder, "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert (own["exit_layer"], own["num_speculative_tokens"]) == (2, 3)
    assert run(monkeypatch, *command) == 0
    out = capsys.readouterr().out
    assert "planned, not measured" in out and "assumed, not measured" in out
    assert f"{found['kangaroo_tokens_per_second']:,.2f}" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--card", "H900"), "known are A100, H100, H200, CPU"),
        (("--card", "H100", "--tensor-parallel", 3), "tensor_parallel is 3; it must divide the 32 attention heads"),
        (("--card", "CPU", "--tensor-parallel", 2), "give a GPU"),
        (("--card", "H100", "--exit-layer", 32), "allows 1 to 31"),
        (("--card", "H100", "--num-speculative-tokens", 16), "from 1 to 15"),
        (("--card", "H100", "--length", 0), "at least 1"),
        (("--card", "H100", "--profile", __file__), "is no JSON"),
        (("--card", "H100", "--adapter", "x"), "Vicuna-7B is a shape without files"),
        (("--card", "H100", "--draft-vocabulary", 32000), "draft_vocabulary is 32000"),
        (("--card", "H100", "--intermediate-size", 0), "intermediate_size is 0"),
        (("--card", "H100", "--deep-state-size", 0), "deep_state_size is 0"),
        (("--card", "H100", "--draft-head-rank", 9999), "draft_head_rank is 9999; it must be a whole number from 1 to"),
        (("--card", "H100", "--draft-block", 1), "draft_block is 1"),
        (("--card", "H100", "--draft-block", 4, "--deep-state-size", 8), "exclude each other"),
    ],
)
def test_what_it_refuses(arguments, said, monkeypatch, capsys):
    assert run(monkeypatch, "--model", "Vicuna-7B", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("kangaroo: ") and said in " ".join(error.split()) and error.count("\n") == 1
