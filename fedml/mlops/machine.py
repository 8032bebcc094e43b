# SPDX-License-Identifier: Apache-2.0
"""How busy the machine is while a run runs: CPU, memory, disk, GPUs, sampled by a thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

DEFAULT_S = 30.0


class Sampler:
    """Samples until it is stopped. The first sample comes at once, later ones `every_s` apart."""

    def __init__(self, tell: Callable[[dict[str, float], int], None], every_s: float) -> None:
        self._tell = tell
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedml.mlops.system", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples; returns when the last has been told."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        try:
            import psutil
        except ModuleNotFoundError:
            return
        task = psutil.Process()
        with contextlib.suppress(psutil.Error):
            psutil.cpu_percent(None)
            task.cpu_percent(None)
        with contextlib.ExitStack() as stack:
            gpus = stack.enter_context(_gpus())
            step = 0
            while not self._stop.wait(self._every_s if step else 0.1):
                with contextlib.suppress(psutil.Error, OSError):
                    memory = psutil.virtual_memory()
                    found = {
                        "system/cpu_percent": psutil.cpu_percent(None),
                        "system/memory_percent": memory.percent,
                        "system/memory_used_bytes": float(memory.used),
                        "system/process_cpu_percent": task.cpu_percent(None),
                        "system/process_memory_bytes": float(task.memory_info().rss),
                    }
                    self._tell({**found, **gpus()}, step)
                step += 1


@contextlib.contextmanager
def _gpus() -> Iterator[Callable[[], dict[str, float]]]:
    """What tells the use of the GPUs that the task may use; where there are none, nothing."""
    try:
        import pynvml
    except ModuleNotFoundError:
        yield dict
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield dict
        return
    try:
        yield _use_of_gpus
    finally:
        pynvml.nvmlShutdown()


def _use_of_gpus() -> dict[str, float]:
    import pynvml

    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    found: dict[str, float] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            names = {str(index), pynvml.nvmlDeviceGetUUID(handle)}
            if allowed is None or names & set(allowed.split(",")):
                use = pynvml.nvmlDeviceGetUtilizationRates(handle)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                found[f"system/gpu{index}/percent"] = float(use.gpu)
                found[f"system/gpu{index}/memory_bytes"] = float(memory.used)
    return found
