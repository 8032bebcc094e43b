// SPDX-License-Identifier: Apache-2.0
// One machine: its readings, its hardware, and what an admin may do with it.

import { call } from "./api.js";
import { ask, field } from "./dialog.js";
import { fill, h } from "./dom.js";
import { card, merge } from "./fleet.js";
import { bytes, moment, plural } from "./format.js";
import { facts, section } from "./parts.js";

export async function show(page) {
  let device;
  const path = `/v1/devices/${encodeURIComponent(page.rest)}`;
  const actions = h("span");
  const live = h("ul", { class: "machines one" });
  const below = h("div");
  let shown = null;

  async function read() {
    device = await page.get(path);
    fill(page.root, page.heading(device.name, actions), live, below);
    shown = card(device);
    fill(live, shown.element);
    drawActions();
    const hardware = device.hardware ?? {};
    const machine = hardware.machine ?? {};
    const accelerators = hardware.accelerators ?? {};
    fill(
      below,
      section(
        "What its owner lets out",
        facts([
          ["tasks at a time", device.capacity.slots],
          ["CPUs", device.capacity.cpus],
          ["memory", bytes(device.capacity.memory_bytes)],
          ["disk", bytes(device.capacity.disk_bytes)],
          ["GPUs", device.capacity.gpus.map((gpu) => `${gpu.name}, ${bytes(gpu.memory_bytes)}`).join("; ") || "none"],
          ["kinds of task", device.capacity.kinds.join(", ")],
        ]),
      ),
      section(
        "The machine",
        facts([
          ["id", device.id],
          ["host name", machine.hostname],
          ["system", [machine.os, machine.kernel, machine.arch].filter(Boolean).join(", ")],
          ["processor", hardware.cpu?.model],
          ["GPU driver", accelerators.driver ? `${accelerators.driver}, CUDA ${accelerators.cuda ?? "unknown"}` : accelerators.absent],
          ["free disk", device.disk_free_bytes === null ? null : bytes(device.disk_free_bytes)],
          ["agent", device.agent_version],
          ["joined", moment(device.enrolled_at)],
          ["certificate until", moment(device.certificate_expires_at)],
        ]),
      ),
    );
  }

  function drawActions() {
    if (!page.may("admin") || device.status === "revoked") return fill(actions);
    const draining = device.status === "draining";
    return fill(
      actions,
      h("button", { type: "button", onclick: () => drain(!draining) }, draining ? "Take tasks again" : "Drain"),
      h("button", { type: "button", onclick: label }, "Labels"),
      h("button", { type: "button", class: "danger", onclick: revoke }, "Revoke"),
    );
  }

  async function drain(on) {
    const done = await ask({
      title: on ? `Drain ${device.name}?` : `Let ${device.name} take tasks again?`,
      content: h("p", {}, on ? "It gets nothing more; what runs on it goes on." : "It gets tasks like every other machine."),
      yes: on ? "Drain" : "Take tasks",
      work: () => call("POST", `${path}/drain`, { on }),
    });
    if (done) await page.again(read);
  }

  async function label() {
    const box = h("textarea", { name: "labels", rows: 6, spellcheck: "false" });
    box.value = Object.entries(device.labels).map((pair) => pair.join("=")).join("\n");
    const done = await ask({
      title: `Labels of ${device.name}`,
      content: field("One on each line, NAME=VALUE", box),
      yes: "Save",
      work: (form) => {
        const put = Object.fromEntries(
          form.get("labels").split("\n").map((line) => line.trim()).filter(Boolean)
            .map((line) => [line.split("=")[0], line.split("=").slice(1).join("=")]),
        );
        return call("POST", `${path}/labels`, { put, remove: Object.keys(device.labels).filter((name) => !(name in put)) });
      },
    });
    if (done) await page.again(read);
  }

  async function revoke() {
    const done = await ask({
      title: `Revoke ${device.name}?`,
      content: h("p", {}, `It is shut out at once, with ${plural(device.tasks.length, "task")} on it. To come back it must log in with a new key.`),
      yes: "Revoke",
      danger: true,
      work: () => call("POST", `${path}/revoke`),
    });
    if (done) await page.again(read);
  }

  await page.watch("devices", read, (line) => {
    if (line.gone?.includes(device?.id)) page.again(read);
    const mine = line.devices?.filter((row) => row.id === device?.id) ?? [];
    if (!mine.length) return;
    const before = device.status;
    merge(new Map([[device.id, device]]), mine);
    shown.set(device);
    if (device.status !== before) drawActions();
  });
}
