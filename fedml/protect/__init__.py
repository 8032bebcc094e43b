# SPDX-License-Identifier: Apache-2.0
"""What protects a federation: against bad clients, and for good ones.

    robust.py     rules in place of the mean     privacy.py      clipping and noise on an update
    attacks.py    what those rules are tried on  accountant.py   what the noise is worth

Importing this package imports nothing else.
"""
