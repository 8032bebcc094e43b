// SPDX-License-Identifier: Apache-2.0
// The broker itself.

import { h } from "./dom.js";
import { count, duration } from "./format.js";
import { facts, section } from "./parts.js";

export async function show(page) {
  const status = await page.get("/v1/status");
  page.root.append(
    section(
      "This broker",
      facts([
        ["version", status.version],
        ["address", status.url],
        ["MQTT", status.mqtt],
        ["up", duration(status.up_s)],
        ["machines", `${count(status.online)} of ${count(status.devices)} online`],
        ["runs", Object.entries(status.runs).map(([state, n]) => `${count(n)} ${state.toLowerCase()}`).join(", ") || "none yet"],
        ["refused messages", count(status.refused_messages)],
      ]),
    ),
    section(
      "You",
      facts([["name", page.session.name], ["role", page.session.role], ["tenant", page.session.tenant]]),
    ),
    section(
      "More",
      h("p", {}, "Everything here is also in ", h("a", { href: "/v1/openapi.json" }, "the API"), " and in the commands fedml and fedml-broker."),
      h("p", {}, "Charts are drawn by uPlot, © Leon Sorokin, under ", h("a", { href: new URL("uplot.LICENSE.txt", import.meta.url).pathname }, "the MIT licence"), "."),
    ),
  );
}
