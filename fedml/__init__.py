# SPDX-License-Identifier: Apache-2.0
"""The library that people and task code import."""
