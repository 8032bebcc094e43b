# SPDX-License-Identifier: Apache-2.0
"""A torch module as named NumPy arrays and back, bit for bit.

The arrays hold everything that makes the model what it is: parameters, and buffers such as the
running statistics of a batch normalisation. Names are those of ``module.state_dict()``.

`to_arrays` and `use_arrays` share memory with a module on the CPU; `set_arrays` always copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Arrays = Mapping[str, npt.NDArray[Any]]


def to_arrays(module: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """The module's arrays, in the order of ``state_dict``.

    On the CPU they are the module's own memory: they change as it trains, and writing to them
    changes it. Copy what must last. From an accelerator they are copies. NumPy has no bfloat16:
    such tensors come as float32, which holds every bfloat16 exactly, so that the round trip is
    exact all the same.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in _tensors(module).items():
        plain = tensor.detach()
        if plain.dtype == torch.bfloat16:
            plain = plain.float()
        arrays[name] = plain.cpu().numpy()
    return arrays


def set_arrays(module: nn.Module, arrays: Arrays) -> None:
    """Copy arrays into the module, wherever its tensors are. Read-only and mapped arrays will do.

    Nothing is changed unless everything fits.

    Raises:
        ValueError: Names, shapes or dtypes are not the module's; the message lists what differs.
    """
    tensors = _tensors(module)
    _fit(tensors, arrays)
    for name, tensor in tensors.items():
        inside = tensor.detach()
        if _lives_in_numpy(inside):
            # Through NumPy: torch would warn about read-only memory that it only reads.
            np.copyto(inside.numpy(), arrays[name])
        else:
            inside.copy_(torch.tensor(arrays[name]))


def use_arrays(module: nn.Module, arrays: Arrays) -> None:
    """Make the module live in the given memory: no copy, and training writes into the arrays.

    For shared memory, and for switching between clients at no cost. Optimisers keep the parameters
    that they were given and go on working.

    Raises:
        ValueError: Names, shapes or dtypes are not the module's, the module is not on the CPU, or
            an array is read-only.
    """
    tensors = _tensors(module)
    _fit(tensors, arrays)
    for name, tensor in tensors.items():
        if not _lives_in_numpy(tensor):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and cannot live in NumPy's memory; "
                f"use set_arrays"
            )
        if not arrays[name].flags.writeable:
            raise ValueError(f"{name} is read-only: training could not write it; use set_arrays")
    for name, tensor in tensors.items():
        tensor.data = torch.from_numpy(arrays[name])


def parameter_count(module: nn.Module) -> int:
    """How many numbers training changes; tied parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors, not detached copies of them."""
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _lives_in_numpy(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16


def _fit(tensors: Mapping[str, Tensor], arrays: Arrays) -> None:
    wrong = [f"no array for {name}" for name in tensors if name not in arrays]
    wrong += [f"{name} is not in the module" for name in arrays if name not in tensors]
    for name, tensor in tensors.items():
        if name not in arrays:
            continue
        array = arrays[name]
        # The dtype that `to_arrays` gives this tensor.
        plain = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
        dtype = torch.empty(0, dtype=plain).numpy().dtype
        if array.shape != tuple(tensor.shape) or array.dtype != dtype:
            wrong.append(f"{name} is {array.dtype}{array.shape}, not {dtype}{tuple(tensor.shape)}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"these arrays do not fit the module: {'; '.join(wrong[:5])}{more}")
