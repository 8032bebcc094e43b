# SPDX-License-Identifier: Apache-2.0
"""What a task records of itself: lines of JSON in a file of its own, read by its agent.

    DIR/records.ndjson      one line for each record, appended with one write
    DIR/SHA256              the bytes of an artifact that a line before has named

DIR is in the task's environment as FEDML_MLOPS_DIR. The agent sends new bytes to the broker at
stated offsets, as it does a log, and artifacts as blobs. Every line has a `kind`; `at` is seconds
since 1970:

    {"kind": "metrics", "at": …, "step": 3, "metrics": {"loss": 0.25}}
    {"kind": "params", "at": …, "params": {"lr": "0.1"}}
    {"kind": "artifact", "at": …, "name": "plots/roc.png", "sha256": …, "size": …, "type": "model"}
    {"kind": "event", "at": …, "name": "training", "data": {…}}
    {"kind": "lost", "at": …, "count": 12, "why": "the disk was full"}
"""

ENV = "FEDML_MLOPS_DIR"
FILE = "records.ndjson"
# The stream that it is to the broker, beside stdout and stderr.
STREAM = "records"

# A longer line is nobody's record.
MAX_LINE_BYTES = 64 * 1024
# Of one task; what comes after it is counted, and the count is recorded.
MAX_BYTES = 1 << 30
MAX_NAME = 250
