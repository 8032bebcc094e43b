# SPDX-License-Identifier: Apache-2.0
"""`fedml.core.ClientTrainer`, by its longer name."""

from fedml.core import ClientTrainer

__all__ = ["ClientTrainer"]
