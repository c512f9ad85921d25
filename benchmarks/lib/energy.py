"""Energy that the GPU's own counter says it used, through NVML (package nvidia-ml-py)."""

from __future__ import annotations

import torch


class EnergyMeter:
    """Joules since the driver was loaded; differences of two readings are what a region used.

    The counter moves every few tens of milliseconds, so regions should last a second or more.
    """

    def __init__(self, handle: object) -> None:
        self._handle = handle

    @classmethod
    def of(cls, device: torch.device | str) -> EnergyMeter | None:
        """The meter of a CUDA device, or None on other devices and where NVML or its counter cannot be used."""
        device = torch.device(device)
        if device.type != "cuda":
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None
        return cls(handle)

    def joules(self) -> float:
        """The counter now [J]."""
        import pynvml

        return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) * 1e-3
