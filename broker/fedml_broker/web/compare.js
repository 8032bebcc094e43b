// SPDX-License-Identifier: Apache-2.0
// Several runs beside each other.

import { chart } from "./chart.js";
import { fill, h, table } from "./dom.js";
import { inOrder, measures } from "./measures.js";
import { moment, value } from "./format.js";
import { chip, runLink, section } from "./parts.js";
import { took } from "./runlist.js";

const MOST = 12;
// What differs in any two runs, and tells nothing.
const OWN = new Set(["run", "name", "package", "package.size", "package.sha256"]);
const NOTHING = new Set(["null", "", "[]", "{}"]);

export async function show(page) {
  const ids = (page.query.get("runs") ?? "").split(",").filter(Boolean).slice(0, MOST);
  if (!ids.length) {
    page.root.append(h("p", { class: "none" }, "Choose runs on the page Runs."));
    return;
  }
  const runs = await Promise.all(ids.map((id) => page.get(`/v1/runs/${encodeURIComponent(id)}`)));
  const found = await Promise.all(runs.map((run) => measures(run, page.signal)));
  const labelOf = (run) => (runs.filter((other) => other.name === run.name).length > 1 ? `${run.name} ${run.id}` : run.name);
  const { element, body, row } = table("Runs compared", ["What", ...runs.map(labelOf)]);
  const line = (name, cell) => body.append(row([h("b", {}, name), ...runs.map(cell)]));
  line("run", (run) => runLink(run));
  line("id", (run) => run.id);
  line("state", (run) => chip(run.state));
  line("user", (run) => run.user);
  line("asked for", (run) => moment(run.created_at));
  line("took", took);
  const specs = runs.map((run) => flat(run.spec));
  const keys = [...new Set(specs.flatMap((spec) => Object.keys(spec)))].sort();
  for (const key of keys) {
    const values = specs.map((spec) => (NOTHING.has(spec[key] ?? "") ? "–" : spec[key]));
    if (!OWN.has(key) && new Set(values).size > 1) line(key, (_, i) => values[i]);
  }
  const params = await Promise.all(runs.map(paramsOf(page)));
  for (const key of [...new Set(params.flatMap((map) => [...map.keys()]))].sort()) line(key, (_, i) => params[i].get(key) ?? "–");
  const names = inOrder(new Set(found.flatMap((map) => [...map.keys()])));
  const last = ([source, points]) => h("div", {}, value(points.at(-1)[1]), source ? h("small", { class: "id" }, ` ${source}`) : null);
  for (const name of names) line(`last ${name}`, (_, i) => found[i].get(name)?.map(last) ?? "–");
  page.root.append(element);
  const charts = h("div", { class: "charts" });
  page.root.append(section("Metrics", charts));
  fill(charts, names.length ? null : h("p", { class: "none" }, "None of them has metrics."));
  for (const name of names) {
    const lines = (run, i) => (found[i].get(name) ?? []).map(([source, points]) => [`${labelOf(run)} ${source}`.trim(), points]);
    const series = runs.flatMap(lines);
    charts.append(chart(page, name, "step", series).element);
  }
}

/** What a run has said of itself: a map from names to values. */
const paramsOf = (page) => async (run) => {
  const { params } = await page.get(`/v1/runs/${encodeURIComponent(run.id)}/params`);
  return new Map(params.map(({ source, name, value: x }) => [[source, name].filter(Boolean).join(" "), x]));
};

/** What they were asked with, one line each; JSON within texts is opened. */
function flat(spec, before = "") {
  const lines = {};
  for (let [key, x] of Object.entries(spec)) {
    if (typeof x === "string" && x.startsWith("{")) {
      try {
        x = JSON.parse(x);
      } catch { /* a text that begins like JSON, and is none */ }
    }
    if (x && typeof x === "object" && !Array.isArray(x)) Object.assign(lines, flat(x, `${before}${key}.`));
    else lines[before + key] = String(typeof x === "object" ? JSON.stringify(x) : x).slice(0, 200);
  }
  return lines;
}
