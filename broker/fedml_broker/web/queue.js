// SPDX-License-Identifier: Apache-2.0
// What waits, and for what.

import { fill, h, soon, table } from "./dom.js";
import { plural } from "./format.js";
import { asked, name, stopButton } from "./runlist.js";

const MOST = 200;

export async function show(page) {
  const may = page.may("member");
  const said = h("p", { class: "none", role: "status" });
  const where = h("div");
  page.root.append(said, where);

  async function read() {
    const open = (await page.get(`/v1/runs?state=QUEUED,RUNNING&limit=${MOST}`)).runs;
    const waiting = open.filter((run) => run.state === "QUEUED" || run.waiting);
    // Places in line where the broker tells them; otherwise who came first is first.
    waiting.sort((a, b) => (a.position ?? Infinity) - (b.position ?? Infinity) || a.created_at - b.created_at);
    const placed = waiting.some((run) => run.position !== undefined && run.position !== null);
    const ranked = waiting.some((run) => run.priority !== undefined && run.priority !== null);
    said.textContent = waiting.length ? `${plural(waiting.length, "run waits", "runs wait")}.` : "Nothing waits.";
    const columns = ["Run", "User", "Since", "Waits for"];
    if (placed) columns.unshift("Place");
    if (ranked) columns.splice(-1, 0, "Priority");
    if (may) columns.push(["Actions", "end"]);
    const { element, body, row } = table("Runs that wait", columns);
    for (const run of waiting) {
      const cells = [name(run), run.user, asked(run), run.waiting || "its turn"];
      if (placed) cells.unshift(run.position ?? "–");
      if (ranked) cells.splice(-1, 0, run.priority ?? "–");
      if (may) cells.push(stopButton(run));
      body.append(row(cells, { data: { id: run.id } }));
    }
    fill(where, waiting.length ? element : null);
  }

  const again = soon(() => page.again(read), 500);
  await page.watch("runs", read, (line) => {
    if (line.runs || line.gone) again();
  });
}
