"""Which launch configuration is taken, and that every shipped one is complete."""

import json
from collections.abc import Iterator

import pytest
import torch

from kangaroo_kernels import launch_config as module
from kangaroo_kernels.gate_up import gate_up
from kangaroo_kernels.launch_config import (
    LaunchConfig,
    architecture_file,
    configs_folder,
    configured_by,
    file_name,
    files_for,
    launch_config,
    pick,
    rules,
)
from kangaroo_kernels.linear_residual import linear_residual
from kangaroo_kernels.qkv_rope import qkv_rope
from kangaroo_kernels.reference.qkv_rope import rope_table

CONDITIONS = {"n", "k", "dtype", "max_n"}
WITH_TILES = {"qkv_rope", "linear_residual", "gate_up", "top1_head", "sample_head"}
OPERATIONS = WITH_TILES | {"attention", "attention_paged", "draft_loop"}
FILES = sorted(path.name for path in configs_folder().glob("*.json"))


def rule(warps: int, **settings: object) -> dict[str, object]:
    return {"num_warps": warps, "num_stages": 3, "block_n": 16, **settings}


@pytest.fixture
def written(monkeypatch):
    """Takes the place of ``configs/``: a GPU's own file and its architecture's."""
    files = {
        "gpu": {
            "both": [rule(1, n=64, k=32, dtype="float16"), rule(2, n=64), rule(4, max_n=100)],
            "own": [rule(2, k=8), {"num_warps": 1, "num_stages": 7}],
        },
        "architecture": {"both": [rule(8, n=64), rule(16)], "shared": [rule(32)]},
    }
    monkeypatch.setattr(module, "rules", lambda name: files.get(name, {}))
    return ("gpu", "architecture")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "warps"),
    [
        (64, 32, "float16", 1),  # every condition holds
        (64, 32, "bfloat16", 2),
        (64, 33, "float16", 2),
        (65, 32, "float16", 4),
        (100, 32, "float16", 4),  # at most 100
        (101, 32, "float16", 16),  # none of the GPU's own: the architecture's
        (1000, 1, "float32", 16),
    ],
)
def test_the_first_rule_whose_conditions_hold_wins(n, k, dtype, warps, written):
    assert pick(written, "both", n, k, dtype) == LaunchConfig(warps, 3, 16)


def test_the_architectures_rules_come_last(written):
    assert pick(written, "both", 64, 1, "float32").num_warps == 2
    assert pick(written[::-1], "both", 64, 1, "float32").num_warps == 8
    assert pick(written, "shared", 64, 1, "float32").num_warps == 32
    assert pick(("another GPU", *written), "shared", 64, 1, "float32").num_warps == 32


def test_a_rule_without_tiles(written):
    assert pick(written, "own", 5, 8, "float32") == LaunchConfig(2, 3, 16)
    assert pick(written, "own", 5, 9, "float32") == LaunchConfig(1, 7, 0)


@pytest.mark.parametrize("op", ["nothing", "own"])
def test_an_operation_without_a_rule_is_refused(op, written):
    with pytest.raises(
        LookupError, match=rf"^no launch configuration for {op} with n=5, k=9, float16 in architecture\.$"
    ):
        pick(written[1:], op, 5, 9, "float16")
    with pytest.raises(LookupError, match=r"for nothing with n=5, k=9, float16 in gpu, architecture\.$"):
        pick(written, "nothing", 5, 9, "float16")


def test_a_file_that_is_not_there_has_no_rules():
    assert rules("no_such_GPU.json") == {}
    with pytest.raises(LookupError, match=r"no_such_GPU\.json"):
        pick(("no_such_GPU.json",), "gate_up", 1, 1, "float16")


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "NVIDIA_H200.json"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100_SXM4_80GB.json"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA_GeForce_RTX_4090.json"),
        ("../a/b", "___a_b.json"),  # stays in its folder
    ],
)
def test_file_names(gpu, name):
    assert file_name(gpu) == name


