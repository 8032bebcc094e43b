# SPDX-License-Identifier: Apache-2.0
"""Where the engines `inplace` and `stacked` train: processors, CUDA or MPS.

A member of the crew trains on one device. Weights, a client's examples and the sums stay there; the
model goes in and the sum comes out once an order. Nothing here has met the hardware yet: it was
made on machines without any (see docs/simulate.md).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedml.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Pair = tuple[Tensor, Tensor]

CPU = ("cpu",)
ENGINES = ("inplace", "stacked")  # those that can train elsewhere


def is_name(wanted: str) -> bool:
    """Whether this is one of auto, cpu, cuda, cuda:N and mps."""
    return re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", wanted) is not None


def guess(wanted: str, nodes: Path = Path("/dev")) -> tuple[str, ...]:
    """What `found` will most likely say, without torch: so many processes are started meanwhile.

    Args:
        wanted: As the plan says.
        nodes: Where NVIDIA's driver puts a node for each GPU.
    """
    if wanted not in ("auto", "cuda"):
        return (wanted,)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [f"cuda:{n}" for n, _ in enumerate(nodes.glob("nvidia[0-9]*"))]
    if hidden is not None:
        every = every[: len([name for name in hidden.split(",") if name not in ("", "-1", "void")])]
    return tuple(every) or (CPU if wanted == "auto" else ("cuda",))


def found(wanted: str) -> tuple[str, ...]:
    """The devices that torch has for what was asked; processors are one device.

    Raises:
        ConfigError: What was asked for is not here.
    """
    # A model that has not imported torch has nothing to do on a GPU.
    if wanted == "cpu" or (wanted == "auto" and "torch" not in sys.modules):
        return CPU
    import torch

    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device mps: torch sees no MPS here", "--device cpu or auto")
        return ("mps",)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = tuple(f"cuda:{n}" for n in range(count))
    if wanted == "auto":
        return every or CPU
    if not every:
        built = torch.version.cuda is not None
        raise ConfigError(
            f"device {wanted}: torch {torch.__version__} sees no CUDA device here",
            "--device cpu or auto; does `nvidia-smi` see a GPU?"
            if built
            else "--device cpu or auto; this torch is built without CUDA, https://pytorch.org says "
            "how to get the other",
        )
    if wanted == "cuda":
        return every
    if wanted not in every:
        raise ConfigError(f"there is no {wanted}: torch sees {', '.join(every)}", "--device cuda")
    return (wanted,)


def choose(
    wanted: str, there: tuple[str, ...], engine: str, why: str
) -> tuple[tuple[str, ...], str]:
    """The devices to train on, and why.

    Args:
        wanted: As the plan says.
        there: What `found` found for it.
        engine: That was chosen, ``why`` the reason.

    Raises:
        ConfigError: A device was asked for, and the engine has no use for it.
    """
    if engine not in ENGINES:
        if wanted not in ("auto", "cpu"):
            raise ConfigError(
                f"device {wanted} was asked for, and the engine {engine} ({why}) stays on the CPU",
                "--device cpu or auto; devices are for the engines inplace and stacked, which need "
                "a torch model, `train = LocalSGD(…)` and no treatment of updates",
            )
        return CPU, "as asked" if wanted == "cpu" else f"{engine} needs no other"
    if wanted != "auto":
        return there, "as asked"
    return there, "torch sees it" if there != CPU else "torch sees no CUDA device"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a training failed for want of memory on its device."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    # MPS, and CUDA below the allocator, say so in the text alone.
    said = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return said or isinstance(error, torch.OutOfMemoryError)


def free_bytes(device: str) -> float:
    """What a device has left; boundless for processors, where others keep account."""
    import torch

    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    if device == "mps":
        most = torch.mps.recommended_max_memory()
        return float(most - torch.mps.driver_allocated_memory())
    return math.inf


def let_go(device: str) -> None:
    """Give memory that torch holds for later back to the device."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def prepare(device: str) -> None:
    """Switch off what rounds float32 to ten bits, and what adds up in whatever order comes.

    So engines agree with each other to rounding, and a run with itself.
    """
    if device.startswith("cuda"):
        import torch

        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


class Kept:
    """Examples of clients where they are trained on, as many as half of what is free holds."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._room = free_bytes(device) / 2
        self._kept: dict[int, Pair] = {}

    def get(self, client: int, make: Callable[[], Pair]) -> Pair:
        """A client's examples; made, if they are not here, and kept while there is room."""
        pair = self._kept.get(client)
        if pair is None:
            pair = make()
            if _size(pair) <= self._room:
                self._room -= _size(pair)
                self._kept[client] = pair
        return pair

    def forget(self, clients: Iterable[int]) -> None:
        """Drop those of these clients."""
        for client in clients:
            pair = self._kept.pop(client, None)
            if pair is not None:
                self._room += _size(pair)

    def free(self) -> bool:
        """Memory has run out: keep nothing from now on. Whether there was anything."""
        anything = self._device != "cpu" and bool(self._kept)
        if self._device != "cpu":
            self._kept, self._room = {}, 0
        let_go(self._device)
        return anything


def _size(pair: Pair) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in pair)
