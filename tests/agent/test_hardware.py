# SPDX-License-Identifier: Apache-2.0
"""The hardware reader: on this machine as it is, and on machines with scripted GPUs."""

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pynvml
import pytest

from fedml_agent import hardware
from tests.fakes.nvml import ERRORS, GIB, FakeGpu, FakeMig, FakeNvml, environment


def gpu_of(nvml: FakeNvml, index: int = 0) -> hardware.Gpu:
    return hardware.inventory(nvml=nvml).accelerators.gpus[index]


def reading_of(nvml: FakeNvml, index: int = 0) -> hardware.GpuReading:
    return hardware.readings(nvml=nvml).gpus[index]


# ---- this machine


def test_this_machine_is_described_as_its_kernel_describes_it() -> None:
    found = hardware.inventory(nvml=FakeNvml())

    assert found.machine.hostname == os.uname().nodename
    assert found.machine.kernel == os.uname().release
    assert found.cpu.logical == os.cpu_count()
    assert 0 < found.cpu.usable <= len(os.sched_getaffinity(0))
    assert 0 < found.memory <= psutil.virtual_memory().total


def test_readings_of_this_machine_are_plausible(tmp_path: Path) -> None:
    found = hardware.readings(disk=tmp_path, nvml=FakeNvml())

    assert found.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert 0 < found.memory_available <= psutil.virtual_memory().total
    assert 0 < found.disk.free <= found.disk.total
    times = psutil.cpu_times()
    assert found.cpu_total_s - found.cpu_busy_s == pytest.approx(times.idle + times.iowait, abs=5)
    assert found.cpu_busy_s == pytest.approx(sum(times[:8]) - times.idle - times.iowait, abs=5)
    assert {one.name for one in found.interfaces} == set(psutil.net_if_stats()) - {"lo"}


def test_everything_is_json_and_comes_back_equal() -> None:
    nvml = FakeNvml([FakeGpu(mig=[FakeMig()], processes=[(7, None)])])
    found = hardware.read(nvml=nvml)
    told = json.loads(found.to_json())
    assert told == json.loads(json.dumps(dataclasses.asdict(found)))
    assert told["inventory"]["accelerators"]["gpus"][0]["instances"][0]["profile"] == "1g.10gb"


def test_processor_percent_is_counted_from_an_earlier_reading() -> None:
    first = hardware.readings(nvml=FakeNvml())
    assert first.cpu_percent is None

    earlier = dataclasses.replace(
        first, cpu_busy_s=first.cpu_busy_s - 30, cpu_total_s=first.cpu_total_s - 120
    )
    later = hardware.readings(nvml=FakeNvml(), since=earlier)
    share = (later.cpu_busy_s - earlier.cpu_busy_s) / (later.cpu_total_s - earlier.cpu_total_s)
    assert later.cpu_percent == round(100 * share, 1)
    assert 20 < later.cpu_percent < 35


def test_a_clock_of_the_processors_that_ran_backwards_gives_no_percent() -> None:
    first = hardware.readings(nvml=FakeNvml())
    ahead = dataclasses.replace(first, cpu_total_s=first.cpu_total_s + 1e6)
    assert hardware.readings(nvml=FakeNvml(), since=ahead).cpu_percent is None


def test_a_folder_that_is_not_there_yet_counts_as_its_parents_disk(tmp_path: Path) -> None:
    there = hardware.readings(disk=tmp_path, nvml=FakeNvml()).disk
    later = hardware.readings(disk=tmp_path / "a" / "b", nvml=FakeNvml()).disk
    assert later.total == there.total
    assert later.path == str(tmp_path / "a" / "b")


def test_the_fingerprint_holds_while_only_readings_change() -> None:
    nvml = FakeNvml([FakeGpu()])
    before = hardware.inventory(nvml=nvml).fingerprint()
    nvml.gpus[0] = FakeGpu(used=GIB, utilisation=99, temperature=80, power=600, processes=[(1, 2)])
    assert hardware.inventory(nvml=nvml).fingerprint() == before