@pytest.mark.parametrize(
    ("capability", "nearest"),
    [(70, 80), (75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (100, 90), (103, 90), (120, 90)],
)
def test_an_architecture_without_a_file_takes_that_of_the_nearest_older_one(capability, nearest):
    assert architecture_file(capability) == f"sm_{nearest}.json"
    assert architecture_file(capability) in FILES


def test_the_interpreter_takes_the_oldest_architectures():
    assert files_for(torch.device("cpu")) == ("sm_80.json",)


@pytest.mark.gpu
def test_a_gpu_takes_its_own_file_first(device):
    major, minor = torch.cuda.get_device_capability(device)
    assert files_for(device) == (file_name(torch.cuda.get_device_name(device)), architecture_file(10 * major + minor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_dtype_and_device_come_from_the_tensor(dtype, device, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "pick", lambda *question: asked.append(question) or LaunchConfig(1, 2, 3))
    op = f"an operation that no other test asks for in {dtype}"  # answers are kept
    x = torch.zeros(2, 5, dtype=dtype, device=device)
    assert launch_config(op, 11, 22, x) == launch_config(op, 11, 22, x) == LaunchConfig(1, 2, 3)
    assert asked == [(files_for(x.device), op, 11, 22, str(dtype)[len("torch.") :])]


# ---- what is shipped


def shipped() -> Iterator[tuple[str, str, dict[str, object]]]:
    for name in FILES:
        for op, found in rules(name).items():
            yield from ((name, op, rule) for rule in found)


def test_the_folder_is_found():
    assert {"sm_80.json", "sm_90.json"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_file_is_read_as_it_is_written(name):
    text = (configs_folder() / name).read_text(encoding="utf-8")
    assert rules(name) == json.loads(text)
    assert set(rules(name)) <= OPERATIONS


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("sm_")])
def test_every_operation_of_an_architecture_has_a_default(name):
    assert set(rules(name)) == OPERATIONS
    for op, found in rules(name).items():
        assert not CONDITIONS & set(found[-1]), op


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_rule_can_be_reached(name):
    for op, found in rules(name).items():
        assert found, op
        assert all(CONDITIONS & set(earlier) for earlier in found[:-1]), f"{op}: rules behind the default"
        seen = [{key: earlier[key] for key in CONDITIONS & set(earlier)} for earlier in found]
        assert all(seen.count(conditions) == 1 for conditions in seen), f"{op}: one condition twice"


@pytest.mark.parametrize(("name", "op", "rule"), shipped())
def test_every_shipped_rule_is_well_formed(name, op, rule):
    settings = {"num_warps", "num_stages"} | ({"block_n"} if op in WITH_TILES else set())
    settings |= {"programs_per_sm", "steps_ahead"} if op == "draft_loop" else set()
    allowed = CONDITIONS | ({"registers"} if op.startswith("attention") else set())
    assert settings <= set(rule) <= settings | allowed
    assert rule["num_warps"] in (1, 2, 4, 8, 16)
    assert rule["num_stages"] in range(1, 9)
    assert rule.get("block_n", 16) in (16, 32, 64, 128)
    assert rule.get("dtype", "float16") in ("float32", "float16", "bfloat16")
    assert all(isinstance(rule[key], int) and rule[key] > 0 for key in {"n", "k", "max_n"} & set(rule))


# ---- in place of the files


def test_configured_by_nests_and_restores(device):
    x = torch.zeros(1, dtype=torch.float16, device=device)
    asked = []

    def picker(warps: int):
        return lambda *question: asked.append(question) or LaunchConfig(warps, 1, 16)

    shipped = launch_config("gate_up", 5, 7, x)
    with configured_by(picker(1)):
        assert launch_config("gate_up", 5, 7, x).num_warps == 1
        with configured_by(picker(2)):
            assert launch_config("linear_residual", 6, 8, x.float()).num_warps == 2
        assert launch_config("no such operation", 5, 7, x).num_warps == 1
        with pytest.raises(ZeroDivisionError), configured_by(picker(4)):
            _ = 1 // 0
        assert launch_config("gate_up", 5, 7, x).num_warps == 1
    assert launch_config("gate_up", 5, 7, x) == shipped
    assert asked == [
        ("gate_up", 5, 7, torch.float16),
        ("linear_residual", 6, 8, torch.float32),
        ("no such operation", 5, 7, torch.float16),
        ("gate_up", 5, 7, torch.float16),
    ]


@pytest.mark.parametrize("block_n", [16, 32])
def test_launchers_ask_for_outputs_and_inputs(block_n, device):
    """``n`` is the width of the result: of ``gate_up`` half of its weight's rows."""
    asked = []

    def picker(*question):
        asked.append(question)
        return LaunchConfig(4, 2, block_n)

    x, norm = torch.randn(2, 24, device=device), torch.ones(24, device=device)
    caches = torch.zeros(2, 1, 9, 8, device=device)
    table = rope_table(torch.ones(4, device=device), 9)
    with configured_by(picker):
        linear_residual(x, torch.randn(17, 24, device=device), torch.zeros(2, 17, device=device))
        gate_up(x, norm, torch.randn(22, 24, device=device), eps=1e-5)
        qkv_rope(x, norm, torch.randn(40, 24, device=device), table, *caches, 3, eps=1e-5)
    assert asked == [
        ("linear_residual", 17, 24, torch.float32),
        ("gate_up", 11, 24, torch.float32),
        ("qkv_rope", 40, 24, torch.float32),
    ]
