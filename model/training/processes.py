"""The processes that train one adapter together, each on the windows that are its own; ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Processes:
    """All of them, seen from one.

    Attributes:
        rank: the number of this one; the first alone tells what happens, writes files and scores.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    def agree(self, share: float, stopped: bool) -> tuple[float, bool]:
        """What the first process says of the run's share that has passed, and of whether it was stopped."""
        if self.count > 1:
            said = torch.tensor([share, stopped], dtype=torch.float64)  # on the host: it waits for no GPU
            distributed.broadcast(said, src=0)
            share, stopped = float(said[0]), bool(said[1])
        return share, stopped

    def share(self, module: nn.Module) -> None:
        """Give all processes the first one's parameters: what was computed need not have the same bits everywhere."""
        if self.count > 1:
            for parameter in module.parameters():
                distributed.broadcast(parameter.data, src=0)

    def add_up(self, module: nn.Module, loss: Tensor) -> Tensor:
        """Sum the gradients of all processes in place, and return the sum of their losses."""
        if self.count == 1:
            return loss
        parameters = list(module.parameters())
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([loss.reshape(1), *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(flat)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, total in zip(parameters, flat[1:].split(sizes), strict=True):
            parameter.grad = total.view_as(parameter)
        return flat[0]


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Meet those that ``torchrun`` started; without it this process is alone.

    On GPUs each takes its own, the current one from then on.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # gloo for what lies on the host, NCCL for GPUs
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