@pytest.mark.parametrize(
    "changed",
    [
        [],
        [FakeGpu(), FakeGpu(uuid="GPU-1")],
        [FakeGpu(uuid="GPU-9")],
        [FakeGpu(memory=GIB)],
        [FakeGpu(mig=[])],
        [FakeGpu(mig=[FakeMig()])],
        [FakeGpu(lost=True)],
    ],
)
def test_the_fingerprint_changes_with_the_gpus(changed: list[FakeGpu]) -> None:
    before = hardware.inventory(nvml=FakeNvml([FakeGpu()])).fingerprint()
    assert hardware.inventory(nvml=FakeNvml(changed)).fingerprint() != before


# ---- machine and container files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine's /proc, /sys and /etc, as far as they are read."""
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "proc/sys/kernel/random/boot_id", "b00t\n")
    write(tmp_path, "etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_machine_id_is_never_shown(root: Path) -> None:
    found = hardware.inventory(nvml=FakeNvml(), root=root)
    assert found.machine.id_hash is not None
    assert "0123456789abcdef" not in found.to_json()
    assert found.machine.id_hash == hardware.inventory(nvml=FakeNvml(), root=root).machine.id_hash

    write(root, "etc/machine-id", "f" * 32 + "\n")
    other = hardware.inventory(nvml=FakeNvml(), root=root)
    assert other.machine.id_hash != found.machine.id_hash


@pytest.mark.parametrize("text", [None, "", "uninitialized\n"])
def test_a_machine_without_an_id_says_so(root: Path, text: str | None) -> None:
    if text is None:
        (root / "etc/machine-id").unlink()
    else:
        write(root, "etc/machine-id", text)
    assert hardware.inventory(nvml=FakeNvml(), root=root).machine.id_hash is None


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        ("processor : 0\nmodel : 1\nmodel name : AMD EPYC 9654\n", "AMD EPYC 9654"),
        (
            "processor : 0\nBogoMIPS : 54\nModel : Raspberry Pi 5 Model B\n",
            "Raspberry Pi 5 Model B",
        ),
        ("processor : 0\nBogoMIPS : 54\n", os.uname().machine),
    ],
)
def test_the_processor_has_a_name_on_every_architecture(
    root: Path, cpuinfo: str, model: str
) -> None:
    write(root, "proc/cpuinfo", cpuinfo)
    assert hardware.inventory(nvml=FakeNvml(), root=root).cpu.model == model


def test_a_containers_limits_are_what_tasks_can_have(root: Path) -> None:
    write(root, "sys/fs/cgroup/cpu.max", "50000 100000\n")
    write(root, "sys/fs/cgroup/memory.max", f"{512 << 20}\n")
    write(root, "sys/fs/cgroup/memory.current", f"{300 << 20}\n")
    write(root, "sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {100 << 20}\nfile 2\n")

    found = hardware.read(nvml=FakeNvml(), root=root)
    assert found.inventory.cpu.usable == 0.5
    assert found.inventory.cpu.logical == os.cpu_count()
    assert found.inventory.memory == 512 << 20
    # 300 MiB are used, but the kernel can drop 100 MiB of file pages.
    assert found.readings.memory_available == 312 << 20


def test_the_tightest_level_of_the_hierarchy_counts(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/system.slice/agent.service\n")
    write(root, "sys/fs/cgroup/system.slice/memory.max", f"{256 << 20}\n")
    write(root, "sys/fs/cgroup/system.slice/memory.current", f"{250 << 20}\n")
    write(root, "sys/fs/cgroup/system.slice/agent.service/memory.max", f"{512 << 20}\n")
    write(root, "sys/fs/cgroup/system.slice/agent.service/memory.current", "0\n")
    write(root, "sys/fs/cgroup/system.slice/agent.service/cpu.max", "max 100000\n")

    found = hardware.read(nvml=FakeNvml(), root=root)
    assert found.inventory.memory == 256 << 20
    assert found.readings.memory_available == 6 << 20
    assert found.inventory.cpu.usable == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("group", ["0::/docker/4f0c\n", "0::/../../other\n"])
def test_a_group_seen_by_the_hosts_name_is_the_mounts_top(root: Path, group: str) -> None:
    write(root, "proc/self/cgroup", "12:cpu:/x\n" + group)
    write(root, "sys/fs/cgroup/memory.max", f"{64 << 20}\n")
    assert hardware.inventory(nvml=FakeNvml(), root=root).memory == 64 << 20


@pytest.mark.parametrize("cgroup", [None, "", "1:cpu:/\n4:memory:/agent\n"])
def test_without_cgroup_v2_the_whole_machine_counts(root: Path, cgroup: str | None) -> None:
    write(root, "sys/fs/cgroup/memory.max", "1\n")
    if cgroup is None:
        (root / "proc/self/cgroup").unlink()
    else:
        write(root, "proc/self/cgroup", cgroup)
    found = hardware.inventory(nvml=FakeNvml(), root=root)
    assert found.memory == psutil.virtual_memory().total


def test_affinity_limits_the_usable_processors() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from fedml_agent import hardware; print(hardware.inventory().cpu.usable)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) <= 1.0


