// SPDX-License-Identifier: Apache-2.0
// Rows of runs that stay up to date, and the button that stops one.

import { call } from "./api.js";
import { ask } from "./dialog.js";
import { h } from "./dom.js";
import { duration } from "./format.js";
import { chip, runLink, when } from "./parts.js";

/** Ask, and stop a run. */
export function stopRun(run) {
  return ask({
    title: "Stop this run?",
    content: h("p", {}, `${run.name} (${run.id}) of ${run.user}. Its tasks are told to end; what they have done is kept.`),
    yes: "Stop",
    danger: true,
    work: () => call("POST", `/v1/runs/${run.id}/stop`),
  });
}

export const stopButton = (run) =>
  h("button", { type: "button", class: "small", "aria-label": `Stop ${run.name} ${run.id}`, onclick: () => stopRun(run) }, "Stop");

/** How long it ran, or has been running. */
export function took(run) {
  if (!run.started_at) return "–";
  return duration((run.ended_at ?? Date.now() / 1000) - run.started_at);
}

export const name = (run) => [runLink(run), h("small", { class: "id" }, run.id)];
export const state = (run) => [chip(run.state), run.waiting ? h("small", { class: "reason" }, run.waiting) : null];
export const asked = (run) => when(run.created_at);
