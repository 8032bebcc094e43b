# SPDX-License-Identifier: Apache-2.0
"""The small process that owns one task: its child, its logs and its exit record.

It is started as `python -I -S shim.py TASKDIR` and outlives the agent. Beside its program every
task has a guard, which is process 1 of the task's own pid namespace where the machine allows one:

    shim ── guard ── task ── …      the guard dies with the shim, everything else with the guard

A task ends when its first process ends; what is still running then is killed. While it is being
stopped, the others get the rest of the grace period (a shell that was told to end does not wait
for what it started).

Files in TASKDIR (0600; the task itself cannot see them where directories can be hidden):

    spec.json   what to run; written by the agent, see `Spec` in guard.py
    shim.json   who runs it: pids, start times, boot id; synced before the program starts
    s           Unix socket: newline-delimited JSON, any number of connections
    out.N err.N the logs, see capped_log.py; order.N: which came when
    exit.json   how it ended; synced before anybody is told
    shim.err    the traceback of a shim that failed, which should not happen

    shim -> agent   {"event": "snapshot", …} at once, then "log" (at most every 20 ms), "ended"
    agent -> shim   {"do": "stop", "grace_s": 10}, {"do": "kill"}, {"do": "ping"} -> "pong"
"""

import os
import signal
import socket
import sys

if __name__ == "__main__":  # -I and -S leave no way to find ourselves but the path of this file
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

from fedml_agent.guard import Spec, SpecError
from fedml_agent.keeper import SOCKET_FILE, Keeper
from fedml_agent.namespaces import harden_process

TRACEBACK_FILE = "shim.err"


def main(taskdir: str) -> int:
    """Begin to serve a task in the background; give the exit status for the one who asked."""
    os.closerange(3, 4096)
    os.umask(0o077)
    # Whatever the agent does about signals is no concern of the task, and we wait for children.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for ignored in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.chdir(taskdir)
        spec = Spec.read()
        # Bound by a relative name: the whole path may be longer than a socket address.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(SOCKET_FILE)
        listener.listen(128)
    except (OSError, SpecError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if os.fork():
        return 0
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    harden_process()
    listener.listen(128)  # once more: who connects shall see our pid, not that of our parent
    try:
        Keeper(spec, listener).run()
    except BaseException:
        import traceback  # here, because it is needed next to never and takes 4 ms

        with open(TRACEBACK_FILE, "w", encoding="utf-8") as file:  # noqa: PTH123
            traceback.print_exc(file=file)
        raise
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -I -S shim.py TASKDIR\n")
        sys.exit(64)
    sys.exit(main(sys.argv[1]))
