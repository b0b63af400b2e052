"""The mailbox: what was posted is read in order, as it was at the time of posting."""

import pytest
import torch

from kangaroo_kernels.model.loop import mailbox as mailbox_module
from kangaroo_kernels.model.loop.mailbox import Mailbox, Stopwatch


def test_records_are_read_in_order_as_they_were_posted(device):
    source = torch.zeros(3, dtype=torch.int64, device=device)
    mailbox = Mailbox(source, 2)
    read = []
    for value in range(6):
        source.fill_(value)
        mailbox.post()
        if len(mailbox) == 2:
            source.fill_(-1)  # later work must not reach into what was posted
            read.append(mailbox.read())
    assert len(mailbox) == 1
    read.append(mailbox.read())
    assert read == [[value] * 3 for value in range(6)]
    assert len(mailbox) == 0


def test_no_more_than_its_slots_may_be_unread(device):
    mailbox = Mailbox(torch.zeros(1, dtype=torch.int64, device=device), 1)
    mailbox.post()
    with pytest.raises(IndexError):
        mailbox.post()


def test_pieces_of_work_are_timed_in_order(monkeypatch):
    watch = Stopwatch(torch.device("cpu"))
    for now in (1.0, 3.0, 10.0, 15.0):
        monkeypatch.setattr(mailbox_module.time, "perf_counter", lambda now=now: now)
        watch.mark()
    assert [watch.read(), watch.read()] == [2, 5]


@pytest.mark.gpu
def test_on_a_gpu_posting_does_not_wait(device):
    source = torch.zeros(3, dtype=torch.int64, device=device)
    mailbox, watch = Mailbox(source, 1), Stopwatch(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.mark()
        mailbox.post()
        watch.mark()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert mailbox.read() == [0, 0, 0] and watch.read() >= 0
