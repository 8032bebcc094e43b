# SPDX-License-Identifier: Apache-2.0
"""Signing in with a browser: the cookie, what it lets through, and what it does not."""

import json
import time
from typing import Any

import pytest
import sqlalchemy as sa
import urllib3
from playwright.sync_api import expect

from fedml_broker.sessions import COOKIE
from tests.dashboard.conftest import Desk, sign_in
from tests.place import Place


class Caller:
    """Somebody without a browser, who may say anything."""

    def __init__(self, place: Place) -> None:
        ca = str(place.home / "broker" / "identity" / "ca.pem")
        self._pool = urllib3.PoolManager(ca_certs=ca, retries=False, timeout=20)
        self.url = place.client.url

    def ask(
        self, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, dict[str, Any], urllib3.BaseHTTPResponse]:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body).encode()
        answer = self._pool.request(method, self.url + path, body=data, headers=names)
        is_json = answer.headers.get("Content-Type", "").endswith("json")
        return answer.status, json.loads(answer.data) if is_json else {}, answer

    def sign_in(self, key: str) -> dict[str, str]:
        """The headers of a page that is signed in."""
        status, said, answer = self.ask("POST", "/v1/session", {"key": key})
        assert status == 200, said
        cookie = answer.headers["Set-Cookie"].split(";")[0]
        return {"Cookie": cookie, "X-CSRF-Token": said["csrf"], "Origin": self.url}


@pytest.fixture
def caller(place: Place) -> Caller:
    return Caller(place)


@pytest.fixture
def key(place: Place) -> str:
    return (place.home / "broker" / "admin.key").read_text()


def test_the_cookie_is_for_this_host_over_tls_and_for_no_script(caller: Caller, key: str) -> None:
    _, said, answer = caller.ask("POST", "/v1/session", {"key": f" {key}\n"})
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"{COOKIE}=")
    for word in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/"):
        assert word in cookie
    assert "Domain" not in cookie
    assert said["name"] == "admin"
    assert answer.headers["Cache-Control"] == "no-store"
    assert said["csrf"] not in cookie


def test_the_store_does_not_hold_what_is_in_the_cookie(
    caller: Caller, place: Place, key: str
) -> None:
    secret = caller.sign_in(key)["Cookie"].split("=", 1)[1]
    rows = place.query("SELECT * FROM sessions")
    assert rows
    assert all(secret not in str(row) for row in rows)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"X-CSRF-Token": ""}, 403),
        ({"X-CSRF-Token": "0" * 64}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Cookie": f"{COOKIE}=nonsense"}, 401),
    ],
)
def test_what_changes_something_needs_the_token_and_our_own_origin(
    caller: Caller, key: str, change: dict[str, str], status: int
) -> None:
    headers = {**caller.sign_in(key), **change}
    if not headers["X-CSRF-Token"]:
        del headers["X-CSRF-Token"]
    assert caller.ask("POST", "/v1/keys", {"uses": 1}, **headers)[0] == status


def test_a_request_without_an_origin_changes_nothing(caller: Caller, key: str) -> None:
    headers = caller.sign_in(key)
    del headers["Origin"]
    assert caller.ask("POST", "/v1/keys", {}, **headers)[0] == 403
    assert caller.ask("GET", "/v1/keys", **headers)[0] == 200


def test_the_csrf_token_of_one_session_is_none_of_another(caller: Caller, key: str) -> None:
    one, two = caller.sign_in(key), caller.sign_in(key)
    assert (
        caller.ask("POST", "/v1/keys", {}, **{**one, "X-CSRF-Token": two["X-CSRF-Token"]})[0] == 403
    )


def test_signing_out_ends_the_session_at_the_broker(caller: Caller, key: str) -> None:
    headers = caller.sign_in(key)
    status, _, answer = caller.ask("DELETE", "/v1/session", **headers)
    assert status == 200
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    status, said, _ = caller.ask("GET", "/v1/whoami", **headers)
    assert (status, said["title"]) == (401, "you are signed out")


def test_signing_in_and_out_is_in_the_audit(caller: Caller, place: Place, key: str) -> None:
    caller.ask("DELETE", "/v1/session", **caller.sign_in(key))
    found = place.client.call("GET", "/v1/audit?action=session&limit=2")["entries"]
    assert [entry["action"] for entry in found] == ["session.end", "session.begin"]
    assert found[1]["details"]["whence"] == "127.0.0.1"


def test_a_key_that_cannot_be_used_says_what_it_is(caller: Caller, place: Place, key: str) -> None:
    for given, words in (
        ("nonsense", "this is not a user's key"),
        (place.login_key, "fedml-agent login"),
        (key[:-3], "damaged"),
        ("ab" * 24, "does not know this key"),
    ):
        status, said, _ = caller.ask("POST", "/v1/session", {"key": given})
        assert status == 401
        assert words in said["detail"]
        assert "fedml-broker users token" in said["hint"]


def test_another_site_cannot_sign_somebody_in(caller: Caller, key: str) -> None:
    headers = {"Origin": "https://evil.example"}
    assert caller.ask("POST", "/v1/session", {"key": key}, **headers)[0] == 403


