// SPDX-License-Identifier: Apache-2.0
// The fleet as a map: one square a machine, by the value of a label.

import { fill, h, soon } from "./dom.js";
import { merge } from "./fleet.js";
import { count, plural } from "./format.js";

export async function show(page) {
  const devices = new Map();
  const chosen = h("select", { id: "label" });
  const map = h("div", { class: "map" });
  const said = h("p", { class: "none", role: "status" });
  page.root.append(
    h("div", { class: "filters" }, h("label", { for: "label" }, "By label"), chosen),
    h("ul", { class: "legend" }, ["online", "busy", "draining", "offline"].map((state) => h("li", {}, h("i", { class: `key square ${state}` }), state))),
    said,
    map,
  );

  const looks = (device) => (device.status === "online" && device.tasks.length ? "busy" : device.status);

  function draw() {
    const names = [...new Set([...devices.values()].flatMap((device) => Object.keys(device.labels)))].sort();
    const wanted = chosen.value || page.query.get("by") || names[0] || "";
    if ([...chosen.options].map((option) => option.value).join() !== names.join()) {
      fill(chosen, names.map((name) => h("option", { value: name, selected: name === wanted }, name)));
    }
    said.textContent = names.length ? "" : "No machine wears a label. An admin puts them on, on a machine's page.";
    const groups = new Map();
    for (const device of devices.values()) {
      if (device.status === "revoked") continue;
      const value = device.labels[wanted] ?? "";
      if (!groups.has(value)) groups.set(value, []);
      groups.get(value).push(device);
    }
    const held = document.activeElement?.dataset?.id;
    fill(
      map,
      [...groups].sort(([a], [b]) => (a === "") - (b === "") || a.localeCompare(b, undefined, { numeric: true })).map(([value, members]) => {
        const here = members.filter((device) => device.status !== "offline").length;
        const gpus = members.reduce((sum, device) => sum + device.capacity.gpus.length, 0);
        return h(
          "section",
          { class: "group" },
          h("h2", {}, value ? `${wanted}=${value}` : wanted ? `without ${wanted}` : "all machines"),
          h("p", { class: "none" }, `${count(here)} of ${plural(members.length, "machine")} online, ${plural(gpus, "GPU")}`),
          h(
            "ul",
            { class: "squares" },
            members.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true })).map((device) =>
              h("li", {}, h("a", {
                href: `#/devices/${encodeURIComponent(device.id)}`,
                class: `square ${looks(device)}`,
                title: `${device.name}: ${looks(device)}`,
                "aria-label": `${device.name}: ${looks(device)}`,
                data: { id: device.id },
              })),
            ),
          ),
        );
      }),
    );
    if (held) map.querySelector(`[data-id="${CSS.escape(held)}"]`)?.focus();
  }

  async function read() {
    devices.clear();
    for (const device of (await page.get("/v1/devices")).devices) devices.set(device.id, device);
    draw();
  }

  const readSoon = soon(() => page.again(read), 300);
  const drawSoon = soon(draw, 500);
  chosen.addEventListener("change", draw);
  await page.watch("devices", read, (line) => {
    const key = () => [...devices.values()].map((device) => [device.id, looks(device), JSON.stringify(device.labels)].join()).join(";");
    const before = key();
    if (merge(devices, line.devices ?? []) || line.gone?.some((id) => devices.has(id))) readSoon();
    else if (key() !== before) drawSoon();
  });
}