# ---- GPUs


def test_a_gpu_is_described_in_full() -> None:
    nvml = FakeNvml(
        [FakeGpu(uuid="GPU-a", used=3 * GIB, utilisation=42, power=123.4, processes=[(9, GIB)])],
        driver="570.1",
        cuda=12080,
    )
    found = hardware.read(nvml=nvml)

    assert found.inventory.accelerators == hardware.Accelerators(
        driver="570.1",
        cuda="12.8",
        gpus=(
            hardware.Gpu(
                index=0,
                uuid="GPU-a",
                name="NVIDIA H100 80GB HBM3",
                memory=80 * GIB,
                compute_capability="9.0",
                mig=None,
            ),
        ),
    )
    assert found.readings.gpus == (
        hardware.GpuReading(
            index=0,
            uuid="GPU-a",
            memory_used=3 * GIB,
            utilisation=42,
            temperature=30,
            power=123.4,
            processes=(hardware.GpuProcess(pid=9, memory=GIB),),
        ),
    )


def test_mig_instances_are_listed_with_their_own_uuid() -> None:
    slices = [
        FakeMig(uuid="MIG-a", profile="1g.10gb", used=GIB, processes=[(5, GIB)]),
        FakeMig(uuid="MIG-b", profile="1c.3g.40gb", memory=40 * GIB),
    ]
    nvml = FakeNvml([FakeGpu(mig=slices), FakeGpu(uuid="GPU-1", mig=[])])

    cut = gpu_of(nvml)
    assert cut.mig is True
    assert cut.instances == (
        hardware.MigInstance(uuid="MIG-a", profile="1g.10gb", memory=10 * GIB),
        hardware.MigInstance(uuid="MIG-b", profile="1c.3g.40gb", memory=40 * GIB),
    )
    assert gpu_of(nvml, 1).mig is True
    assert gpu_of(nvml, 1).instances == ()
    busy = reading_of(nvml)
    assert busy.utilisation is None
    assert [(one.uuid, one.memory_used) for one in busy.instances] == [("MIG-a", GIB), ("MIG-b", 0)]
    assert busy.instances[0].processes == (hardware.GpuProcess(pid=5, memory=GIB),)


@pytest.mark.parametrize(
    "error", ["NOT_SUPPORTED", "NO_PERMISSION", "FUNCTION_NOT_FOUND", "UNKNOWN"]
)
@pytest.mark.parametrize(
    ("function", "empty"),
    [
        ("nvmlDeviceGetName", {"name"}),
        ("nvmlDeviceGetMemoryInfo", {"memory", "memory_used"}),
        ("nvmlDeviceGetCudaComputeCapability", {"compute_capability"}),
        ("nvmlDeviceGetMigMode", {"mig", "instances"}),
        ("nvmlDeviceGetUtilizationRates", {"utilisation"}),
        ("nvmlDeviceGetTemperature", {"temperature"}),
        ("nvmlDeviceGetPowerUsage", {"power"}),
        ("nvmlDeviceGetComputeRunningProcesses", {"processes"}),
    ],
)
def test_a_refused_query_is_one_empty_field(function: str, empty: set[str], error: str) -> None:
    def fields(nvml: FakeNvml, index: int) -> dict[str, object]:
        both = dataclasses.asdict(gpu_of(nvml, index)), dataclasses.asdict(reading_of(nvml, index))
        # Only a GPU in MIG mode has `instances`, only one out of it has `utilisation`.
        return both[0] | both[1]

    sound = FakeNvml([FakeGpu(mig=None), FakeGpu(uuid="GPU-1")])
    if function == "nvmlDeviceGetMigMode":
        sound = FakeNvml([FakeGpu(mig=[]), FakeGpu(uuid="GPU-1")])
    before, neighbour = fields(sound, 0), fields(sound, 1)
    sound.gpus[0] = dataclasses.replace(sound.gpus[0], fails={function: error})
    after = fields(sound, 0)

    assert after["fault"] is None
    assert {name for name, value in after.items() if value is None} - {
        name for name, value in before.items() if value is None
    } == empty - {"instances"}
    assert {name for name in after if after[name] != before[name]} <= empty
    assert fields(sound, 1) == neighbour


