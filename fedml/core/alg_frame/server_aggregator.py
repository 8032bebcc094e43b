# SPDX-License-Identifier: Apache-2.0
"""`fedml.core.ServerAggregator`, by its longer name."""

from fedml.core import ServerAggregator

__all__ = ["ServerAggregator"]
