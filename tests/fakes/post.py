# SPDX-License-Identifier: Apache-2.0
"""A post office that delivers nothing and remembers everything that the broker said.

    post = FakePost(identity.verify_keys_raw)
    orders = Orders(store, identity, post)
    ...
    post.take()                     # [("one", "Offer t-1.1"), ("one", "ResultAck t-1.1")]
    post.letters[-1].body           # the same in full: Offer, Cancel, ..., ResultAck
    post.trouble = Unavailable("")  # publishing raises this until it is None again

It reads what is published as a device would: an envelope for the device of the topic, and each
order signed by the broker, for this device, with a number above all before. Anything else is an
AssertionError in whoever published it. It fulfils `Post`, and what is said to the broker goes
straight to `Reports.take`: there is nothing to subscribe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedml_broker.mqtt import Handler, PostError
from fedml_protocol import topics
from fedml_protocol.envelope import unpack
from fedml_protocol.keys import verify
from fedml_protocol.tasks import CloseSession, Offer, ResultAck, SignedOrder, Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One message to one device.

    Attributes:
        body: What was ordered, or the ResultAck.
        counter: The order's number; 0: not an order.
    """

    device: str
    body: Any
    counter: int
    expiry_s: int | None

    @property
    def brief(self) -> str:
        """The body in a few characters."""
        name, body = type(self.body).__name__, self.body
        if isinstance(body, CloseSession):
            return f"{name} {body.session}"
        if isinstance(body, Tail):
            return f"{name} {body.task} {'on' if body.on else 'off'}"
        return f"{name} {body.task}.{body.epoch}" if hasattr(body, "epoch") else name


class FakePost:
    """See the module."""

    connected = True

    def __init__(self, verify_keys: Mapping[str, bytes]) -> None:
        """
        Args:
            verify_keys: Whose orders are good, as the broker tells its devices.
        """
        self.letters: list[Letter] = []
        self.trouble: PostError | None = None
        self.disconnected: list[str] = []
        self._keys = {k: Ed25519PublicKey.from_public_bytes(v) for k, v in verify_keys.items()}
        self._taken = 0
        self._counters: dict[str, int] = {}

    def take(self) -> list[tuple[str, str]]:
        """Device and message, in brief, of everything since the last look."""
        new, self._taken = self.letters[self._taken :], len(self.letters)
        return [(letter.device, letter.brief) for letter in new]

    def offers(self) -> list[tuple[str, str, int]]:
        """Device, task and epoch of every offer there ever was."""
        return [
            (letter.device, letter.body.task, letter.body.epoch)
            for letter in self.letters
            if isinstance(letter.body, Offer)
        ]

    # ------------------------------------------------------------------ as the broker sees it

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Nobody publishes here."""

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
    ) -> None:
        """Remember one message."""
        if self.trouble is not None:
            raise self.trouble
        address, channel = topics.parse_topic(topic)
        envelope = unpack(payload)
        assert envelope.device == address.device
        assert (qos, retain) == (1, False)
        body, counter = envelope.body, 0
        if isinstance(body, SignedOrder):
            order = verify(body, self._keys, address.device)
            assert order.counter > self._counters.get(address.device, 0), "a replay"
            self._counters[address.device] = counter = order.counter
            wanted = topics.DN_TASK if isinstance(order.what, Offer) else topics.DN_CONTROL
            assert channel == wanted
            what: Any = order.what
        else:
            assert isinstance(body, ResultAck)
            assert channel == topics.DN_ACK
            what = body
        self.letters.append(
            Letter(device=address.device, body=what, counter=counter, expiry_s=expiry_s)
        )

    async def disconnect(self, client_id: str, reason: str) -> None:
        """Remember who was cut off."""
        self.disconnected.append(client_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None
