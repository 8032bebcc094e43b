// SPDX-License-Identifier: Apache-2.0
// Pieces that several pages are made of.

import { h } from "./dom.js";
import { ago, moment } from "./format.js";

const TONES = {
  online: "ok", FINISHED: "ok",
  RUNNING: "busy", STARTING: "busy",
  QUEUED: "wait", WAITING: "wait", OFFERED: "wait", LEASED: "wait", draining: "wait", active: "ok",
  offline: "off", STOPPED: "off", SKIPPED: "off",
  FAILED: "bad", LOST: "bad", revoked: "bad",
};

/** A state in words, with a dot in its colour. */
export function chip(state) {
  return h("span", { class: `chip ${TONES[state] ?? "off"}` }, state.toLowerCase());
}

/** A time that says how long ago it was, and goes on saying it. */
export function when(at) {
  if (at === null || at === undefined) return h("span", {}, "–");
  return h(
    "time",
    { datetime: new Date(at * 1000).toISOString(), title: moment(at), data: { at } },
    ago(at),
  );
}

export function retell(root = document) {
  for (const element of root.querySelectorAll("time[data-at]")) {
    const text = ago(Number(element.dataset.at));
    if (element.textContent !== text) element.textContent = text;
  }
}

/** A part of a whole as a bar; the text beside it says the same. */
export function bar(part, text) {
  const inside = h("span", {});
  const element = h("span", { class: "bar", "aria-hidden": "true" }, inside);
  const words = h("span", { class: "figure" });
  const set = (share, said) => {
    const width = Math.max(0, Math.min(100, Number.isFinite(share) ? share : 0));
    inside.style.width = `${width}%`;
    element.dataset.level = width >= 90 ? "high" : "normal";
    if (words.textContent !== said) words.textContent = said;
  };
  set(part, text);
  return { nodes: [element, words], set };
}

export const runLink = (run) => h("a", { href: `#/runs/${encodeURIComponent(run.id)}` }, run.name || run.id);
export const deviceLink = (id, name) => h("a", { href: `#/devices/${encodeURIComponent(id)}` }, name ?? id);

/** Names and values of one thing; empty values are left out. */
export function facts(pairs) {
  return h(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

export const labels = (of) =>
  Object.entries(of).sort().map(([name, value]) => h("span", { class: "label" }, `${name}=${value}`));

/** A section with a heading; a node in place of the text for what stands beside it. */
export function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), children);
}

/** The run of a task: `r-…-t` is a job's, a federated run's is its session's id. */
export const runOfTask = (task) => task.match(/^r-[a-z0-9]+/)?.[0] ?? null;
