"""What ``kangaroo info`` says, against known models and against loaded ones."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Pair
from pairs import make_adapter, make_target, with_vocabulary
from safetensors.torch import load_file

from kangaroo_kernels import KangarooError
from kangaroo_kernels.model.commands.facts import environment, footprint
from kangaroo_kernels.model.demo import bundled_pair


def test_the_machine() -> None:
    here = environment()
    assert here.versions["torch"] == torch.__version__
    assert "cpu" in here.devices
    assert {"rows", "transposed"} <= set(here.supported["cpu_layouts"])


@pytest.mark.parametrize(("gpu", "name"), [(True, "Triton kernels"), (False, "PyTorch references")])
def test_what_carries_the_operations(gpu: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    wanted = f"Triton kernels on a GPU, PyTorch references on a CPU; by default here: {name}"
    assert environment().operations == wanted


def test_what_loads_by_default_is_what_it_says(pair: Pair) -> None:
    kernels = pair.load().target.backend.name
    assert kernels in environment().operations.rpartition(":")[2].lower()


def test_the_name_demo_stands_for_the_pair() -> None:
    folder = bundled_pair().folder
    assert footprint("demo") == footprint(folder / "target", folder / "adapter")
    assert footprint("demo", exit_layer=1).exit_layer == 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_parameters_are_those_of_the_files(tmp_path: Path, tied: bool, biased: bool, mlp: bool) -> None:
    target = make_target(tmp_path / "t", tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased)
    adapter = make_adapter(tmp_path / "a", target, exit_layer=2, mlp=mlp)
    cost = footprint(target, adapter)
    assert cost.target_parameters == sum(tensor.numel() for tensor in load_file(target / "model.safetensors").values())
    assert cost.adapter_parameters == sum(
        tensor.numel() for tensor in load_file(adapter / "model.safetensors").values()
    )


def test_the_paper_s_model(tmp_path: Path) -> None:
    """Vicuna-7B with an exit after two layers: 13.21 GB a pass, 1.21 GB a draft step, 12.40 GB to verify."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    for name, more in (("target", {}), ("adapter", {"num_hidden_layers": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | more))
    cost = footprint(tmp_path / "target", tmp_path / "adapter", exit_layer=2, device="cpu", dtype="bfloat16")
    assert cost.plain_step_bytes / 1e9 == pytest.approx(13.21, abs=0.01)
    assert cost.draft_step_bytes is not None and cost.verify_pass_bytes is not None
    assert cost.draft_step_bytes / 1e9 == pytest.approx(1.21, abs=0.01)
    assert cost.verify_pass_bytes / 1e9 == pytest.approx(12.40, abs=0.01)
    assert cost.target_parameters == 6_738_415_616
    assert cost.kv_bytes_per_token == 33 * 2 * 4096 * 4, "a CPU keeps them in float32"
    asked = footprint(
        tmp_path / "target", tmp_path / "adapter", exit_layer=2, device="cpu", dtype="float16", kv_dtype="float16"
    )
    assert asked.kv_bytes_per_token == 33 * 2 * 4096 * 2


def test_a_draft_vocabulary_makes_a_draft_step_cheaper(pair: Pair, tmp_path: Path) -> None:
    whole = footprint(pair.target, pair.adapter)
    cost = footprint(pair.target, with_vocabulary(pair.adapter, tmp_path / "adapter", range(20)))
    assert (whole.draft_vocab_size, cost.draft_vocab_size) == (None, 20)
    assert whole.draft_step_bytes - cost.draft_step_bytes == (67 - 20) * 48 * 4
    assert cost.verify_pass_bytes == whole.verify_pass_bytes


def test_the_parts_of_an_adapter_count(pair: Pair, tmp_path: Path) -> None:
    """A head of its own is read in the place of the target's, and only the rows of the tokens that it drafts."""
    parts = {"draft_head_rank": 12, "draft_block": 4, "trained_confidence": True}
    adapter = make_adapter(tmp_path / "a", pair.target, exit_layer=2, **parts)
    few = with_vocabulary(adapter, tmp_path / "b", range(20))
    cost, cheaper = (footprint(pair.target, each) for each in (adapter, few))
    own = sum(tensor.numel() for tensor in load_file(adapter / "model.safetensors").values())
    assert cost.adapter_parameters == cheaper.adapter_parameters == own
    shallow = footprint(pair.target, pair.adapter).plain_step_bytes - cost.verify_pass_bytes
    assert cost.draft_step_bytes == shallow + 4 * own
    assert cost.draft_step_bytes - cheaper.draft_step_bytes == 4 * (67 - 20) * 12
    assert cost.drafting == "up to 4 drafts in one pass, threshold 0.6"


def test_without_an_adapter_and_with_mistakes(pair: Pair) -> None:
    cost = footprint(pair.target)
    assert (cost.dtype, cost.device) == ("float32", "cuda" if torch.cuda.is_available() else "cpu")
    assert cost.exit_layer is cost.draft_step_bytes is None
    with pytest.raises(KangarooError, match="exit_layer was given without an adapter"):
        footprint(pair.target, exit_layer=2)
    with pytest.raises(KangarooError, match="exit_layer is 4"):
        footprint(pair.target, pair.adapter, exit_layer=4)
