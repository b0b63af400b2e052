"""``tools/experiment_ablation.py``: networks that are no adapters are trained, kept, and drafted with."""

import random
from pathlib import Path

import experiment_ablation
import pytest
import torch
from conftest import Pair
from experiment_ablation import FORMS, SEEDS, Trial, TrialAdapter
from safetensors.torch import load_file
from torch.nn import functional as F

from kangaroo_kernels import Kangaroo, KangarooError
from kangaroo_kernels.model.training.plan import read_plan
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.teacher import Teacher

EXIT_LAYER, INNER = 2, 80


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """Some text."""
    file = tmp_path / "data.txt"
    file.write_text("".join(random.Random(0).choices("ABCDEFGHIJ", k=4000)))
    return [file]


@pytest.mark.parametrize("form", FORMS)
def test_it_drafts_what_was_trained(form: str, pair: Pair, data: list[Path], tmp_path: Path) -> None:
    """The runtime's network computes what the trained module does, row by row over a cache, with some of the tokens."""
    settings = TrainingSettings(str(pair.target), tuple(data), EXIT_LAYER, tmp_path / "out", intermediate_size=INNER)
    plan = read_plan(settings)
    teacher = Teacher(pair.target, torch.device("cpu"), exit_layers=[EXIT_LAYER])
    tokens = torch.arange(0, len(teacher.head), 2)
    trial = Trial(form, 0, plan, settings, teacher, teacher.head[tokens])
    with torch.no_grad():
        for parameter in [*trial.network.parameters(), *([trial.head] if FORMS[form].own_head else [])]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    trial.write(tmp_path / "network.safetensors", tokens, EXIT_LAYER, torch.float32)

    kangaroo = Kangaroo.from_pretrained(pair.target)
    adapter = TrialAdapter(tmp_path / "network.safetensors", kangaroo.target)
    assert adapter.config.exit_layer == EXIT_LAYER
    cache, exit_hidden = adapter.new_cache(), torch.randn(7, kangaroo.target.config.hidden_size)
    cache.reserve(7)
    rows = torch.cat([adapter.run(exit_hidden[:4], cache, 0), adapter.run(exit_hidden[4:], cache, 4)])
    with torch.no_grad():
        wanted = trial.network(exit_hidden[None])[0][0]
        logits = F.linear(wanted, trial.head)
    torch.testing.assert_close(adapter.head.logits(rows)[:, tokens], logits, rtol=1e-4, atol=1e-4)
    assert adapter.head.vocabulary is not None and adapter.head.vocabulary.tokens.tolist() == tokens.tolist()


def test_a_stopped_training_goes_on(
    pair: Pair, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the weights of one that was not stopped; what is trained is not trained again."""
    monkeypatch.setattr(experiment_ablation, "STATE_SECONDS", 0.0)

    def train(out: str) -> dict[str, list[list[float]]]:
        files = experiment_ablation.train(str(pair.target), data, EXIT_LAYER, 3, tmp_path / out)
        return {name: [each.flatten().tolist() for each in load_file(file).values()] for name, file in files.items()}

    whole = train("whole")
    assert len(whole) == len({*map(str, whole.values())}) == len(FORMS) * len(SEEDS)
    learn, calls = Trial.learn, list[str]()

    def stop_in_the_last_step(trial: Trial, *given: object) -> float:
        calls.append(trial.name)
        if len(calls) == 2 * len(whole) + 4:
            raise KeyboardInterrupt
        return learn(trial, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trial, "learn", stop_in_the_last_step)
    with pytest.raises(KeyboardInterrupt):
        train("stopped")
    with pytest.raises(KangarooError, match="other data or steps; take a new folder"):
        experiment_ablation.train(str(pair.target), data, EXIT_LAYER, 4, tmp_path / "stopped")
    assert train("stopped") == whole
    assert len(calls) == 3 * len(whole) + 4  # the last step alone was made again
    assert train("stopped") == whole and len(calls) == 3 * len(whole) + 4


def test_every_part_learns(pair: Pair, data: list[Path], tmp_path: Path) -> None:
    """No part of a network stays what it was, its own head included."""
    begun, later = (
        experiment_ablation.train(str(pair.target), data, EXIT_LAYER, steps, tmp_path / str(steps)) for steps in (1, 2)
    )
    for name, file in later.items():
        new, old = load_file(file), load_file(begun[name])
        unchanged = {each for each in new if torch.equal(new[each], old[each])}
        assert unchanged == {experiment_ablation.TOKENS}, name
        assert (experiment_ablation.HEAD in new) == ("own" in name)
