# SPDX-License-Identifier: Apache-2.0
"""The torch device that a FedML script asks for."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["get_device"]


def get_device(args: Any) -> torch.device:
    """``cuda:N`` if `using_gpu` says so and there is one, else the CPU; N is `gpu_id`, or 0."""
    import torch

    if not getattr(args, "using_gpu", False):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        warnings.warn("`using_gpu`: torch sees no GPU here; the CPU is used", stacklevel=2)
        return torch.device("cpu")
    return torch.device("cuda", int(getattr(args, "gpu_id", 0) or 0))
