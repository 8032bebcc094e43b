// SPDX-License-Identifier: Apache-2.0
// One run: how it came to where it is, what it prints, what it has learned, who has helped.

import { call, getIfThere } from "./api.js";
import { ask } from "./dialog.js";
import { fill, h, soon, table } from "./dom.js";
import { bytes, count, duration, moment, percent, plural, value } from "./format.js";
import { logTail } from "./log.js";
import { inOrder, measures, ofMachine } from "./measures.js";
import { chip, deviceLink, facts, section, when } from "./parts.js";
import { stopRun, took } from "./runlist.js";

const EVENTS = 200;
const TASKS = 100;
const TAIL = 200_000;

export async function show(page) {
  const id = page.rest;
  const path = `/v1/runs/${encodeURIComponent(id)}`;
  let run = await page.get(path);
  const names = new Map();
  const nameOf = (device) => names.get(device) ?? device;
  const federated = run.kind === "federate";

  const state = h("span", { id: "state" });
  const actions = h("span");
  const about = h("div");
  const line = h("div", { class: "timeline" });
  const waits = h("p", { class: "waits", role: "status" });
  const charts = h("div", { class: "charts" });
  const machine = h("div", { class: "charts" });
  const params = h("div");
  const clients = h("div");
  const artifacts = h("div");
  const tasks = h("div");
  const list = h("ol", { class: "events", tabindex: "0", "aria-label": "Events" });
  const log = logTail();
  const drawn = new Map();
  const known = new Map();
  let after = 0;
  const told = new Map();

  fill(
    page.root,
    page.heading(run.name, state, actions),
    about,
    section("Time line", line, waits),
    section("Parameters", params),
    section("Metrics", charts, h("details", {}, h("summary", {}, "Of the machine"), machine)),
    federated ? section("Clients", clients) : null,
    section("Log", log.nodes),
    section("Artifacts", artifacts),
    section("Tasks", tasks),
    section("Events", list),
  );

  function drawHead() {
    fill(state, chip(run.state));
    const open = run.ended_at === null;
    fill(
      actions,
      open && page.may("member") ? h("button", { type: "button", class: "danger", onclick: () => stopRun(run) }, "Stop") : null,
      !open && page.may("admin") ? h("button", { type: "button", class: "danger", onclick: remove }, "Delete") : null,
    );
    fill(
      about,
      facts([
        ["id", run.id],
        ["kind", run.kind],
        ["user", run.user],
        ["answers at", run.endpoint?.url],
        ["priority", run.priority],
        ["place in the queue", run.position],
        ["asked for", when(run.created_at)],
        ["took", took(run)],
        ["exit code", run.exit_code],
        ["stopped by", run.stopped_by],
        ...(run.kind === "federate" ? [] : Object.entries(run.outputs?.values ?? {})),
      ]),
      run.cause
        ? h(
            "div",
            { class: "trouble" },
            h("strong", {}, `${run.cause.message}`),
            run.cause.hint ? h("p", {}, run.cause.hint) : null,
            h("p", {}, `Whose fault: the ${run.cause.fault}'s.`),
            run.cause.traceback ? h("details", {}, h("summary", {}, "Traceback"), h("pre", {}, run.cause.traceback)) : null,
          )
        : null,
    );
  }

  function drawLine() {
    const end = run.ended_at ?? Date.now() / 1000;
    const begun = run.started_at ?? end;
    const parts = [["queued", run.created_at, begun, "wait"]];
    if (run.started_at) parts.push(["running", begun, end, "busy"]);
    const whole = Math.max(end - run.created_at, 0.001);
    const pieces = parts.map(([name, from, to, tone]) => {
      const piece = h("span", { class: `piece ${tone}` });
      // Never so narrow that it cannot be seen.
      piece.style.flexGrow = String(Math.max((to - from) / whole, 0.02));
      return [piece, h("li", {}, h("i", { class: `key ${tone}` }), `${name} ${duration(to - from)}, since ${moment(from)}`)];
    });
    fill(
      line,
      h("div", { class: "pieces", "aria-hidden": "true" }, pieces.map(([piece]) => piece)),
      h("ul", { class: "legend" }, pieces.map(([, words]) => words), h("li", {}, run.ended_at ? ["ended ", moment(run.ended_at), ": ", chip(run.state)] : chip(run.state))),
    );
  }

  function drawWaits(text, round) {
    const numbers = round ? `Round ${round.number}: ${round.answered} of ${round.asked} have answered, ${bytes(round.received_bytes)} received. ` : "";
    waits.textContent = numbers + (text ? `Waits: ${text}` : "");
  }

  function drawTasks() {
    const { element, body, row } = table("Tasks", ["Task", "State", "Machine", "Attempt", ...(federated ? ["Round"] : [])]);
    const shown = run.tasks.slice(-TASKS).reverse();
    for (const task of shown) {
      body.append(row([task.id, chip(task.state), task.device ? deviceLink(task.device, nameOf(task.device)) : "–", task.epoch, ...(federated ? [task.round ?? "–"] : [])]));
    }
    const more = run.tasks.length - shown.length;
    fill(tasks, shown.length ? element : h("p", { class: "none" }, "None yet."), more > 0 ? h("p", { class: "none" }, `${count(more)} before these.`) : null);
  }

  async function drawMetrics() {
    const found = await measures(run, page.signal);
    const names = inOrder(found.keys());
    machine.parentElement.hidden = !names.some(ofMachine);
    if (!names.some((name) => !ofMachine(name))) fill(charts, h("p", { class: "none" }, "None yet."));
    else if (!charts.querySelector("figure")) fill(charts);
    if (!names.length) return;
    const { chart } = await import("./chart.js");
    for (const name of names) {
      const series = found.get(name).map(([source, points]) => [source || name, points]);
      if (drawn.has(name)) drawn.get(name).set(series);
      else {
        const made = chart(page, name, federated ? "round" : "step", series);
        drawn.set(name, made);
        (ofMachine(name) ? machine : charts).append(made.element);
      }
    }
  }

  async function drawParams() {
    const found = (await getIfThere(`${path}/params`, page.signal))?.params ?? [];
    params.parentElement.hidden = !found.length;
    fill(params, facts(found.map((param) => [[param.source, param.name].filter(Boolean).join(" "), param.value])));
  }

  async function drawClients() {
    if (!federated) return;
    const found = (await page.get(`${path}/clients`)).clients;
    const all = found.reduce((sum, client) => sum + client.examples, 0);
    const { element, body, row } = table("What each client has brought", [
      ["Client", "number"], "Machine", ["Answered", "number"], ["Share", "number"], ["Sent to it", "number"], ["Received", "number"], "Latest",
    ]);
    for (const client of found) {
      const latest = Object.entries(client.metrics).filter(([name]) => !name.endsWith("examples")).slice(0, 3);
      body.append(
        row([
          client.client,
          client.device ? deviceLink(client.device, nameOf(client.device)) : "–",
          `${client.answered} of ${client.asked}${client.failed ? `, ${client.failed} failed` : ""}`,
          all ? percent((100 * client.examples) / all) : "–",
          bytes(client.sent_bytes),
          bytes(client.received_bytes),
          latest.map(([name, x]) => `${name} ${value(x)}`).join(", ") || "–",
        ]),
      );
    }
    const sum = (name) => bytes(found.reduce((total, client) => total + client[name], 0));
    fill(
      clients,
      found.length ? [element, h("p", { class: "none" }, `${sum("sent_bytes")} sent to clients, ${sum("received_bytes")} received. A share is that of the examples which the client's updates stand for.`)] : h("p", { class: "none" }, "None yet."),
    );
  }

  async function drawArtifacts() {
    const found = (await getIfThere(`${path}/artifacts`, page.signal))?.artifacts ?? [];
    const left = run.kind === "federate" ? [] : (run.outputs?.files ?? []);
    const models = (run.rounds ?? []).filter((round) => round.model && round.ended_at);
    const rows = [
      ...found.map((artifact) => ({ ...artifact, file: artifact.name.split("/").at(-1) })),
      ...left.map((one) => ({ ...one, name: one.path, at: run.ended_at, file: one.path.split("/").at(-1) })),
      ...models.slice(-20).reverse().map((round) => ({ name: `model after round ${round.round}`, ...round.model, at: round.ended_at, file: `${run.id}-${round.round}.safetensors` })),
    ];
    const { element, body, row } = table("Artifacts", ["Name", ["Size", "number"], "Made", "SHA-256"]);
    for (const one of rows) {
      // Its record may come before its bytes.
      const link = one.here === false ? `${one.name} (on its way)` : h("a", { href: `/v1/blobs/${one.sha256}`, download: one.file }, one.name);
      body.append(row([[link, one.source ? h("small", { class: "id" }, one.source) : null], bytes(one.size), when(one.at), h("code", {}, one.sha256.slice(0, 12))]));
    }
    fill(artifacts, rows.length ? element : h("p", { class: "none" }, "None yet."));
  }

  function tellEvent(event) {
    const { data } = event;
    const metrics = (of) => Object.entries(of ?? {}).map(([name, x]) => `${name} ${value(x)}`).join(", ");
    switch (event.kind) {
      case "state": return `is ${data.state.toLowerCase()}${data.exit_code === null || data.exit_code === undefined ? "" : `, exit code ${data.exit_code}`}`;
      case "started": return `started on ${data.name}${data.epoch > 1 ? `, attempt ${data.epoch}` : ""}`;
      case "answers": return `answers at ${data.url}`;
      case "silent": return `no longer answers at ${data.url}`;
      case "again": return `is queued again: ${data.why}`;
      case "noted": return `${data.name} says: ${data.text}`;
      case "stopping": return `${data.by} asked to stop it`;
      case "round_begins": return `round ${data.round} begins with ${plural(data.clients, "client")}`;
      case "round_ends": return `round ${data.round} ends: ${[`${data.replies} answers`, bytes(data.received_bytes), metrics(data.metrics)].filter(Boolean).join(", ")}`;
      case "metrics": return `of round ${data.round}: ${metrics(data.metrics)}`;
      case "recorded": return `says ${data.name}: ${JSON.stringify(data.data)}`;
      case "clients": return `clients: ${Object.values(data.names).join(", ")}`;
      default: return `${event.kind}: ${JSON.stringify(data)}`;
    }
  }

  function addEvent(event) {
    after = Math.max(after, event.id);
    list.prepend(h("li", {}, when(event.at), " ", h("span", { class: "pre" }, tellEvent(event))));
    while (list.childNodes.length > EVENTS) list.lastChild.remove();
  }

  function addLog(piece) {
    const key = `${piece.task}.${piece.epoch}.${piece.stream}`;
    const seen = told.get(key) ?? 0;
    if (piece.end <= seen) return;
    let { text } = piece;
    // After a cut the log comes again from before: what was shown is left out.
    if (piece.offset < seen) text = new TextDecoder().decode(new TextEncoder().encode(text).slice(seen - piece.offset));
    else if (piece.offset > 0 && seen === 0) log.lose();
    if (federated && known.get("from") !== key) {
      known.set("from", key);
      log.add(`── ${piece.task} ${piece.stream}\n`, "meta");
    }
    told.set(key, piece.end);
    log.add(text, piece.stream);
  }

  async function read() {
    run = await page.get(path);
    drawHead();
    drawLine();
    drawTasks();
    await Promise.all([drawParams(), drawMetrics(), drawClients(), drawArtifacts()]);
  }

  async function remove() {
    const done = await ask({
      title: "Delete this run?",
      content: h("p", {}, `${run.name} (${run.id}), with its logs and models. This cannot be undone.`),
      yes: "Delete",
      danger: true,
      work: () => call("DELETE", path),
    });
    if (done) location.hash = "#/runs";
  }

  const again = soon(() => page.again(read), 300);
  drawHead();
  drawLine();
  drawTasks();
  drawWaits(run.waiting);
  page.every(1, () => run.ended_at === null && drawLine());
  page.stream(
    () => `${path}/follow?after=${after}&tail=${TAIL}`,
    (item) => {
      if (item.event) {
        addEvent(item.event);
        again();
      } else if (item.log) addLog(item.log);
      else if (item.waiting !== undefined) drawWaits(item.waiting, item.round);
      else if (item.end) {
        drawWaits("");
        again();
        return true;
      }
      return false;
    },
  );
  const devices = await page.get("/v1/devices");
  for (const device of devices.devices) names.set(device.id, device.name);
  await read();
}
