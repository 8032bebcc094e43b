# SPDX-License-Identifier: Apache-2.0
"""The cache of packages: what stays, and what gives way when the disk is low."""

import os
import time
from pathlib import Path
from typing import Any

from fedml_agent.packages import Packages


def test_a_low_disk_costs_the_packages_that_nobody_uses(tmp_path: Path) -> None:
    for name, age_s in (("used", 5), ("old", 3600)):
        file = tmp_path / f"{name}.tar.gz"
        file.write_bytes(b"x")
        when = time.time() - age_s
        os.utime(file, (when, when))
    nobody: Any = None
    Packages(tmp_path, nobody).make_room()
    assert [file.name for file in tmp_path.iterdir()] == ["used.tar.gz"]
