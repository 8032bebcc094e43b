# SPDX-License-Identifier: Apache-2.0
"""Each page shows what there is, in light and dark and on a phone."""

import re

import pytest
from playwright.sync_api import expect

from tests.dashboard.conftest import DESKTOP, PHONE, PICTURES, Desk, violations

PAGES = ("fleet", "queue", "runs", "workflows", "labels", "people", "audit", "about")
LOOKS = {
    "light": (DESKTOP, "light"),
    "dark": (DESKTOP, "dark"),
    "phone": (PHONE, "light"),
}


def paths(desk: Desk) -> dict[str, str]:
    device = desk.place.agents["north-1"].device
    return {
        **{name: name for name in PAGES},
        "job": f"runs/{desk.job}",
        "recorded": f"runs/{desk.recorded}",
        "federated": f"runs/{desk.federated}",
        "waiting": f"runs/{desk.waiting}",
        "compare": f"compare?runs={desk.federated},{desk.recorded},{desk.job}",
        "device": f"devices/{device}",
        "workflow": f"workflows/{desk.flow}",
    }


def test_a_run_shows_what_it_has_left_and_a_comparison_what_differs(desk: Desk) -> None:
    page = desk.see(f"runs/{desk.job}")
    expect(page.get_by_text("best", exact=True)).to_be_visible()
    expect(page.get_by_text("0.75")).to_be_visible()
    with page.expect_download() as loaded:
        page.get_by_role("link", name="notes.txt").click()
    assert loaded.value.path().read_text() == "all\n"
    desk.go(page, f"compare?runs={desk.federated},{desk.job}")
    expect(page.get_by_role("cell", name="rounds", exact=True)).to_be_visible()
    for nothing in ("container", "secrets", "requirements", "preemptible"):
        expect(page.get_by_role("cell", name=nothing, exact=True)).to_have_count(0)
    # Whole words, however narrow the column of names is.
    tall = page.get_by_text("clients.over_select").bounding_box()
    assert tall is not None
    assert tall["height"] < 25


def test_a_machine_of_a_cluster_and_one_that_drains_are_told_as_such(desk: Desk) -> None:
    call = desk.place.client.call
    call("POST", "/v1/clusters", {"name": "kept", "devices": ["south-1"]})
    try:
        page = desk.see("fleet")
        card = page.locator(".machine").filter(has_text="south-1")
        expect(card).to_contain_text("of the cluster kept")
        desk.go(page, "about")
        # north-1 drains; machines that other tests have let join are gone again.
        expect(page.get_by_text(re.compile(r"^2 of \d online$"))).to_be_visible()
    finally:
        call("DELETE", "/v1/clusters/kept")


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_fits_the_screen_and_meets_wcag_aa(desk: Desk, look: str) -> None:
    size, scheme = LOOKS[look]
    page = desk.window(size=size, scheme=scheme, as_="admin")
    PICTURES.mkdir(exist_ok=True)
    for name, path in paths(desk).items():
        desk.go(page, path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        if name in ("federated", "recorded", "compare"):
            expect(page.locator(".plot canvas").first).to_be_visible()
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wider <= 0, f"{name} is {wider} px wider than the screen"
        assert not violations(page), name
        page.screenshot(path=PICTURES / f"{name}-{look}.png", full_page=True)
