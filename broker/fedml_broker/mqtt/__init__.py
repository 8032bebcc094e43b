# SPDX-License-Identifier: Apache-2.0
"""The broker's post office: MQTT 5 to and from the devices, whoever carries it.

    async with post:  # an `Endpoint` in this process, or the `ExternalPost` of a Mosquitto
        await post.publish("fed/1/acme/d/gpu-1/dn/task", offer, expiry_s=30)

Both carriers keep one promise: a QoS 1 message is acknowledged to its sender only after every
handler that it concerns has returned, and in the order of receipt. Delivery is at least once, so
a handler must bear seeing a message again.

PostError
├── Refused       this message will never be taken as it is; `reason` is the MQTT reason code
└── Unavailable   not now: the link is down, the disk is full, the device's queue is full
"""

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self

__all__ = ["Handler", "Post", "PostError", "Refused", "Unavailable"]

Handler = Callable[[str, bytes], Awaitable[None]]
"""Called with (topic, payload). Its return is the commit: only then is the message acknowledged."""


class PostError(Exception):
    """A message was not taken; the text says whose fault it is and what to do next."""


class Refused(PostError):
    """This message will never be taken as it is: too large, malformed, not authorised.

    Attributes:
        reason: MQTT 5 reason code, 0 where none was involved.
    """

    def __init__(self, text: str, reason: int = 0) -> None:
        super().__init__(text)
        self.reason = reason


class Unavailable(PostError):
    """The message was not taken now; sending it again later is the right thing to do."""


class Post(Protocol):
    """What the broker's words see of MQTT. An async context manager: it serves while entered."""

    @property
    def connected(self) -> bool:
        """Whether a message published now would leave at once.

        The embedded endpoint is connected while it serves; the external link comes and goes.
        """
        ...

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Give every matching message to `handler`; call it before entering.

        Handlers for the messages of one publisher are started in order of receipt and may overlap
        (so that a store can commit in groups). One that raises is logged, and the link lives on:
        the embedded endpoint answers the sender with reason 0x83; an external broker has answered
        already, so there the message is gone, and the sender's outbox has to offer it again. What
        the broker publishes itself is not given to its own handlers. Filters should not overlap.

        Raises:
            ValueError: The filter is not a valid MQTT topic filter.
            RuntimeError: The post is already serving.
        """
        ...

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
    ) -> None:
        """Send one message. With QoS 1, return once it is safe with whoever delivers it.

        Safe means: in the queues of the subscribed sessions, on disk (embedded), or acknowledged by
        the external broker. A message that no session subscribes to is dropped without an error.

        Raises:
            Refused: The message can never be sent like this.
            Unavailable: It was not taken now.
        """
        ...

    async def disconnect(self, client_id: str, reason: str) -> None:
        """Close the connection of one device, telling it why (revocation).

        Its session and queue stay until they expire. An external broker offers no such call: there
        it is logged, and the device is refused at its next TLS handshake at the latest.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
