# SPDX-License-Identifier: Apache-2.0
"""What happens is on the screen when it happens; and all of it by keyboard, from a key on."""

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.dashboard.conftest import EVIL, Desk


def test_a_run_comes_into_the_list_and_changes_its_state_there(desk: Desk) -> None:
    page = desk.see("runs")
    run = desk.place.launch(
        "read line < release; echo $line", name="gated", bootstrap="mkfifo release"
    )
    row = page.locator(f'tr[data-id="{run}"]')
    expect(row).to_contain_text("running")
    desk.place.client.call("POST", f"/v1/runs/{run}/stop")
    expect(row).to_contain_text("stopped")
    desk.place.client.call("DELETE", f"/v1/runs/{run}")
    expect(row).to_have_count(0)


def test_a_machine_that_dies_and_comes_back_is_seen_to(desk: Desk) -> None:
    page = desk.see("fleet")
    south = page.locator(".machine", has_text="south-1")
    expect(south).to_contain_text("online")
    expect(south).to_contain_text(re.compile(r"\d+ % of"))
    agent = desk.place.agents["south-1"]
    agent.freeze()  # it says nothing, and no connection ends
    try:
        expect(south).to_contain_text("offline")
        expect(south).to_contain_text("last seen")
    finally:
        agent.wake()
    expect(south).to_contain_text("online")


def test_gpus_are_shown_with_their_memory_and_temperature(desk: Desk) -> None:
    page = desk.see("fleet")
    north = page.locator(".machine", has_text="north-1")
    expect(north.locator(".gpus > li")).to_have_count(2)
    expect(north).to_contain_text("61 °C")
    expect(north).to_contain_text("of 80.0 GiB")


def test_a_log_grows_under_the_eyes_and_a_flood_of_it_stays_small(desk: Desk) -> None:
    page = desk.window(as_="admin")
    run = desk.place.launch(
        "mkfifo gate; echo first; read x < gate & p=$!; seq 400000; echo the last line; kill $p",
        name="flood",
    )
    desk.go(page, f"runs/{run}")
    log = page.get_by_role("log")
    expect(log).to_contain_text("the last line")
    size = log.evaluate("log => log.textContent.length")
    assert 1000 < size < 250_000
    assert log.evaluate("log => log.childNodes.length") < 60
    expect(page.get_by_text("The beginning is not shown")).to_be_visible()
    # The end of it is what one sees.
    assert log.evaluate("log => log.scrollHeight - log.scrollTop - log.clientHeight") < 50


def test_a_queued_run_says_what_it_waits_for_and_goes_when_it_can(desk: Desk) -> None:
    call = desk.place.client.call
    north = desk.place.agents["north-1"].device
    page = desk.see("queue")
    row = page.locator(f'tr[data-id="{desk.waiting}"]')
    expect(row).to_contain_text("drainingnorth-1")
    run = desk.place.launch("true", name="next in line", needs={"gpus": 1})
    mine = page.locator(f'tr[data-id="{run}"]')
    expect(mine).to_contain_text("has no GPU")
    mine.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(mine).to_have_count(0)
    assert desk.place.end(run)["stopped_by"] == "admin"
    assert call("GET", f"/v1/devices/{north}")["status"] == "draining"


def test_a_workflow_moves_under_the_eyes_and_is_stopped_there(desk: Desk, tmp_path: Path) -> None:
    hold = "until [ -e {} ]; do sleep 0.1; done"
    steps = [
        {"name": "first", "job": {"command": hold.format(tmp_path / "go")}},
        {"name": "second", "needs": ["first"], "job": {"command": "exec sleep 600"}},
    ]
    asked = {"name": "moving", "steps": steps}
    flow = desk.place.client.call("POST", "/v1/workflows", asked)["workflow"]
    page = desk.see("workflows")
    row = page.get_by_role("row").filter(has_text="moving")
    expect(row).to_contain_text("1 waiting")
    row.get_by_role("link").click()
    first, second = (page.get_by_role("row").filter(has_text=name) for name in ("first", "second"))
    expect(first.first).to_contain_text("running")
    (tmp_path / "go").touch()
    expect(first.first).to_contain_text("finished")
    expect(second.last).to_contain_text("running")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.get_by_text(f"fedml workflow resume {flow}")).to_be_visible()


def test_the_broker_goes_and_comes_back_and_the_page_with_it(desk: Desk) -> None:
    page = desk.see("fleet")
    expect(page.locator("#live")).to_have_text("live")
    desk.place.broker.kill()
    expect(page.locator("#live")).to_have_text("reconnecting…")
    said = desk.place.start_broker()
    assert said["dashboard"] == f"{desk.url}/"
    expect(page.locator("#live")).to_have_text("live")
    expect(page.locator(".machine", has_text="south-1")).to_contain_text("online")


def test_html_in_names_and_logs_stays_text(desk: Desk) -> None:
    page = desk.see("runs")
    expect(page.get_by_text(EVIL, exact=True)).to_be_visible()
    desk.go(page, f"runs/{desk.evil}")
    expect(page.get_by_role("log")).to_contain_text(EVIL)
    expect(page.get_by_role("heading", level=1)).to_have_text(EVIL)
    desk.go(page, f"compare?runs={desk.evil},{desk.job}")
    expect(page.get_by_text(EVIL, exact=True).first).to_be_visible()
    assert page.locator("main img, main script").count() == 0
    assert page.title() != "owned"


def test_from_a_login_key_to_a_finished_run_with_nothing_but_the_keyboard(desk: Desk) -> None:
    """The key for a machine is made, the machine joins, a run is seen to its end."""
    page = desk.window()
    page.goto(desk.url)
    expect(page.get_by_label("Your key")).to_be_focused()
    page.keyboard.type(desk.admin_key)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").wait_for()
    page.get_by_role("link", name="Users & keys").press("Enter")
    page.get_by_role("button", name="New login key").press("Enter")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Labels").press_sequentially("site=east")
    dialog.get_by_label("Labels").press("Enter")
    words = dialog.get_by_label("The key").input_value().split()
    assert words[:2] == ["fedml-agent", "login"]
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    page.get_by_role("link", name="Fleet").press("Enter")
    desk.place.login_key, kept = words[2], desk.place.login_key
    try:
        desk.place.agent("east-1")
    finally:
        desk.place.login_key = kept
    east = page.locator(".machine", has_text="east-1")
    expect(east).to_contain_text("online")
    expect(east).to_contain_text("site=east")
    run = desk.place.launch("echo well done", name="first", labels={"site": "east"})
    page.get_by_role("link", name="Runs", exact=True).press("Enter")
    link = page.locator(f'tr[data-id="{run}"]').get_by_role("link")
    link.press("Enter")
    expect(page.get_by_role("log")).to_contain_text("well done")
    expect(page.locator("#state")).to_have_text("finished")
    expect(page.get_by_role("link", name="east-1")).to_be_visible()
    desk.place.agents["east-1"].stop()
