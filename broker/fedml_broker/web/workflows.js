// SPDX-License-Identifier: Apache-2.0
// All workflows, the newest first, each with how far it has come.

import { fill, h, soon, table } from "./dom.js";
import { chip, when } from "./parts.js";
import { took } from "./runlist.js";

const MOST = 100;
// Where a step stands, the most telling first.
const ORDER = ["FAILED", "STOPPED", "RUNNING", "STARTING", "WAITING", "FINISHED", "SKIPPED"];

export const flowLink = (flow) => h("a", { href: `#/workflows/${encodeURIComponent(flow.id)}` }, flow.name || flow.id);

/** How many steps stand where: "2 finished, 1 running". */
function stands(steps) {
  const states = Object.values(steps);
  const counts = ORDER.map((state) => [state, states.filter((one) => one === state).length]);
  return counts.filter(([, n]) => n).map(([state, n]) => `${n} ${state.toLowerCase()}`).join(", ");
}

export async function show(page) {
  const said = h("p", { class: "none", role: "status" });
  const where = h("div");
  page.root.append(said, where);

  async function read() {
    const { workflows } = await page.get(`/v1/workflows?limit=${MOST}`);
    const { element, body, row } = table("Workflows", ["Workflow", "State", "Steps", "User", "Asked for", "Took"]);
    for (const flow of workflows) {
      body.append(row([[flowLink(flow), h("small", { class: "id" }, flow.id)], chip(flow.state), stands(flow.steps), flow.user, when(flow.created_at), took(flow)], { data: { id: flow.id } }));
    }
    said.textContent = workflows.length ? "" : "No workflows yet: fedml workflow run pipeline.yaml starts one.";
    fill(where, workflows.length ? element : null);
  }

  // Whatever moves a workflow is a change of one of its runs.
  const again = soon(() => page.again(read), 500);
  await page.watch("runs", read, (line) => {
    if (line.runs || line.gone) again();
  });
}
