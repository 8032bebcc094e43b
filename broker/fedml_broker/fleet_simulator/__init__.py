# SPDX-License-Identifier: Apache-2.0
"""Many simulated agents against one real broker: how large a fleet does this machine carry?

`agent.py` is one simulated machine, `fleet.py` all of them in one event loop, `desk.py` whoever
enrols them and asks for tasks, `simulation.py` the course of one measurement. What is simulated is
the machine alone: identities, TLS, MQTT 5, signatures and messages are the real ones.
"""
