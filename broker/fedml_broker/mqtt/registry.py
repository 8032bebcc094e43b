# SPDX-License-Identifier: Apache-2.0
"""Every session there is: how each begins, is resumed, left and ended, and what it subscribes to.

A session lives while its client is connected and then for its expiry interval. All of it except
open connections is in the journal, and comes back from there after a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fedml_broker.mqtt.limits import NEVER
from fedml_broker.mqtt.message import Delivery, Message
from fedml_broker.mqtt.router import Router
from fedml_broker.mqtt.sessions import Session, Surroundings
from fedml_broker.mqtt.subscriptions import Group, Subscription, split_filter

log = logging.getLogger(__name__)


class Registry:
    """Sessions by client id.

    Args:
        ended: Told the client id of every session that has ended.
    """

    def __init__(self, share: Surroundings, router: Router, ended: Callable[[str], object]) -> None:
        self._share = share
        self._router = router
        self._ended = ended
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, client: str) -> Session | None:
        """The session of a client id, connected or not."""
        return self._sessions.get(client)

    def open(
        self,
        client: str,
        *,
        clean_start: bool,
        expiry_s: int,
        may_subscribe: Callable[[str], bool],
    ) -> tuple[Session, bool]:
        """Resume or begin a session, and whether it was there already.

        The connection before, if there was one, must have been closed by the caller. Subscriptions
        that the client may no longer have are dropped.
        """
        session = self._sessions.get(client)
        if session is not None and clean_start:
            self.end(session)
            session = None
        present = session is not None
        if session is None:
            row = self._share.journal.next_id()
            session = self._sessions[client] = Session(client, row, expiry_s, self._share)
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None
        session.expiry_s = expiry_s
        session.stored = session.stored or expiry_s > 0
        self._save(session, None)
        for sub in list(session.subscriptions.values()):
            topic_filter = sub.group.filter if sub.group else sub.filter
            if not may_subscribe(topic_filter):
                log.info("%s may no longer subscribe to %r", client, sub.filter)
                self.unsubscribe(session, sub.filter)
        return session, present

    def came(self, session: Session) -> None:
        """The client is connected: shared messages that nobody could take are for it."""
        for sub in session.subscriptions.values():
            if sub.group is not None:
                self._call_home(sub.group)

    def leave(self, session: Session, expiry_s: int) -> None:
        """The connection is gone: keep the session for its expiry interval."""
        session.go_offline()
        session.expiry_s = expiry_s
        if expiry_s == 0:
            self.end(session)
            return
        self._hand_on(session, session.withdraw(None), ending=False)
        if expiry_s == NEVER:
            self._save(session, None)
        else:
            self._save(session, self._share.clock.now() + expiry_s)
            session.expiry = self._share.clock.call_later(expiry_s, self.end, session)

    def end(self, session: Session) -> None:
        """The session is over; what it had promised to deliver is dropped, and counted."""
        if session.expiry is not None:
            session.expiry.cancel()
            session.expiry = None
        session.go_offline()
        for sub in session.subscriptions.values():
            self._router.subscriptions.remove(sub)
            self._share.journal.drop("subscription", (session.row, sub.filter))
        session.subscriptions.clear()
        self._hand_on(session, session.withdraw(None), ending=True)
        session.discard()
        del self._sessions[session.client]
        self._share.journal.drop("session", session.row)
        self._ended(session.client)

    def subscribe(
        self,
        session: Session,
        text: str,
        *,
        qos: int,
        no_local: bool,
        retain_as_published: bool,
        retain_handling: int,
        ident: int,
    ) -> None:
        """Add or replace a subscription whose filter was found valid and allowed."""
        group, topic_filter = split_filter(text)
        new = text not in session.subscriptions
        sub = Subscription(session, text, qos, no_local, retain_as_published, ident)
        self._add(sub, group, topic_filter)
        if session.stored:
            self._share.journal.put(
                "subscription",
                (session.row, text),
                (session.row, text, qos, no_local, retain_as_published, ident),
            )
        if sub.group is not None:
            self._call_home(sub.group)
        elif retain_handling == 0 or (retain_handling == 1 and new):
            self._router.send_retained(sub)

    def unsubscribe(self, session: Session, text: str) -> bool:
        """Remove a subscription; whether there was one. What is already queued stays queued."""
        sub = session.subscriptions.pop(text, None)
        if sub is None:
            return False
        self._router.subscriptions.remove(sub)
        if session.stored:
            self._share.journal.drop("subscription", (session.row, text))
        return True

    def stop(self) -> None:
        """No more timers; everything stays in the journal."""
        for session in self._sessions.values():
            if session.expiry is not None:
                session.expiry.cancel()

    def restore(self, stored: dict[str, list[Any]]) -> None:
        """Take back what the journal held. Sessions that were connected count as just left."""
        now, journal = self._share.clock.now(), self._share.journal
        by_row: dict[int, Session] = {}
        late: list[Session] = []
        for row, client, expiry_s, ends_at in stored["session"]:
            session = Session(client, row, expiry_s, self._share)
            session.stored = True
            by_row[row] = self._sessions[client] = session
            if expiry_s == 0 or (ends_at is not None and ends_at <= now):
                late.append(session)
            elif expiry_s != NEVER:
                left_s = expiry_s if ends_at is None else ends_at - now
                self._save(session, now + left_s)
                session.expiry = self._share.clock.call_later(left_s, self.end, session)
        for row, text, qos, no_local, as_published, ident in stored["subscription"]:
            if row in by_row:
                group, topic_filter = split_filter(text)
                sub = Subscription(
                    by_row[row], text, qos, bool(no_local), bool(as_published), ident
                )
                self._add(sub, group, topic_filter)
            else:
                journal.drop("subscription", (row, text))
        self._restore_deliveries(stored, by_row)
        for session in late:
            self.end(session)

    def _restore_deliveries(self, stored: dict[str, list[Any]], by_row: dict[int, Session]) -> None:
        journal, messages = self._share.journal, dict[int, Message]()
        for row, name, payload, properties, expires_at, retain in stored["message"]:
            topic = self._router.known(name)
            message = Message(topic, payload, 1, bool(retain), properties, expires_at)
            message.row = row
            messages[row] = message
        for row, session_row, message_row, retain, idents, share in stored["delivery"]:
            session, found = by_row.get(session_row), messages.get(message_row)
            if session is None or found is None:
                journal.drop("delivery", row)
                continue
            sub = session.subscriptions.get(share) if share else None
            delivery = Delivery(found, bool(retain), idents, sub.group if sub else None)
            delivery.row = row
            found.uses += 1
            session.restore(delivery)
        for row, message in messages.items():
            if not message.uses:
                journal.drop("message", row)
                message.row = 0

    def _add(self, sub: Subscription, group: str, topic_filter: str) -> None:
        self._router.subscriptions.add(topic_filter, group, sub)
        sub.session.subscriptions[sub.filter] = sub

    def _save(self, session: Session, ends_at: float | None) -> None:
        if session.stored:
            self._share.journal.put(
                "session", session.row, (session.row, session.client, session.expiry_s, ends_at)
            )

    def _hand_on(self, session: Session, deliveries: list[Delivery], *, ending: bool) -> None:
        """Shared messages of an absent member: to one that is there, else back in its queue."""
        for delivery in deliveries:
            group = delivery.group
            chosen = group.choose(online=not ending) if group else None
            if chosen is not None:
                chosen.session.adopt(delivery, chosen)
            else:
                session.put_back(delivery)

    def _call_home(self, group: Group) -> None:
        """Shared messages that wait with absent members go to one that is there."""
        for member in list(group.members):
            if member.session.line is None:
                self._hand_on(member.session, member.session.withdraw(group), ending=False)
