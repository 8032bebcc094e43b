// SPDX-License-Identifier: Apache-2.0
// The metrics of a run, by name: of its rounds, and what its tasks have logged.

import { getIfThere } from "./api.js";

/** A map from a metric's name to its points [[step, value], …]. */
export async function measures(run, signal) {
  const found = new Map();
  for (const round of run.rounds ?? []) {
    for (const [name, y] of Object.entries(round.metrics)) {
      if (!name.endsWith("examples")) push(found, name, [round.round, y]);
    }
  }
  const logged = await getIfThere(`/v1/runs/${encodeURIComponent(run.id)}/metrics`, signal);
  for (const series of logged?.series ?? []) {
    for (const [step, y] of series.points) push(found, series.name, [step, y]);
  }
  return found;
}

function push(found, name, point) {
  if (!found.has(name)) found.set(name, []);
  found.get(name).push(point);
}
