"""What a GPU says about itself: its sizes and its clocks. Nothing of it is ever set."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pynvml
import torch


class Card(NamedTuple):
    """A GPU of the model ``name``."""

    name: str
    multiprocessors: int
    l2_bytes: int
    capability: int  # compute capability times ten


def read_card(device: torch.device) -> Card:
    """Ask a CUDA device."""
    gpu = torch.cuda.get_device_properties(device)
    return Card(gpu.name, gpu.multi_processor_count, gpu.L2_cache_size, 10 * gpu.major + gpu.minor)


Query = Callable[[Any], Any]
QUERIES: dict[str, Query] = {  # of NVML's handle of a card
    "driver": lambda card: pynvml.nvmlSystemGetDriverVersion(),
    "sm_mhz": lambda card: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM),
    "sm_mhz_max": lambda card: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_SM),
    "memory_mhz": lambda card: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM),
    "memory_mhz_max": lambda card: pynvml.nvmlDeviceGetMaxClockInfo(card, pynvml.NVML_CLOCK_MEM),
    "power_w": lambda card: pynvml.nvmlDeviceGetPowerUsage(card) / 1000,
    "power_limit_w": lambda card: pynvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
    "temperature_c": lambda card: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU),
    "throttle_reasons": lambda card: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)),
}
"""Throttle reasons are NVML's bits: 0x4 is the power cap, 0x20 and 0x40 are heat."""


@lru_cache(maxsize=8)
def _nvml_handle(device: torch.device) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _ask(device: torch.device, query: Query) -> Any:
    """NVML's answer; None for what it does not say, on an old card or in a container that hides it."""
    try:
        return query(_nvml_handle(device))
    except pynvml.NVMLError:
        return None


def snapshot(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks, power, temperature and throttle reasons at this moment; None for what NVML does not say."""
    taken = {name: _ask(device, query) for name, query in QUERIES.items()}
    return {"name": torch.cuda.get_device_name(device), **taken}
