# SPDX-License-Identifier: Apache-2.0
"""What this machine is and how busy it is: psutil for the machine, NVML for its GPUs.

Two answers, because the broker needs them at different times:

inventory()   what matching needs; stays the same until somebody changes the machine, so that
              `Inventory.fingerprint()` tells whether it must be sent again
readings()    how busy it is now; sent with heartbeats, never part of the fingerprint

Nothing here raises because of a GPU. No library, no driver and no GPU are answers
(`Accelerators.absent` says which); a query that one GPU refuses is a field that is None; a GPU
that is gone keeps its place in the list, with `fault` set.

NVML can block for seconds (a GPU that is falling off its bus, a driver that wakes a sleeping
GPU): call both functions from a thread. They initialise NVML and shut it down again, unless
`nvml_held_open` keeps it: NVML counts its users.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import importlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

# `pynvml`, or an object with the functions of it that are called below. It has no types.
Nvml: TypeAlias = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """Something that is sent or printed as a whole."""

    def to_json(self) -> str:
        """Give compact JSON, keys sorted: equal values give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The computer and its operating system.

    Attributes:
        id_hash: A keyed hash of /etc/machine-id, which machine-id(5) asks to keep confidential;
            None where the file is missing or empty. Copies of one disk image share it.
    """

    hostname: str
    os: str
    kernel: str
    arch: str
    python: str
    id_hash: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processors: cores, hardware threads (`logical`), and what this process may use of them.

    `usable` honours affinity and cgroup v2's `cpu.max`, which may be a fraction. `physical` is
    None where the kernel does not tell.
    """

    model: str
    physical: int | None
    logical: int
    usable: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MigInstance:
    """One slice of a GPU in MIG mode, with a UUID of its own; `profile` is like ``1g.10gb``."""

    uuid: str | None
    profile: str | None
    memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as it was built and configured.

    Attributes:
        index: NVML's number (PCI order); it may change when the machine boots, the UUID does not.
        memory: Bytes; None also where the GPU shares the machine's memory.
        compute_capability: For example ``9.0``.
        mig: Whether MIG mode is on; None where the GPU does not have it.
        fault: Why the GPU cannot be used, in NVML's words; None for a sound one.
    """

    index: int
    uuid: str | None
    name: str | None
    memory: int | None
    compute_capability: str | None
    mig: bool | None
    instances: tuple[MigInstance, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerators:
    """The GPUs, or the reason why there are none.

    Attributes:
        absent: The reason; None when there is at least one GPU, sound or not.
        cuda: The newest CUDA version that the driver can run, for example ``12.4``.
    """

    absent: str | None = None
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory(_Told):
    """What matching needs. `memory` is in bytes: the machine's, or less by cgroup v2."""

    machine: Machine
    cpu: Cpu
    memory: int
    accelerators: Accelerators

    def fingerprint(self) -> str:
        """Give the SHA-256, in hex, of the whole inventory."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that holds `path`; bytes. `free` is what a normal user may still write."""

    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface, loopback left out; `speed` is in Mbit/s, None where unknown."""

    name: str
    up: bool
    speed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that computes on a GPU; `memory` in bytes, None where the driver hides it."""

    pid: int
    memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigReading:
    """How busy one MIG instance is; bytes."""

    uuid: str | None
    memory_used: int | None
    processes: tuple[GpuProcess, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """How busy one GPU is; a field is None where the GPU does not say.

    Attributes:
        memory_used: Bytes.
        utilisation: Percent of the last sample period in which a kernel ran; unknown in MIG mode.
        temperature: Degrees Celsius.
        power: Watts.
        fault: As in `Gpu`.
    """

    index: int
    uuid: str | None
    memory_used: int | None
    utilisation: int | None
    temperature: int | None
    power: float | None
    processes: tuple[GpuProcess, ...] | None
    instances: tuple[MigReading, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings(_Told):
    """How busy the machine is at one moment.

    Attributes:
        boot_id: Changes with every boot of the kernel; a process id means nothing without it.
        load: The 1, 5 and 15 minute load averages.
        cpu_busy_s: Seconds that all processors together have worked since boot.
        cpu_total_s: Seconds that they have existed since boot.
        cpu_percent: 0 to 100 between an earlier reading and this one; None without one.
        memory_available: Bytes that tasks can still have without swapping.
        memory_used: All the others.
    """

    boot_id: str | None
    load: tuple[float, float, float]
    cpu_busy_s: float
    cpu_total_s: float
    cpu_percent: float | None
    memory_available: int
    memory_used: int
    disk: Disk
    interfaces: tuple[Interface, ...]
    gpus: tuple[GpuReading, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware(_Told):
    """Everything at once, for `fedml-agent hardware` and for enrolment."""

    inventory: Inventory
    readings: Readings


def read(
    *,
    disk: Path = Path("/"),
    since: Readings | None = None,
    nvml: Nvml | None = None,
    root: Path = Path("/"),
) -> Hardware:
    """Read inventory and readings together; the arguments are those of the two functions."""
    with nvml_held_open(nvml):
        return Hardware(
            inventory=inventory(nvml=nvml, root=root),
            readings=readings(disk=disk, since=since, nvml=nvml, root=root),
        )


def inventory(*, nvml: Nvml | None = None, root: Path = Path("/")) -> Inventory:
    """Read what matching needs to know of this machine.

    Args:
        nvml: In place of `pynvml`; tests give a fake.
        root: The folder under which /proc, /sys and /etc are read; tests give their own.
    """
    import psutil  # 2.6 MB, and not needed by the agent's other commands

    limits = _cgroup_limits(root)
    logical = psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    total = psutil.virtual_memory().total
    uname = os.uname()
    return Inventory(
        machine=Machine(
            hostname=uname.nodename,
            os=_os_name(),
            kernel=uname.release,
            arch=uname.machine,
            python=platform.python_version(),
            id_hash=_machine_id_hash(root),
        ),
        cpu=Cpu(
            model=_cpu_model(root) or uname.machine,
            physical=psutil.cpu_count(logical=False),
            logical=logical,
            usable=min(float(allowed), limits.cpus or float(allowed)),
        ),
        memory=min(total, limits.memory or total),
        accelerators=_accelerators(nvml),
    )


def readings(
    *,
    disk: Path = Path("/"),
    since: Readings | None = None,
    nvml: Nvml | None = None,
    root: Path = Path("/"),
) -> Readings:
    """Read how busy this machine is.

    Args:
        disk: A path, existing or not yet, on the file system that tasks will fill.
        since: An earlier reading, from which `cpu_percent` is counted.
        nvml, root: As for `inventory`.
    """
    import psutil

    times = psutil.cpu_times()
    # Guest time is part of user time already; waiting for a disk is not work.
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    total = busy + times.idle + times.iowait
    percent = None
    if since is not None and total > since.cpu_total_s:
        percent = 100 * (busy - since.cpu_busy_s) / (total - since.cpu_total_s)
        percent = round(min(max(percent, 0.0), 100.0), 1)
    memory, limits = psutil.virtual_memory(), _cgroup_limits(root)
    available, in_cgroup = memory.available, limits.memory_available
    available = available if in_cgroup is None else min(available, in_cgroup)
    return Readings(
        boot_id=boot_id(root),
        load=os.getloadavg(),
        cpu_busy_s=busy,
        cpu_total_s=total,
        cpu_percent=percent,
        memory_available=available,
        memory_used=max(min(memory.total, limits.memory or memory.total) - available, 0),
        disk=_disk(disk),
        interfaces=tuple(
            Interface(name=name, up=found.isup, speed=found.speed or None)
            for name, found in sorted(psutil.net_if_stats().items())
            if name != "lo"
        ),
        gpus=_gpu_readings(nvml),
    )


def nvml_of_this_process() -> Nvml | None:
    """Give `pynvml`, None without the driver's library; the one door through which NVML comes in.

    `FEDML_NVML_MODULE` names another module with the same functions: that is how a test gives a
    whole agent process the GPUs it likes.
    """
    module = os.environ.get("FEDML_NVML_MODULE", "pynvml")
    if module == "pynvml":
        import ctypes

        try:  # Asked first because importing pynvml costs 5 MB, only to say "not found" then.
            ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return None
    return importlib.import_module(module)


def boot_id(root: Path = Path("/")) -> str | None:
    """Give the kernel's random id of the current boot, None where it has none."""
    return _text(root / "proc/sys/kernel/random/boot_id") or None


@contextlib.contextmanager
def nvml_held_open(nvml: Nvml | None = None) -> Iterator[None]:
    """Keep NVML initialised for the length of a block; no effect where there is none.

    Worth it in a daemon that reads often: where persistence mode is off, the driver puts a GPU to
    sleep when its last user leaves, and each new user waits until it has woken (about a second).
    """
    with _nvml(nvml):
        yield


def _text(path: Path) -> str:
    """Give a small file's text without outer blanks; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return os.uname().sysname


def _machine_id_hash(root: Path) -> str | None:
    machine_id = _text(root / "etc/machine-id")
    if machine_id in {"", "uninitialized"}:
        return None
    return hmac.digest(machine_id.encode(), b"fedml-agent", "sha256").hex()


def _cpu_model(root: Path) -> str | None:
    found: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip().lower(), value.strip())
    # x86, POWER, boards with an ARM processor
    return found.get("model name") or found.get("cpu") or found.get("model") or None


def _disk(path: Path) -> Disk:
    place = path.absolute()
    while not os.access(place, os.F_OK):
        place = place.parent
    found = os.statvfs(place)
    block = found.f_frsize
    return Disk(path=str(path), total=found.f_blocks * block, free=found.f_bavail * block)


class _Limits(NamedTuple):
    cpus: float | None = None
    memory: int | None = None
    memory_available: int | None = None


def _cgroup_limits(root: Path) -> _Limits:
    """Give the tightest cgroup v2 limits on this process: its own group's and all above it.

    Seen from inside a container, the group is `/` and its limits stand in the root folder.
    """
    top = root / "sys/fs/cgroup"
    lines = _text(root / "proc/self/cgroup").splitlines()
    name = next((line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    if name is None:
        return _Limits()
    group = top / name
    if ".." in group.parts:  # outside of what this mount shows
        group = top
    levels = [group]
    while levels[-1] != top:
        levels.append(levels[-1].parent)
    cpus, memory, available = [], [], []
    for level in levels:
        quota, _, period = _text(level / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            cpus.append(int(quota) / int(period))
        limit = _text(level / "memory.max")
        if limit.isdigit():
            memory.append(int(limit))
            available.append(max(int(limit) - _working_set(level), 0))
    return _Limits(min(cpus, default=None), min(memory, default=None), min(available, default=None))


def _working_set(group: Path) -> int:
    """Give the bytes that a group cannot give back: as Kubernetes counts, less `inactive_file`."""
    used = _text(group / "memory.current")
    lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
    cache = next((int(line[1]) for line in lines if line[0] == "inactive_file"), 0)
    return max(int(used) - cache, 0) if used.isdigit() else 0


@contextlib.contextmanager
def _nvml(given: Nvml | None) -> Iterator[tuple[Nvml | None, str]]:
    """Initialise NVML for the length of a block: gives it, or None and the reason."""
    nvml = given if given is not None else nvml_of_this_process()
    if nvml is None:
        yield None, "no NVIDIA driver: its library libnvidia-ml.so.1 is not installed"
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield None, _why_not(nvml, error)
        return
    try:
        yield nvml, ""
    finally:
        # Shutting down a driver that has just gone fails; there is nothing left to give back.
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _why_not(nvml: Nvml, error: Exception) -> str:
    hints = {
        nvml.NVML_ERROR_LIBRARY_NOT_FOUND: "install the NVIDIA driver to use a GPU",
        nvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the nvidia kernel module, or reboot",
        nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was upgraded while loaded: reboot",
        nvml.NVML_ERROR_NO_PERMISSION: "let the agent's user read and write /dev/nvidia*",
    }
    hint = hints.get(getattr(error, "value", None))
    return f"NVML does not start: {error}" + (f"; {hint}" if hint else "")


class _Handle:
    """An NVML handle that answers None instead of raising, and remembers that its GPU is gone."""

    def __init__(self, nvml: Nvml, handle: object, fault: str | None = None) -> None:
        self._nvml = nvml
        self._handle = handle
        self.fault = fault

    def ask(self, function: Callable[..., Any], *args: object) -> Any | None:
        # A GPU that is gone is not asked again: each question may take seconds to fail.
        if self.fault is not None:
            return None
        nvml = self._nvml
        try:
            return function(self._handle, *args)
        except nvml.NVMLError as error:
            gone = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
            if error.value in gone or function == nvml.nvmlDeviceGetUUID:
                self.fault = str(error)
        except UnicodeDecodeError:  # pynvml decodes what a damaged infoROM says
            pass
        return None

    def field(self, name: str, function: Callable[..., Any], *args: object) -> Any | None:
        return getattr(self.ask(function, *args), name, None)

    def mig(self) -> bool | None:
        modes = self.ask(self._nvml.nvmlDeviceGetMigMode)  # now, and after the next reset
        return None if modes is None else modes[0] == self._nvml.NVML_DEVICE_MIG_ENABLE

    def instances(self) -> Iterator["_Handle"]:
        """Go through the MIG instances; those places that hold none are passed over."""
        for place in range(self.ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount) or 0):
            handle = self.ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, place)
            if handle is not None:
                yield _Handle(self._nvml, handle)

    def processes(self) -> tuple[GpuProcess, ...] | None:
        found = self.ask(self._nvml.nvmlDeviceGetComputeRunningProcesses)
        if found is None:
            return None
        return tuple(GpuProcess(pid=one.pid, memory=one.usedGpuMemory) for one in found)


def _handles(nvml: Nvml) -> Iterator[tuple[int, _Handle]]:
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield index, _Handle(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        except nvml.NVMLError as error:
            yield index, _Handle(nvml, None, fault=str(error))


def _accelerators(given: Nvml | None) -> Accelerators:
    with _nvml(given) as (nvml, absent):
        if nvml is None:
            return Accelerators(absent=absent)
        try:
            gpus = tuple(_gpu(nvml, index, handle) for index, handle in _handles(nvml))
        except nvml.NVMLError as error:  # the count itself
            return Accelerators(absent=_why_not(nvml, error))
        driver = cuda = None
        with contextlib.suppress(nvml.NVMLError):
            driver = nvml.nvmlSystemGetDriverVersion()
            number = nvml.nvmlSystemGetCudaDriverVersion_v2()
            cuda = f"{number // 1000}.{number % 1000 // 10}"
        return Accelerators(
            absent=None if gpus else "the NVIDIA driver is loaded, but finds no GPU",
            driver=driver,
            cuda=cuda,
            gpus=gpus,
        )


def _gpu(nvml: Nvml, index: int, gpu: _Handle) -> Gpu:
    uuid = gpu.ask(nvml.nvmlDeviceGetUUID)
    capability = gpu.ask(nvml.nvmlDeviceGetCudaComputeCapability)
    mig = gpu.mig()
    return Gpu(
        index=index,
        uuid=uuid,
        name=gpu.ask(nvml.nvmlDeviceGetName),
        memory=gpu.field("total", nvml.nvmlDeviceGetMemoryInfo),
        compute_capability=None if capability is None else "{}.{}".format(*capability),
        mig=mig,
        instances=tuple(_mig_instance(nvml, one) for one in gpu.instances()) if mig else (),
        fault=gpu.fault,
    )


def _mig_instance(nvml: Nvml, instance: _Handle) -> MigInstance:
    # "NVIDIA A100-SXM4-40GB MIG 1g.5gb": NVML names the profile nowhere else.
    _, _, profile = (instance.ask(nvml.nvmlDeviceGetName) or "").rpartition(" MIG ")
    return MigInstance(
        uuid=instance.ask(nvml.nvmlDeviceGetUUID),
        profile=profile or None,
        memory=instance.field("total", nvml.nvmlDeviceGetMemoryInfo),
    )


def _gpu_readings(given: Nvml | None) -> tuple[GpuReading, ...]:
    with _nvml(given) as (nvml, _):
        if nvml is None:
            return ()
        try:
            return tuple(_gpu_reading(nvml, index, handle) for index, handle in _handles(nvml))
        except nvml.NVMLError:  # the count itself; the inventory says why
            return ()


def _gpu_reading(nvml: Nvml, index: int, gpu: _Handle) -> GpuReading:
    uuid = gpu.ask(nvml.nvmlDeviceGetUUID)
    milliwatts = gpu.ask(nvml.nvmlDeviceGetPowerUsage)
    instances = gpu.instances() if gpu.mig() else ()
    return GpuReading(
        index=index,
        uuid=uuid,
        memory_used=gpu.field("used", nvml.nvmlDeviceGetMemoryInfo),
        utilisation=gpu.field("gpu", nvml.nvmlDeviceGetUtilizationRates),
        temperature=gpu.ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        power=None if milliwatts is None else milliwatts / 1000,
        processes=gpu.processes(),
        instances=tuple(_mig_reading(nvml, one) for one in instances),
        fault=gpu.fault,
    )


def _mig_reading(nvml: Nvml, instance: _Handle) -> MigReading:
    return MigReading(
        uuid=instance.ask(nvml.nvmlDeviceGetUUID),
        memory_used=instance.field("used", nvml.nvmlDeviceGetMemoryInfo),
        processes=instance.processes(),
    )
