// SPDX-License-Identifier: Apache-2.0
// All runs, the newest first: found, paged through, chosen to be compared.

import { fill, h, soon, table } from "./dom.js";
import { asked, name, state, took } from "./runlist.js";
import { choice } from "./dialog.js";

const PAGE = 50;
const STATES = ["", "QUEUED", "RUNNING", "FINISHED", "FAILED", "STOPPED", "LOST"];

export async function show(page) {
  const query = page.query;
  const words = h("input", { type: "search", name: "name", placeholder: "name or id", "aria-label": "Name or id" });
  const user = h("input", { type: "search", name: "user", placeholder: "user", "aria-label": "User" });
  const states = choice("state", STATES.map((text) => [text, text ? text.toLowerCase() : "any state"]), query.get("state") ?? "");
  states.setAttribute("aria-label", "State");
  words.value = query.get("name") ?? "";
  user.value = query.get("user") ?? "";
  const before = query.get("before") ?? "";
  const chosen = new Set();
  const compare = h("a", { class: "button", role: "link", "aria-disabled": "true" }, "Compare");
  const older = h("a", { class: "button" }, "Older");
  const newest = h("a", { class: "button" }, "Newest");
  const said = h("p", { class: "none", role: "status" });
  const where = h("div");
  let runs = [];
  const rows = new Map();

  const address = (more) => {
    const given = { state: states.value, name: words.value.trim(), user: user.value.trim(), ...more };
    const text = new URLSearchParams(Object.entries(given).filter(([, value]) => value));
    return `#/runs${text.size ? `?${text}` : ""}`;
  };
  const filter = h(
    "form",
    { class: "filters", role: "search", onsubmit: (event) => { event.preventDefault(); location.hash = address({}); } },
    words, user, states, h("button", {}, "Find"),
  );
  states.addEventListener("change", () => (location.hash = address({})));
  page.root.append(filter, said, where, h("div", { class: "paging" }, newest, older, compare));

  function drawChosen() {
    compare.textContent = chosen.size ? `Compare ${chosen.size} runs` : "Compare: choose runs";
    compare.setAttribute("aria-disabled", chosen.size < 2);
    if (chosen.size >= 2) compare.href = `#/compare?runs=${[...chosen].join(",")}`;
    else compare.removeAttribute("href");
  }

  function fillRow(run) {
    const { row } = fillRow.table;
    const box = h("input", { type: "checkbox", "aria-label": `Compare ${run.name} ${run.id}` });
    box.checked = chosen.has(run.id);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(run.id);
      else chosen.delete(run.id);
      drawChosen();
    });
    const element = row([box, name(run), run.kind, state(run), run.user, asked(run), took(run)], { data: { id: run.id } });
    rows.get(run.id)?.replaceWith(element);
    rows.set(run.id, element);
    return element;
  }

  async function read() {
    const asks = new URLSearchParams({ limit: PAGE + 1 });
    for (const name of ["state", "name", "user", "before"]) if (query.get(name)) asks.set(name, query.get(name));
    const found = (await page.get(`/v1/runs?${asks}`)).runs;
    const more = found.length > PAGE;
    runs = found.slice(0, PAGE);
    fillRow.table = table("Runs", [["Compare", "tick"], "Run", "Kind", "State", "User", "Asked for", "Took"]);
    rows.clear();
    fillRow.table.body.append(...runs.map(fillRow));
    fill(where, runs.length ? fillRow.table.element : null);
    said.textContent = runs.length ? "" : filter_is_empty() ? "No runs yet: fedml launch job.yaml starts one." : "No run fits.";
    older.hidden = !more;
    if (more) older.href = address({ before: runs.at(-1).id });
    newest.hidden = !before;
    newest.href = address({});
    drawChosen();
  }

  const filter_is_empty = () => !["state", "name", "user", "before"].some((name) => query.get(name));
  const again = soon(() => page.again(read), 500);
  page.every(5, () => {
    for (const run of runs) if (run.started_at && !run.ended_at) rows.get(run.id)?.lastChild.firstChild.replaceChildren(took(run));
  });
  await page.watch("runs", read, (line) => {
    let strange = line.gone?.some((id) => rows.has(id));
    for (const run of line.runs ?? []) {
      const i = runs.findIndex((known) => known.id === run.id);
      if (i < 0) strange ||= !before;
      else if (query.get("state") && query.get("state") !== run.state) strange = true;
      else {
        runs[i] = run;
        // Not while somebody is in it with the keyboard: the focus would be lost.
        if (!rows.get(run.id).contains(document.activeElement)) fillRow(run);
        else again();
      }
    }
    if (strange) again();
  });
}
