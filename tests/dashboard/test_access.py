# SPDX-License-Identifier: Apache-2.0
"""Everybody can use it: with the keyboard alone, in the colours of his choice.

Each page is put to axe-core in `test_pages.py`.
"""

import pytest
from playwright.sync_api import Route, expect

from tests.dashboard.conftest import Desk, violations


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_dialog_and_the_form_to_sign_in_meet_wcag_aa(desk: Desk, scheme: str) -> None:
    page = desk.window(scheme=scheme)
    page.goto(desk.url)
    page.get_by_label("Your key").fill("nonsense")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    assert not violations(page), "sign in"
    page = desk.window(scheme=scheme, as_="admin")
    desk.go(page, "people")
    page.get_by_role("button", name="New user").click()
    assert not violations(page), "dialog"


def test_the_theme_can_be_chosen_and_stays(desk: Desk) -> None:
    page = desk.window(as_="admin")
    desk.go(page, "fleet")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.get_by_role("button", name="Theme").click()
    dark = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("path", ["fleet", "runs", "people"])
def test_the_tab_key_reaches_every_control_and_one_sees_where_it_is(desk: Desk, path: str) -> None:
    page = desk.see(path)
    page.evaluate("document.activeElement.blur()")
    # By what they say, not as nodes: a list may be drawn anew meanwhile.
    page.evaluate(
        """() => {
          window.told = (at) => [at.tagName, at.getAttribute("href"), at.getAttribute("aria-label"),
                                 at.getAttribute("name"), at.textContent.slice(0, 40)].join(" ");
        }"""
    )
    said = "found => found.map(window.told)"
    controls = page.locator("a[href]:visible, button:visible, input:visible, select:visible")
    seen: set[str] = set()
    for _ in range(2 * controls.count() + 5):
        page.keyboard.press("Tab")
        what = page.evaluate(
            """() => {
              const at = document.activeElement;
              if (at === document.body) return null;
              return [window.told(at), getComputedStyle(at).outlineStyle];
            }"""
        )
        if what is not None:
            assert what[1] != "none", f"no outline: {what[0]}"
            seen.add(what[0])
    assert set(controls.evaluate_all(said)) <= seen


def test_a_new_page_begins_at_its_heading(desk: Desk) -> None:
    page = desk.see("fleet")
    page.get_by_role("link", name="Queue").press("Enter")
    expect(page.get_by_role("heading", level=1, name="Queue")).to_be_focused()
    page.locator("body").press("Home")
    page.get_by_role("link", name="Skip to the content").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_be_focused()


def test_who_goes_on_while_a_page_loads_is_not_called_back_to_its_heading(desk: Desk) -> None:
    """Else the Enter that was meant for the next link would go nowhere."""
    page = desk.window(as_="admin")
    held: list[Route] = []
    page.route("**/v1/audit*", lambda route: held.append(route))
    desk.go(page, "about")
    page.get_by_role("link", name="Audit").press("Enter")
    page.get_by_role("heading", level=1, name="Audit").wait_for()
    link = page.get_by_role("link", name="Queue")
    link.focus()
    with page.expect_response("**/v1/audit*"):
        held[0].continue_()
    page.locator('main[data-shown="#/audit"]').wait_for()
    expect(link).to_be_focused()
