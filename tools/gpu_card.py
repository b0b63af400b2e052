"""What a GPU says about itself: its sizes, its clocks and its energy. Nothing of it is ever set."""

from functools import lru_cache
from typing import Any, NamedTuple

import pynvml
import torch


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: of the model.
        multiprocessors: their number.
        l2_bytes: of its L2 cache.
        shared_bytes: the most shared memory of a program.
        capability: compute capability times ten.
    """

    name: str
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int
    capability: int


def read_card(device: torch.device) -> Card:
    """Ask a CUDA device."""
    gpu = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block)
    return Card(gpu.name, gpu.multi_processor_count, gpu.L2_cache_size, shared_bytes, 10 * gpu.major + gpu.minor)


QUERIES = {  # by name, NVML's query with its arguments, and the unit that it counts in
    "sm_mhz": ("ClockInfo", (pynvml.NVML_CLOCK_SM,), 1),
    "sm_mhz_max": ("MaxClockInfo", (pynvml.NVML_CLOCK_SM,), 1),
    "memory_mhz": ("ClockInfo", (pynvml.NVML_CLOCK_MEM,), 1),
    "memory_mhz_max": ("MaxClockInfo", (pynvml.NVML_CLOCK_MEM,), 1),
    "power_w": ("PowerUsage", (), 1e-3),
    "power_limit_w": ("EnforcedPowerLimit", (), 1e-3),
    "temperature_c": ("Temperature", (pynvml.NVML_TEMPERATURE_GPU,), 1),
}

REASON = "nvmlClocksEventReason"
THROTTLE_REASONS = {
    getattr(pynvml, name): name.removeprefix(REASON)
    for name in vars(pynvml)
    if name.startswith(REASON) and not name.endswith(("All", "None"))
}
"""NVML's bits, by its own names."""


def throttle_reasons(bits: int) -> list[str]:
    """The names of NVML's bits; one without a name as its number."""
    set_bits = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in set_bits]


@lru_cache(maxsize=8)
def _nvml_handle(device: torch.device) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def snapshot(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks, power, temperature and throttle reasons at this moment; None for what NVML does not say."""
    taken: dict[str, Any] = {"name": torch.cuda.get_device_name(device)}
    try:
        handle = _nvml_handle(device)
    except pynvml.NVMLError as error:
        return taken | {"nvml": str(error)}

    def read(query: str, *arguments: Any) -> Any:
        try:
            return getattr(pynvml, f"nvmlDeviceGet{query}")(handle, *arguments)
        except pynvml.NVMLError:
            return None

    taken["driver"] = pynvml.nvmlSystemGetDriverVersion()
    for name, (query, arguments, unit) in QUERIES.items():
        value = read(query, *arguments)
        taken[name] = None if value is None else value * unit
    reasons = read("CurrentClocksThrottleReasons")
    return taken | {"throttle_reasons": None if reasons is None else throttle_reasons(reasons)}


class EnergyMeter:
    """Energy that a card takes, from NVML's counter. It moves a few times a second, so several decodes are added up.

    Args:
        device: a GPU; None measures nothing.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._handle: Any = None
        self._millijoules, self._tokens = 0, 0
        if device is None:
            return
        try:
            self._handle = _nvml_handle(device)
            self._read()
        except pynvml.NVMLError:  # an old card, or a container that hides it
            self._handle = None

    def _read(self) -> int:
        return 0 if self._handle is None else int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def begin(self, tokens: int) -> None:
        """Count from here, where ``tokens`` are there already."""
        self._from = self._read(), tokens

    def end(self, tokens: int) -> None:
        """Count to here."""
        millijoules, before = self._from
        self._millijoules += self._read() - millijoules
        self._tokens += tokens - before

    @property
    def joules_per_token(self) -> float | None:
        """Of all between the beginnings and the ends; None where the card does not say."""
        return self._millijoules / 1000 / self._tokens if self._millijoules and self._tokens else None
