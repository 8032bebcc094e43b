# SPDX-License-Identifier: Apache-2.0
"""Where scripts of FedML's applications look for `ClientTrainer` and `ServerAggregator`."""
