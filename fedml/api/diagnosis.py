# SPDX-License-Identifier: Apache-2.0
"""What is between here and your runs."""

import sys

from fedml.api.account import Home, home_of
from fedml.diagnosis import findings


def fedml_diagnosis(*_: object, home: Home = None, **__: object) -> bool:
    """Print what `fedml diagnosis` does; whether nothing is wrong.

    FedML's arguments choose among services of its own, which are not asked here.
    """
    good = True
    for finding in findings(home_of(home)):
        good &= finding.state != "not ok"
        sys.stdout.write(f"{finding.name}: {finding.state}: {finding.text}\n")
        if finding.next:
            sys.stdout.write(f"  next: {finding.next}\n")
    return good
