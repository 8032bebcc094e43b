# SPDX-License-Identifier: Apache-2.0
"""A fake NVML: the GPUs that a test needs, on a machine that has none.

`FakeNvml` has the functions, constants and errors of `pynvml` that `fedml_agent.hardware` uses, and
is handed to it in the place of the module::

    nvml = FakeNvml([FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2", memory=24 * GIB)])
    hardware.read(nvml=nvml)

What can be scripted
    FakeGpu(...)               name, memory, compute capability, temperature, processes, ...
    FakeGpu(mig=[FakeMig()])   MIG mode is on, with these instances; `mig=[]`: on, and none cut;
                               `mig=None` (default): this model has no MIG
    FakeGpu(fails={...})       one function of this GPU fails, always: {"nvmlDeviceGetPowerUsage":
                               "NOT_SUPPORTED"}; the name of an error is that of pynvml's constant
                               without NVML_ERROR_
    FakeGpu(lost=True)         every function of this GPU fails with GPU_IS_LOST; `lose(index)` does
                               it later
    FakeNvml(fails={...})      functions that ask no GPU: {"nvmlInit": "DRIVER_NOT_LOADED"}

What can be seen afterwards
    nvml.calls                 (function, GPU index or None), in order; the last 10,000
    nvml.users                 how many nvmlInit have no nvmlShutdown yet; 0 when all is given back

It is as strict as the real one: outside of nvmlInit and nvmlShutdown all fails as UNINITIALIZED.

For a whole agent process, write the same words as JSON and start it with `environment(file)`::

    {"driver": "550.54.15", "cuda": 12040, "gpus": [{"uuid": "GPU-1", "mig": [{"uuid": "MIG-1"}]}]}

The process then takes this module for pynvml (`FEDML_NVML_MODULE`) and the file named by
`FEDML_FAKE_NVML` for its GPUs. The file is read again at each nvmlInit: rewrite it, and a GPU is
lost, or back, in the running agent.
"""

import dataclasses
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30

ERRORS = {
    "UNINITIALIZED": (1, "Uninitialized"),
    "INVALID_ARGUMENT": (2, "Invalid Argument"),
    "NOT_SUPPORTED": (3, "Not Supported"),
    "NO_PERMISSION": (4, "Insufficient Permissions"),
    "NOT_FOUND": (6, "Not Found"),
    "DRIVER_NOT_LOADED": (9, "Driver Not Loaded"),
    "LIBRARY_NOT_FOUND": (12, "NVML Shared Library Not Found"),
    "FUNCTION_NOT_FOUND": (13, "Function Not Found"),
    "GPU_IS_LOST": (15, "GPU is lost"),
    "RESET_REQUIRED": (16, "GPU requires restart"),
    "LIB_RM_VERSION_MISMATCH": (18, "RM has detected an NVML/RM version mismatch."),
    "UNKNOWN": (999, "Unknown Error"),
}


