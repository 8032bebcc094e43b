# SPDX-License-Identifier: Apache-2.0
"""What each URL does: a call into a word, and an answer. The table of URLs is `routes.py`.

One file per word. A handler gets the request with its caller already known (`user` or `device`),
and its body already checked against its type.
"""
