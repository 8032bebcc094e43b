// SPDX-License-Identifier: Apache-2.0
// All machines, as they are at this moment.

import { fill, h, soon } from "./dom.js";
import { bytes, count, percent, plural } from "./format.js";
import { bar, chip, deviceLink, labels, runOfTask, when } from "./parts.js";

// So many are drawn before the browser may paint; the others follow in pieces.
const FIRST = 40;
const PIECE = 150;
const ORDER = { online: 0, draining: 1, offline: 2, revoked: 3 };

/** One machine's card; `set` brings it up to date. Also the head of a machine's own page. */
export function card(device) {
  const state = h("span");
  const load = bar(0, "");
  const memory = bar(0, "");
  const gpus = new Map();
  const gpuList = h("ul", { class: "gpus" });
  const said = h("div", { class: "said" });
  const tasks = h("div", { class: "tasks" });
  const marks = h("div", { class: "labels" });
  const element = h(
    "li",
    { class: "machine", data: { id: device.id } },
    h("div", { class: "title" }, h("h2", {}, deviceLink(device.id, device.name)), state),
    marks,
    h("div", { class: "gauge" }, h("span", {}, "CPU"), load.nodes),
    h("div", { class: "gauge" }, h("span", {}, "Memory"), memory.nodes),
    gpuList,
    tasks,
    said,
  );

  for (const gpu of device.capacity.gpus) {
    const busy = bar(0, "");
    const held = bar(0, "");
    const heat = h("span", { class: "heat" });
    gpus.set(gpu.uuid, { gpu, busy, held, heat });
    gpuList.append(
      h(
        "li",
        {},
        h("div", { class: "gpu" }, h("span", {}, gpu.name), heat),
        h("div", { class: "gauge" }, h("span", {}, "Busy"), busy.nodes),
        h("div", { class: "gauge" }, h("span", {}, "Memory"), held.nodes),
      ),
    );
  }

  const shown = {};
  // Rebuilt only when it says something else: a link that somebody is about to press stays.
  const change = (name, key, draw) => {
    if (shown[name] !== key) {
      shown[name] = key;
      draw();
    }
  };

  function set(now) {
    const here = now.status === "online" || now.status === "draining";
    change("state", now.status, () => fill(state, chip(now.status)));
    element.classList.toggle("away", !here);
    change("labels", JSON.stringify(now.labels), () => fill(marks, labels(now.labels)));
    const cpu = here ? now.cpu_percent ?? 0 : 0;
    load.set(cpu, here ? `${percent(cpu)} of ${plural(now.capacity.cpus, "CPU")}` : plural(now.capacity.cpus, "CPU"));
    const all = now.memory_bytes ?? now.capacity.memory_bytes;
    const used = here ? now.memory_used_bytes ?? 0 : 0;
    memory.set((100 * used) / all, here && used ? `${bytes(used)} of ${bytes(all)}` : bytes(all));
    for (const [uuid, row] of gpus) {
      const read = here ? now.gpus.find((gpu) => gpu.uuid === uuid) : undefined;
      row.busy.set(read?.utilisation_percent ?? 0, read ? percent(read.utilisation_percent) : "–");
      const size = row.gpu.memory_bytes;
      row.held.set(
        (100 * (read?.memory_used_bytes ?? 0)) / size,
        read ? `${bytes(read.memory_used_bytes)} of ${bytes(size)}` : bytes(size),
      );
      const heat = read?.temperature_c ? `${Math.round(read.temperature_c)} °C` : "";
      if (row.heat.textContent !== heat) row.heat.textContent = heat;
      row.heat.classList.toggle("hot", (read?.temperature_c ?? 0) >= 85);
    }
    change("tasks", now.tasks.join(), () =>
      fill(
        tasks,
        now.tasks.length ? `${plural(now.tasks.length, "task")}: ` : "no tasks",
        now.tasks.map((task) => {
          const run = runOfTask(task);
          return [run ? h("a", { href: `#/runs/${run}` }, run) : task, " "];
        }),
      ),
    );
    change("said", `${now.refusing} ${now.cluster} ${here || now.last_seen_at}`, () =>
      fill(
        said,
        now.cluster ? h("span", {}, `of the cluster ${now.cluster}`, now.refusing || !here ? "; " : null) : null,
        now.refusing ? `takes nothing: ${now.refusing}` : null,
        here ? null : ["last seen ", now.last_seen_at ? when(now.last_seen_at) : "never"],
      ),
    );
  }

  set(device);
  return { element, set };
}