class NVMLError(Exception):
    """As in pynvml: `value` is the code, the text is NVML's."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value

    def __str__(self) -> str:
        return next(text for value, text in ERRORS.values() if value == self.value)


@dataclass(kw_only=True)
class FakeMig:
    """One MIG instance; memory in bytes, processes as (pid, bytes or None)."""

    uuid: str = "MIG-0"
    profile: str = "1g.10gb"
    memory: int = 10 * GIB
    used: int = 0
    processes: Sequence[tuple[int, int | None]] = ()


@dataclass(kw_only=True)
class FakeGpu:
    """One GPU; memory in bytes, power in watts, processes as (pid, bytes or None)."""

    uuid: str = "GPU-0"
    name: str = "NVIDIA H100 80GB HBM3"
    memory: int = 80 * GIB
    used: int = 0
    capability: tuple[int, int] = (9, 0)
    utilisation: int = 0
    temperature: int = 30
    power: float = 70.0
    processes: Sequence[tuple[int, int | None]] = ()
    mig: Sequence[FakeMig] | None = None
    fails: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False


@dataclass(frozen=True)
class _Handle:
    gpu: int
    mig: int | None = None


class FakeNvml:
    """A module-like object; see the module's text."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_RESET_REQUIRED = 16
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    def __init__(
        self,
        gpus: Sequence[FakeGpu] = (),
        *,
        driver: str = "550.54.15",
        cuda: int = 12040,
        fails: Mapping[str, str] | None = None,
    ) -> None:
        self.gpus = list(gpus)
        self.driver = driver
        self.cuda = cuda
        self.fails = dict(fails or {})
        self.calls: deque[tuple[str, int | None]] = deque(maxlen=10_000)
        self.users = 0
        self._file: Path | None = None

    @classmethod
    def from_json(cls, file: Path) -> "FakeNvml":
        """Take the GPUs from a file, now and at each nvmlInit."""
        nvml = cls()
        nvml._file = file
        nvml._read_file()
        return nvml

    def _read_file(self) -> None:
        if self._file is None:
            return
        script = json.loads(self._file.read_text(encoding="utf-8"))
        gpus = script.pop("gpus", [])
        for gpu in gpus:
            if gpu.get("mig") is not None:
                gpu["mig"] = [FakeMig(**instance) for instance in gpu["mig"]]
        fresh = FakeNvml([FakeGpu(**gpu) for gpu in gpus], **script)
        self.gpus, self.driver, self.cuda = fresh.gpus, fresh.driver, fresh.cuda
        self.fails = fresh.fails

    def lose(self, index: int) -> None:
        """From now on every question to this GPU is answered with GPU_IS_LOST."""
        self.gpus[index] = dataclasses.replace(self.gpus[index], lost=True)

    def _called(self, function: str) -> None:
        self.calls.append((function, None))
        if self.users == 0 and function != "nvmlInit":
            _fail("UNINITIALIZED")
        if function in self.fails:
            _fail(self.fails[function])

    def _asked(self, function: str, handle: _Handle) -> FakeGpu:
        self.calls.append((function, handle.gpu))
        if self.users == 0:
            _fail("UNINITIALIZED")
        gpu = self.gpus[handle.gpu]
        if gpu.lost:
            _fail("GPU_IS_LOST")
        if function in gpu.fails:
            _fail(gpu.fails[function])
        return gpu

    def _either(self, function: str, handle: _Handle) -> FakeGpu | FakeMig:
        gpu = self._asked(function, handle)
        if handle.mig is None:
            return gpu
        assert gpu.mig is not None
        return gpu.mig[handle.mig]

    def nvmlInit(self) -> None:
        self._read_file()
        self._called("nvmlInit")
        self.users += 1

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")
        self.users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        self._called("nvmlSystemGetDriverVersion")
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        self._called("nvmlSystemGetCudaDriverVersion_v2")
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        self._called("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Handle:
        handle = _Handle(index)
        self._asked("nvmlDeviceGetHandleByIndex", handle)
        return handle

    def nvmlDeviceGetUUID(self, handle: _Handle) -> str:
        return self._either("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetName(self, handle: _Handle) -> str:
        gpu = self._asked("nvmlDeviceGetName", handle)
        part = self._either("nvmlDeviceGetName", handle)
        return f"{gpu.name} MIG {part.profile}" if isinstance(part, FakeMig) else gpu.name

    def nvmlDeviceGetMemoryInfo(self, handle: _Handle, version: int | None = None) -> Any:
        part = self._either("nvmlDeviceGetMemoryInfo", handle)
        return SimpleNamespace(total=part.memory, used=part.used, free=part.memory - part.used)

    def nvmlDeviceGetCudaComputeCapability(self, handle: _Handle) -> tuple[int, int]:
        gpu = self._asked("nvmlDeviceGetCudaComputeCapability", handle)
        return gpu.capability

    def nvmlDeviceGetMigMode(self, device: _Handle) -> list[int]:
        if self._asked("nvmlDeviceGetMigMode", device).mig is None:
            _fail("NOT_SUPPORTED")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: _Handle) -> int:
        gpu = self._asked("nvmlDeviceGetMaxMigDeviceCount", device)
        return 0 if gpu.mig is None else 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: _Handle, index: int) -> _Handle:
        gpu = self._asked("nvmlDeviceGetMigDeviceHandleByIndex", device)
        if gpu.mig is None or index >= len(gpu.mig):
            _fail("NOT_FOUND")
        return _Handle(device.gpu, index)

    def nvmlDeviceGetUtilizationRates(self, handle: _Handle) -> Any:
        gpu = self._asked("nvmlDeviceGetUtilizationRates", handle)
        if gpu.mig is not None:
            _fail("NOT_SUPPORTED")
        return SimpleNamespace(gpu=gpu.utilisation, memory=0)

    def nvmlDeviceGetTemperature(self, handle: _Handle, sensor: int) -> int:
        return self._asked("nvmlDeviceGetTemperature", handle).temperature

    def nvmlDeviceGetPowerUsage(self, handle: _Handle) -> int:
        return round(self._asked("nvmlDeviceGetPowerUsage", handle).power * 1000)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: _Handle) -> list[Any]:
        part = self._either("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in part.processes]


def _fail(error: str) -> None:
    raise NVMLError(ERRORS[error][0])


def environment(file: Path) -> dict[str, str]:
    """Give the variables with which a process finds the GPUs that `file` describes."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        "FEDML_NVML_MODULE": "tests.fakes.nvml",
        "FEDML_FAKE_NVML": str(file),
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }


_of_this_process: FakeNvml | None = None


def __getattr__(name: str) -> Any:
    """Stand in for the module `pynvml` itself (PEP 562), in a process of `environment`."""
    global _of_this_process
    if not name.startswith("nvml") and not name.startswith("NVML_"):
        raise AttributeError(name)
    if _of_this_process is None:
        _of_this_process = FakeNvml.from_json(Path(os.environ["FEDML_FAKE_NVML"]))
    return getattr(_of_this_process, name)
