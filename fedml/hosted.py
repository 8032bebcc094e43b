# SPDX-License-Identifier: Apache-2.0
"""Which of FedML's hosted platforms a script of its means: here that is said by `fedml login`.

The setters take what such scripts give them, and say in a warning what decides instead; the
getters give it back.
"""

import warnings

__all__ = [
    "get_env_version",
    "get_local_on_premise_platform_host",
    "get_local_on_premise_platform_port",
    "set_env_version",
    "set_local_on_premise_platform_host",
    "set_local_on_premise_platform_port",
]

_said: dict[str, str | int] = {"version": "release", "host": "127.0.0.1", "port": 80}


def set_env_version(version: str) -> None:
    """FedML's ``release``, ``test``, ``dev`` or ``local``."""
    _set("version", version)


def get_env_version() -> str:
    """What was set, else ``release``."""
    return str(_said["version"])


def set_local_on_premise_platform_host(host: str) -> None:
    """Where a platform of one's own is."""
    _set("host", host)


def get_local_on_premise_platform_host() -> str:
    """What was set, else ``127.0.0.1``."""
    return str(_said["host"])


def set_local_on_premise_platform_port(port: int) -> None:
    """Its port."""
    _set("port", port)


def get_local_on_premise_platform_port() -> int:
    """What was set, else 80."""
    return int(_said["port"])


def _set(name: str, value: str | int) -> None:
    if value == _said[name]:  # nothing new to say
        return
    _said[name] = value
    warnings.warn(
        f"the {name} {value!r} of FedML's platform is not used: "
        "`fedml login KEY`, or an `api_key`, says which broker is meant",
        stacklevel=3,
    )