def test_a_session_ends_with_the_token_that_it_was_begun_with(
    caller: Caller, place: Place, key: str
) -> None:
    mine = place.client.call("POST", "/v1/users/admin/tokens", {"days": 1})["key"]
    headers = caller.sign_in(mine)
    assert caller.ask("GET", "/v1/whoami", **headers)[0] == 200
    expire(place, "admin")
    assert caller.ask("GET", "/v1/whoami", **headers)[0] == 401
    status, said, _ = caller.ask("POST", "/v1/session", {"key": mine})
    assert (status, said["title"]) == (401, "this token has expired")


def expire(place: Place, user: str) -> None:
    """Let the limited tokens of a user have ended an hour ago."""
    engine = sa.create_engine(f"sqlite:///{place.home}/broker/broker.db")
    text = 'UPDATE tokens SET expires_at = :then WHERE "user" = :user AND expires_at IS NOT NULL'
    with engine.begin() as tx:
        tx.execute(sa.text(text), {"then": time.time() - 3600, "user": user})
    engine.dispose()


@pytest.mark.parametrize("path", ["/", "/v1/health", "/v1/whoami", "/nothing"])
def test_every_answer_says_what_a_browser_may_make_of_it(caller: Caller, path: str) -> None:
    headers = caller.ask("GET", path)[2].headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_files_are_cached_by_their_digest_and_the_page_is_not(caller: Caller) -> None:
    page = caller.ask("GET", "/")[2]
    assert page.headers["Cache-Control"] == "no-cache"
    assert caller.ask("GET", "/", If_None_Match=page.headers["ETag"])[0] == 304
    text = page.data.decode()
    path = text.split('src="')[1].split('"')[0]
    assert "immutable" in caller.ask("GET", path)[2].headers["Cache-Control"]
    other = path.replace(path.split("/")[2], "0" * 16)
    status, said, _ = caller.ask("GET", other)
    assert (status, said["hint"]) == (404, "reload the page")
    for part in ("<script>", "style=", "onclick", "http:", "https:"):
        assert part not in text, "nothing inline, nothing from elsewhere"


def test_a_browser_whose_token_has_expired_is_asked_to_sign_in_again(desk: Desk) -> None:
    key = desk.place.client.call("POST", "/v1/users/admin/tokens", {"days": 1})["key"]
    page = desk.window()
    page.goto(desk.url)
    sign_in(page, key)
    expect(page.locator(".machine").first).to_be_visible()
    expire(desk.place, "admin")
    page.get_by_role("link", name="Runs", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("you are signed out")
    expect(page.get_by_label("Your key")).to_be_focused()
    page.get_by_label("Your key").fill(key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("this token has expired")
    expect(page.get_by_role("navigation")).to_be_hidden()
    sign_in(page, desk.admin_key)
    expect(page.get_by_role("heading", level=1)).to_have_text("Runs")


def test_signing_out_leaves_nothing_on_the_screen(desk: Desk) -> None:
    page = desk.window()
    page.goto(desk.url)
    sign_in(page, desk.admin_key)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Your key")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Your key")).to_be_visible()
    assert page.locator(".machine").count() == 0


@pytest.mark.parametrize(
    ("role", "stop", "drain"), [("viewer", 0, 0), ("member", 1, 0), ("admin", 1, 1)]
)
def test_buttons_are_there_for_those_who_may_press_them(
    desk: Desk, role: str, stop: int, drain: int
) -> None:
    page = desk.window(as_=role)
    desk.go(page, f"runs/{desk.waiting}")
    expect(page.get_by_role("button", name="Stop")).to_have_count(stop)
    desk.go(page, f"devices/{desk.place.agents['north-1'].device}")
    expect(page.get_by_role("button", name="Revoke")).to_have_count(drain)
    expect(page.get_by_role("link", name="Users & keys")).to_have_count(drain)
    if role != "admin":
        page.goto(f"{desk.url}/#/people")  # typed by hand
        expect(page.get_by_role("heading", level=1)).to_have_text("Fleet")


def test_an_admin_signs_somebody_out_everywhere(desk: Desk) -> None:
    key = desk.key_of("leaver", "member")
    theirs = desk.window()
    theirs.goto(desk.url)
    sign_in(theirs, key)
    page = desk.see("people")
    page.get_by_role("button", name="Sign leaver out everywhere").click()
    page.get_by_role("dialog").get_by_role("button", name="Sign out").click()
    row = page.get_by_role("row").filter(has_text="leaver")
    expect(row.get_by_role("cell").nth(2)).to_have_text("0")
    theirs.reload()
    expect(theirs.get_by_label("Your key")).to_be_visible()


def test_an_admin_who_signs_himself_out_everywhere_stays_where_he_does_it(desk: Desk) -> None:
    keys = [desk.key_of("boss", "admin") for _ in range(2)]
    windows = []
    for key in keys:
        page = desk.window()
        page.goto(desk.url)
        sign_in(page, key)
        windows.append(page)
    here, there = windows
    desk.go(here, "people")
    here.get_by_role("button", name="Sign boss out everywhere").click()
    here.get_by_role("dialog").get_by_role("button", name="Sign out").click()
    row = here.get_by_role("row").filter(has_text="boss")
    expect(row.get_by_role("cell").nth(2)).to_have_text("1")
    there.reload()
    expect(there.get_by_label("Your key")).to_be_visible()
