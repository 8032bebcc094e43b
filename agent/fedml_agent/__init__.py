# SPDX-License-Identifier: Apache-2.0
"""The daemon on every machine: takes tasks from the broker and sees each to its end."""
