# SPDX-License-Identifier: Apache-2.0
"""Each page shows what there is, in light and dark and on a phone."""

import pytest
from playwright.sync_api import expect

from tests.dashboard.conftest import DESKTOP, PHONE, PICTURES, Desk, violations

PAGES = ("fleet", "queue", "runs", "labels", "people", "audit", "about")
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
    }


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
