# SPDX-License-Identifier: Apache-2.0
"""Whether two models are the same, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal names, values and dtypes."""
    return a.keys() == b.keys() and all(
        np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )
