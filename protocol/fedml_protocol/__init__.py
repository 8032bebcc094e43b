# SPDX-License-Identifier: Apache-2.0
"""What broker and agent say to each other: messages, states, topics, keys. No I/O."""
