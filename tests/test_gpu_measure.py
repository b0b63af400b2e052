"""How kernels are measured: the arithmetic, the yardstick's kernel, and that nothing wrong gets as far as a clock."""

import math
import os
from unittest.mock import Mock, patch

import gpu_card
import gpu_measure as gm
import pynvml
import pytest
import torch
from accuracy import first_results, first_rows, reference, relative_error, same_bits, written
from hypothesis import given
from hypothesis import strategies as st

from kangaroo_kernels.workloads import TINY, Settings, workloads

WORKLOADS = {f"{workload.op} {workload.role}": workload for workload in workloads(TINY)}
ROWS, LENGTH = 5, 40


def test_the_card_is_asked_and_what_it_does_not_say_is_none(monkeypatch):
    refuses = Mock(side_effect=pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
    says = dict.fromkeys((name for name in vars(pynvml) if name.startswith("nvmlDeviceGet")), refuses)
    says["nvmlDeviceGetClockInfo"] = lambda card, kind: 1980 if kind == 1 else 3201
    says |= {"nvmlDeviceGetPowerUsage": lambda card: 312_500, "nvmlSystemGetDriverVersion": lambda: "580.1"}
    monkeypatch.setattr(gpu_card, "_nvml_handle", lambda device: "handle")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with patch.multiple(pynvml, **says):
        taken = gpu_card.snapshot(torch.device("cuda", 0))
    said = {"name": "a card", "driver": "580.1", "sm_mhz": 1980, "memory_mhz": 3201, "power_w": 312.5}
    assert taken == dict.fromkeys(taken) | said


# ---- time


def test_quantiles():
    assert gm.quantiles([index * 1e-6 for index in (5, 1, 2, 11, 4, 3, 6, 9, 8, 7, 10)]) == pytest.approx((3, 6, 9))


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 28))
def test_sets_overflow_the_l2(set_bytes, l2_bytes):
    """And no more of them than it takes, within half of the free memory."""
    sets = gm.sets_needed(set_bytes, l2_bytes, 1 << 60)
    assert sets >= 2
    assert sets * set_bytes > gm.OVERFLOW * l2_bytes
    assert sets == 2 or (sets - 1) * set_bytes <= gm.OVERFLOW * l2_bytes
    assert gm.sets_needed(set_bytes, l2_bytes, 4 * set_bytes) == 2


@given(st.integers(1, 2000), st.floats(0, 1e4))
def test_every_set_is_repeated_equally_often_and_a_replay_is_long(sets, least_us):
    repetitions, call_us = gm.repetitions_for(sets, least_us), max(least_us, gm.LEAST_US)
    assert repetitions % sets == 0
    assert repetitions * call_us >= gm.REPLAY_US * (1 - 1e-9)
    assert repetitions == sets or (repetitions - sets) * call_us < gm.REPLAY_US * (1 + 1e-9)


# ---- the yardstick


