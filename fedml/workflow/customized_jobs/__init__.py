# SPDX-License-Identifier: Apache-2.0
"""The ready-made jobs of FedML's workflows, where its scripts import them from."""
