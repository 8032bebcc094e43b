# SPDX-License-Identifier: Apache-2.0
"""Where FedML's scripts look for the data of `dataset: mnist`."""