@pytest.mark.parametrize("stream", gm.STREAMS[::5], ids=str)
def test_the_stream_reads_every_integer_once(stream, device):
    values = torch.randint(-999, 999, (5 * stream.chunk,), dtype=torch.int32, device=device)
    values[:: stream.chunk // 7] = 99_999
    for place in (0, stream.chunk - 1, len(values) - 1):  # none is left out, none is read twice
        values[place] += 1
        assert int(gm.read_stream(values, stream, multiprocessors=1).sum()) == int(values.sum())


# ---- right before fast


def arguments_of(workload, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return workload.make(Settings(ROWS, LENGTH, dtype, torch.device(device)))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_output_counts(name):
    """One wrong value in any of them is seen, and so is one that was not written."""
    arguments = arguments_of(WORKLOADS[name])
    op = WORKLOADS[name].op
    right = written(op, reference(op), arguments)
    assert 0 < relative_error(op, right, arguments) < 3e-6
    few = first_rows(op, arguments, 2)
    cut = first_results(op, right, 2)
    for one, other in zip(written(op, reference(op), few), cut, strict=True):
        assert torch.allclose(one, other, atol=1e-6), "the same call with fewer rows"
    assert len(right) == {"qkv_rope": 3, "top1_head": 2, "sample_head": 2}.get(op, 1)
    for index, tensor in enumerate(right):
        wrong = tensor.clone()
        wrong.view(-1)[-1] += 3 if tensor.dtype == torch.int64 else 1
        changed = (*right[:index], wrong, *right[index + 1 :])
        assert relative_error(op, changed, arguments) > 1e-2, index
        wrong.view(-1)[-1] = -1 if tensor.dtype == torch.int64 else math.nan
        assert relative_error(op, changed, arguments) == math.inf, index


@pytest.mark.parametrize("place", range(3))
def test_an_output_that_a_kernel_leaves_unwritten_is_seen(place):
    """Whatever lay there before, even the right values, is poisoned."""
    arguments = arguments_of(WORKLOADS["qkv_rope qkv"])
    reference("qkv_rope")(*arguments[0], **arguments[1])  # the caches hold the right rows already

    def forgetful(*positional, out=None, **named):
        before = [cache.clone() for cache in positional[4:6]]
        result = reference("qkv_rope")(*positional, **named)
        if out is None:
            return result
        if place:
            positional[3 + place].copy_(before[place - 1])
            out.copy_(result)
        return out

    got = written("qkv_rope", forgetful, arguments)
    assert [bool(tensor.isnan().any()) for tensor in got] == [index == place for index in range(3)]
    assert relative_error("qkv_rope", got, arguments) == math.inf


def test_a_near_tie_may_go_either_way():
    x, norm_weight = torch.ones(1, 4), torch.ones(4)
    weight = torch.stack([torch.full((4,), 1.0), torch.full((4,), 1.0 - 1e-4), torch.full((4,), 0.5)])
    arguments = ((x, norm_weight, weight), {"eps": 1e-5})
    _, confidence = written("top1_head", reference("top1_head"), arguments)
    errors = [relative_error("top1_head", (torch.tensor([token]), confidence), arguments) for token in range(4)]
    assert errors[0] < 1e-6 < errors[1] < 2e-4
    assert errors[2] == pytest.approx(0.5, rel=1e-3)
    assert errors[3] == math.inf


def test_a_sample_with_other_noise_is_held_by_its_confidence_alone():
    arguments = arguments_of(WORKLOADS["sample_head head"])
    token, confidence = written("sample_head", reference("sample_head"), arguments)
    other = (token + 1) % TINY.vocab_size
    assert relative_error("sample_head", (other, confidence), arguments) > 1e-2
    assert relative_error("sample_head", (other, confidence), arguments, same_noise=False) < 1e-5
    assert relative_error("sample_head", (other, confidence * 1.5), arguments, same_noise=False) > 1e-2
    assert relative_error("sample_head", (other - 9999, confidence), arguments, same_noise=False) == math.inf


def test_same_bits():
    ones = (torch.ones(3), torch.tensor([1, 2]))
    assert same_bits(ones, tuple(tensor.clone() for tensor in ones))
    assert not same_bits(ones, (torch.ones(3), torch.tensor([1, 3])))
    assert not same_bits([torch.tensor([0.0])], [torch.tensor([-0.0])])
    assert not same_bits([torch.tensor([1.0])], [torch.tensor([1.0 + 2**-23])])


# ---- on a GPU

ALONE = pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests use the card meanwhile")


@pytest.mark.gpu
def test_calls_take_turns_in_the_graph(device):
    values = torch.zeros(3, device=device)
    order = []

    def call(index):
        order.append(index)
        values[index] += 1

    replays = gm.Replays([lambda index=index: call(index) for index in range(3)], 6)
    assert order == [0, 1, 2, 0, 1, 2, 0, 1, 2]  # once each before the capture
    before = values.tolist()
    assert replays.seconds() > 0
    assert [after - first for after, first in zip(values.tolist(), before, strict=True)] == [4, 4, 4]  # two replays


@ALONE
@pytest.mark.gpu
def test_time_grows_with_the_bytes(device):
    small, large = (torch.randn(size, device=device) for size in (1 << 24, 1 << 27))
    one, eight = (gm.time_graph([lambda x=x: x.mul_(1.0)], 20, 10) for x in (small, large))
    assert 0 < one.p20 <= one.p50 <= one.p80
    assert 4 < eight.p50 / one.p50 < 16


@ALONE
@pytest.mark.gpu
def test_the_ceiling_is_plausible(device):
    ceiling = gm.measure_ceiling(device)
    assert ceiling.stream in gm.STREAMS
    assert ceiling.buffer_bytes >= 8 * gpu_card.read_card(device).l2_bytes
    assert 0.7 < ceiling.read / ceiling.copy < 2
