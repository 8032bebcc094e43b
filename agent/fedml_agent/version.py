# SPDX-License-Identifier: Apache-2.0
"""The version of the installed agent."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("fedml-agent")
except PackageNotFoundError:  # a source tree that was never installed
    VERSION = "0+source"
