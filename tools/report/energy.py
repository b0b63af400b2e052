"""Energy that a card takes for the steps of a decode, from its own counter."""

import pynvml
import torch


class EnergyMeter:
    """Reads NVML's counter, which moves a few times a second: several decodes are added up.

    Args:
        device: a GPU; None measures nothing.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._handle = None
        self._millijoules, self._tokens = 0, 0
        if device is None:
            return
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read()
        except pynvml.NVMLError:  # an old card, or a container that hides it
            self._handle = None

    def _read(self) -> int:
        if self._handle is None:
            return 0
        millijoules: int = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return millijoules

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
        if self._handle is None or not self._millijoules or not self._tokens:
            return None
        return self._millijoules / 1000 / self._tokens
