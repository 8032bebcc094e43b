# SPDX-License-Identifier: Apache-2.0
"""Tells which variables its job file has made."""

import os
import sys

for name in sorted(os.environ):
    if name.startswith("FEDML_ENV_"):
        sys.stdout.write(f"{name}={os.environ[name]}\n")