def test_a_lost_gpu_keeps_its_place_and_leaves_its_neighbours_alone() -> None:
    nvml = FakeNvml([FakeGpu(uuid="GPU-0"), FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2")])
    nvml.lose(1)

    gpus = hardware.inventory(nvml=nvml).accelerators.gpus
    assert [(one.index, one.uuid, one.fault) for one in gpus] == [
        (0, "GPU-0", None),
        (1, None, "GPU is lost"),
        (2, "GPU-2", None),
    ]
    busy = hardware.readings(nvml=nvml).gpus
    assert [one.fault for one in busy] == [None, "GPU is lost", None]
    assert busy[2].temperature == 30


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("nvmlDeviceGetHandleByIndex", "NO_PERMISSION"),
        ("nvmlDeviceGetUUID", "UNKNOWN"),
        ("nvmlDeviceGetName", "GPU_IS_LOST"),
        ("nvmlDeviceGetMemoryInfo", "RESET_REQUIRED"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(function: str, error: str) -> None:
    nvml = FakeNvml([FakeGpu(fails={function: error})])
    assert gpu_of(nvml).fault == ERRORS[error][1]


def test_a_gpu_that_is_gone_is_not_asked_again() -> None:
    nvml = FakeNvml([FakeGpu(fails={"nvmlDeviceGetUUID": "GPU_IS_LOST"})])
    hardware.inventory(nvml=nvml)
    asked = [function for function, index in nvml.calls if index == 0]
    assert asked == ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"]


@pytest.mark.parametrize(
    "function", ["nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2"]
)
def test_gpus_are_listed_though_the_driver_hides_its_version(function: str) -> None:
    nvml = FakeNvml([FakeGpu()], fails={function: "FUNCTION_NOT_FOUND"})
    found = hardware.inventory(nvml=nvml).accelerators
    assert found.absent is None
    assert found.cuda is None
    assert len(found.gpus) == 1


# ---- no GPUs


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        ("LIBRARY_NOT_FOUND", "install the NVIDIA driver"),
        ("DRIVER_NOT_LOADED", "load the nvidia kernel module"),
        ("LIB_RM_VERSION_MISMATCH", "reboot"),
        ("NO_PERMISSION", "/dev/nvidia"),
        ("UNKNOWN", "Unknown Error"),
    ],
)
@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetCount"])
def test_a_driver_that_does_not_work_is_a_reason_not_an_error(
    function: str, error: str, next_step: str
) -> None:
    nvml = FakeNvml([FakeGpu()], fails={function: error})
    found = hardware.read(nvml=nvml)
    assert found.inventory.accelerators.absent is not None
    assert next_step in found.inventory.accelerators.absent
    assert found.readings.gpus == ()
    assert nvml.users == 0


def test_a_driver_without_a_gpu_is_a_reason() -> None:
    found = hardware.inventory(nvml=FakeNvml()).accelerators
    assert found.absent == "the NVIDIA driver is loaded, but finds no GPU"
    assert found.driver == "550.54.15"


def test_without_the_drivers_library_pynvml_is_not_even_imported() -> None:
    code = """
import ctypes, sys
from fedml_agent import hardware
def nothing(name, *args, **more):
    raise OSError(name)
ctypes.CDLL = nothing
assert hardware.nvml_of_this_process() is None
print(hardware.read().inventory.accelerators.absent, "pynvml" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("libnvidia-ml.so.1 is not installed False")


def test_importing_the_reader_imports_neither_psutil_nor_pynvml() -> None:
    code = (
        "import sys; from fedml_agent import hardware; print({'psutil', 'pynvml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_real_pynvml_can_be_given_on_any_machine() -> None:
    hardware.read(nvml=pynvml)


# ---- NVML is given back


def test_nvml_is_shut_down_after_each_reading() -> None:
    nvml = FakeNvml([FakeGpu(lost=True)])
    hardware.read(nvml=nvml)
    hardware.inventory(nvml=nvml)
    hardware.readings(nvml=nvml)
    assert nvml.users == 0


def test_a_daemon_can_hold_nvml_open_between_readings() -> None:
    nvml = FakeNvml([FakeGpu()])
    with hardware.nvml_held_open(nvml):
        hardware.readings(nvml=nvml)
        hardware.readings(nvml=nvml)
        assert nvml.users == 1
    assert nvml.users == 0


def test_a_driver_that_goes_away_while_held_open_breaks_nothing() -> None:
    nvml = FakeNvml([FakeGpu()])
    with hardware.nvml_held_open(nvml):
        nvml.fails["nvmlShutdown"] = "UNKNOWN"
        nvml.fails["nvmlInit"] = "DRIVER_NOT_LOADED"
        assert hardware.readings(nvml=nvml).gpus == ()


def test_nvml_is_given_back_when_the_block_fails() -> None:
    nvml = FakeNvml([FakeGpu()])
    with pytest.raises(ZeroDivisionError), hardware.nvml_held_open(nvml):
        raise ZeroDivisionError
    assert nvml.users == 0


# ---- the fake is like the real one


def test_the_fake_has_what_the_reader_uses_and_the_real_module_has_it_too() -> None:
    tree = ast.parse(inspect.getsource(hardware))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.lower().startswith("nvml")
    }
    assert len(used) > 20
    fake = FakeNvml()
    for name in sorted(used):
        theirs, ours = getattr(pynvml, name), getattr(fake, name)
        if name.startswith("nvml"):
            real = [*inspect.signature(theirs).parameters]
            assert [*inspect.signature(ours).parameters] == real, name
        elif name.startswith("NVML_"):
            assert ours == theirs, name


@pytest.mark.parametrize("name", ERRORS)
def test_the_fakes_errors_are_the_real_ones(name: str) -> None:
    code = getattr(pynvml, f"NVML_ERROR_{name}")
    assert ERRORS[name] == (code, str(pynvml.NVMLError(code)))


def test_a_whole_process_can_be_given_gpus_and_lose_them(tmp_path: Path) -> None:
    gpus = tmp_path / "gpus.json"
    two = {"gpus": [{"uuid": "GPU-1"}, {"uuid": "GPU-2", "mig": [{"uuid": "MIG-1"}]}]}
    gpus.write_text(json.dumps(two))
    code = """
import sys
from fedml_agent import hardware
with hardware.nvml_held_open():
    for _ in sys.stdin:
        print(hardware.inventory().to_json(), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment(gpus),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> list[dict[str, object]]:
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())["accelerators"]["gpus"]

        before = ask()
        two["gpus"][0]["lost"] = True
        gpus.write_text(json.dumps(two))
        after = ask()
        process.stdin.close()
    assert [one["uuid"] for one in before] == ["GPU-1", "GPU-2"]
    assert before[1]["instances"] == [{"uuid": "MIG-1", "profile": "1g.10gb", "memory": 10 * GIB}]
    assert [one["fault"] for one in after] == ["GPU is lost", None]


def test_the_command_shows_each_gpu_with_what_it_knows_and_who_computes_there(
    tmp_path: Path,
) -> None:
    gpus = tmp_path / "gpus.json"
    whole = {"uuid": "GPU-a", "used": 3_000_000_000, "utilisation": 97, "power": 512.4}
    whole |= {"processes": [[4242, 2_500_000_000], [77, None]]}
    cut = {
        "uuid": "GPU-b",
        "mig": [{"uuid": "MIG-1"}],
        "fails": {"nvmlDeviceGetPowerUsage": "UNKNOWN"},
    }
    gpus.write_text(json.dumps({"gpus": [whole, cut]}))
    shown = subprocess.run(
        [sys.executable, "-c", "from fedml_agent.cli import main; main()", "hardware"],
        env={**os.environ, "FEDML_HOME": str(tmp_path), **environment(gpus)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    at = next(n for n, line in enumerate(lines) if line.startswith("GPU 0"))
    assert lines[at:] == [
        "GPU 0 NVIDIA H100 80GB HBM3, 86 GB, GPU-a, 3.0 GB used, 97 % busy, 30 °C, 512 W",
        "process 4242, 2.5 GB",
        "process 77",
        "GPU 1 NVIDIA H100 80GB HBM3, 86 GB, GPU-b, MIG on, 0.0 GB used, 30 °C",
        "MIG 1g.10gb, 11 GB, MIG-1",
    ]
