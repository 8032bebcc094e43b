// SPDX-License-Identifier: Apache-2.0
// One workflow: its steps, what each needs, how it went and what it has left for the next.

import { call } from "./api.js";
import { ask } from "./dialog.js";
import { fill, h, soon, table } from "./dom.js";
import { bytes } from "./format.js";
import { chip, facts, section, when } from "./parts.js";
import { took } from "./runlist.js";

export async function show(page) {
  const path = `/v1/workflows/${encodeURIComponent(page.rest)}`;
  const state = h("span", { id: "state" });
  const actions = h("span");
  const about = h("div");
  const steps = h("div");
  let flow = await page.get(path);
  fill(page.root, page.heading(flow.name || flow.id, state, actions), about, section("Steps", steps));

  /** What a step has left: values, and files to download. */
  function left({ outputs }) {
    const values = Object.entries(outputs.values).map(([name, value]) => h("div", {}, `${name}=${value}`));
    const files = outputs.files.map((file) =>
      h("div", {}, h("a", { href: `/v1/blobs/${file.sha256}`, download: file.path.split("/").at(-1) }, file.path), h("small", {}, ` ${bytes(file.size)}`)),
    );
    return values.length || files.length ? [values, files] : "–";
  }

  function draw() {
    const open = flow.ended_at === null;
    fill(state, chip(flow.state));
    fill(actions, open && page.may("member") ? h("button", { type: "button", class: "danger", onclick: stop }, "Stop") : null);
    fill(
      about,
      facts([
        ["id", flow.id],
        ["user", flow.user],
        ["asked for", when(flow.created_at)],
        ["took", took(flow)],
        ["tries", flow.tries],
        ["stopped by", flow.stopped_by],
        ["goes on with", !open && flow.state !== "FINISHED" ? h("code", {}, `fedml workflow resume ${flow.id}`) : null],
      ]),
    );
    const { element, body, row } = table("Steps", ["Step", "Needs", "State", "Run", "Took", "Has left"]);
    for (const step of flow.steps) {
      const why = step.cause || step.waiting;
      body.append(
        row([
          [h("b", {}, step.name), h("small", { class: "id" }, step.kind)],
          step.needs.join(", ") || "–",
          [chip(step.state), why ? h("small", { class: "reason" }, why) : null],
          step.runs.length ? step.runs.map((run) => h("div", {}, h("a", { href: `#/runs/${encodeURIComponent(run)}` }, run))) : "–",
          took(step),
          left(step),
        ]),
      );
    }
    fill(steps, element);
  }

  async function stop() {
    await ask({
      title: `Stop ${flow.name || flow.id}?`,
      content: h("p", {}, "The runs of its steps are stopped, and no other begins. It can be resumed."),
      yes: "Stop",
      danger: true,
      work: () => call("POST", `${path}/stop`),
    });
  }

  const again = soon(() => page.again(async () => {
    flow = await page.get(path);
    draw();
  }), 300);
  draw();
  if (flow.ended_at === null) {
    page.stream(() => `${path}/follow`, (line) => {
      again();
      return "end" in line;
    });
    page.every(5, draw);
  }
}