/** Lay live rows over what is known; whether one of them is new here. */
export function merge(known, rows) {
  let strange = false;
  for (const row of rows) {
    const device = known.get(row.id);
    if (device === undefined) strange = true;
    else {
      const left = device.status === "online" && row.status === "offline";
      Object.assign(device, row, left ? { last_seen_at: Date.now() / 1000 } : {});
    }
  }
  return strange;
}

export async function show(page) {
  const devices = new Map();
  const cards = new Map();
  const tiles = h("div", { class: "tiles" });
  const list = h("ul", { class: "machines" });
  const none = h("p", { class: "none", role: "status" });
  const words = h("input", { type: "search", placeholder: "name, label, GPU", "aria-label": "Filter machines" });
  const state = h(
    "select",
    { "aria-label": "State" },
    ["any state", "online", "draining", "offline", "revoked"].map((text) => h("option", { value: text === "any state" ? "" : text }, text)),
  );
  words.value = page.query.get("q") ?? "";
  page.root.append(tiles, h("div", { class: "filters", role: "search" }, words, state), none, list);

  const fits = (device) => {
    const text = [device.name, device.id, ...Object.entries(device.labels).map((pair) => pair.join("=")), ...device.capacity.gpus.map((gpu) => gpu.name)].join(" ").toLowerCase();
    return (!state.value || device.status === state.value) && words.value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  };

  function total() {
    const all = [...devices.values()];
    const here = all.filter((device) => device.status === "online" || device.status === "draining");
    const gpus = here.reduce((sum, device) => sum + device.capacity.gpus.length, 0);
    const readings = here.flatMap((device) => device.gpus);
    const busy = readings.length ? readings.reduce((sum, gpu) => sum + gpu.utilisation_percent, 0) / readings.length : null;
    const tasks = here.reduce((sum, device) => sum + device.tasks.length, 0);
    const slots = here.reduce((sum, device) => sum + device.capacity.slots, 0);
    const tile = (name, value, more) => h("div", { class: "tile" }, h("b", {}, value), h("span", {}, name), h("small", {}, more));
    fill(
      tiles,
      tile("machines online", count(here.length), `of ${count(all.length)}`),
      tile("GPUs", count(gpus), busy === null ? "on machines online" : `${percent(busy)} busy`),
      tile("tasks", count(tasks), `of ${count(slots)} slots`),
    );
  }

  let drawing = 0;
  function draw() {
    const turn = ++drawing;
    const shown = [...devices.values()]
      .filter(fits)
      .sort((a, b) => ORDER[a.status] - ORDER[b.status] || a.name.localeCompare(b.name, undefined, { numeric: true }));
    none.textContent = devices.size === 0
      ? "No machine has joined yet. An admin makes a key under Users & keys; then, on a machine: fedml-agent login KEY, fedml-agent run."
      : shown.length === 0 ? "No machine fits the filter." : "";
    list.replaceChildren();
    const some = (from, to) => {
      if (turn !== drawing || page.signal.aborted) return;
      list.append(
        ...shown.slice(from, to).map((device) => {
          if (!cards.has(device.id)) cards.set(device.id, card(device));
          return cards.get(device.id).element;
        }),
      );
      if (to < shown.length) setTimeout(some, 0, to, to + PIECE);
    };
    some(0, FIRST);
  }

  async function read() {
    const found = (await page.get("/v1/devices")).devices;
    devices.clear();
    for (const device of found) devices.set(device.id, device);
    for (const id of cards.keys()) if (!devices.has(id)) cards.delete(id);
    for (const [id, shown] of cards) shown.set(devices.get(id));
    total();
    draw();
  }

  const readSoon = soon(() => page.again(read), 300);
  const totalSoon = soon(total, 300);
  const drawSoon = soon(draw, 400);
  words.addEventListener("input", soon(draw, 120));
  state.addEventListener("change", draw);

  await page.watch("devices", read, (line) => {
    const before = new Map([...devices].map(([id, device]) => [id, device.status]));
    if (merge(devices, line.devices ?? []) || line.gone?.some((id) => devices.has(id))) readSoon();
    let moved = false;
    for (const row of line.devices ?? []) {
      const device = devices.get(row.id);
      if (device === undefined) continue;
      cards.get(row.id)?.set(device);
      moved ||= before.get(row.id) !== device.status;
    }
    if (moved) drawSoon();
    if (line.devices) totalSoon();
  });
}
