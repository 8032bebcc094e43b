// SPDX-License-Identifier: Apache-2.0
// What waits, and for what.

import { fill, h, soon, table } from "./dom.js";
import { plural } from "./format.js";
import { asked, name, stopButton } from "./runlist.js";

const MOST = 200;
const NAMED = 4;

/** In words; of a job machine by machine, those that say the same together. */
function waitsFor(run) {
  const alike = new Map();
  for (const [machine, why] of Object.entries(run.reasons ?? {})) {
    alike.set(why, [...(alike.get(why) ?? []), machine]);
  }
  if (!alike.size) return run.waiting || "its turn";
  const most = [...alike].sort((a, b) => b[1].length - a[1].length);
  return most.map(([why, machines]) => {
    const who = machines.length > NAMED
      ? h("details", {}, h("summary", {}, `${machines.length} machines`), machines.join(", "))
      : machines.join(", ");
    return h("div", {}, h("span", { class: "reason" }, why), h("small", { class: "id" }, who));
  });
}

export async function show(page) {
  const may = page.may("member");
  const said = h("p", { class: "none", role: "status" });
  const where = h("div");
  page.root.append(said, where);

  async function read() {
    const [{ queue }, { runs }] = await Promise.all([
      page.get(`/v1/queue?limit=${MOST}`),
      page.get(`/v1/runs?state=QUEUED,RUNNING&limit=${MOST}`),
    ]);
    // In line are jobs. What else waits (a federated run for its clients, say) has no place there.
    const inLine = new Set(queue.map((run) => run.id));
    const others = runs.filter((run) => !inLine.has(run.id) && (run.state === "QUEUED" || run.waiting));
    const waiting = [...queue, ...others.sort((a, b) => a.created_at - b.created_at)];
    said.textContent = waiting.length ? `${plural(waiting.length, "run waits", "runs wait")}.` : "Nothing waits.";
    const columns = ["Place", "Run", "User", "Since", "Priority", "Waits for"];
    if (may) columns.push(["Actions", "end"]);
    const { element, body, row } = table("Runs that wait", columns);
    for (const run of waiting) {
      const place = run.position ?? "–";
      const cells = [place, name(run), run.user, asked(run), run.priority ?? "–", waitsFor(run)];
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
