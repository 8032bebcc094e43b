# SPDX-License-Identifier: Apache-2.0
"""Federated learning: one file per algorithm, and the pure ways to combine updates.

    algorithm.py   what an algorithm is, and `create` by name
    aggregate.py   the weighted mean of a round       exact_sum.py   partial sums that merge exactly
    cohort.py      who takes part in a round          compress.py    fewer bytes

Importing this package imports nothing else; numpy comes with the modules that compute.
"""
