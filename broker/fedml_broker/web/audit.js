// SPDX-License-Identifier: Apache-2.0
// Who did what, newest first; for admins.

import { fill, h, table } from "./dom.js";
import { moment } from "./format.js";

const PAGE = 100;

export async function show(page) {
  const user = h("input", { type: "search", placeholder: "user", "aria-label": "User" });
  const action = h("input", { type: "search", placeholder: "action: run.stop, device …", "aria-label": "Action" });
  const where = h("div");
  const older = h("button", { type: "button" }, "Older");
  const said = h("p", { class: "none", role: "status" });
  const { element, body, row } = table("Audit", [["No.", "number"], ["When", "whole"], ["Who", "whole"], ["What", "whole"], "To what", "Details"]);
  page.root.append(
    h(
      "form",
      { class: "filters", role: "search", onsubmit: (event) => { event.preventDefault(); page.again(read); } },
      user, action, h("button", {}, "Find"),
    ),
    said,
    where,
    h("div", { class: "paging" }, older),
  );

  async function read(before = null) {
    const asks = new URLSearchParams({ limit: PAGE });
    if (user.value.trim()) asks.set("user", user.value.trim());
    if (action.value.trim()) asks.set("action", action.value.trim());
    if (before !== null) asks.set("before", before);
    const { entries } = await page.get(`/v1/audit?${asks}`);
    if (before === null) body.replaceChildren();
    for (const entry of entries) {
      const details = Object.entries(entry.details).filter(([, x]) => x !== null && x !== "").map(([name, x]) => `${name}: ${typeof x === "object" ? JSON.stringify(x) : x}`);
      body.append(row([entry.n, moment(entry.at_ms / 1000), entry.actor, entry.action, entry.object, h("span", { class: "pre" }, details.join("\n"))]));
    }
    fill(where, body.childNodes.length ? element : null);
    said.textContent = body.childNodes.length ? "" : "Nothing fits.";
    older.hidden = entries.length < PAGE;
    older.onclick = () => page.again(() => read(entries.at(-1).n));
  }

  await read();
}
