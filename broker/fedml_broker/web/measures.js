// SPDX-License-Identifier: Apache-2.0
// The metrics of a run, by name: of its rounds, and what its tasks have logged.

import { getIfThere } from "./api.js";

/** What a task logs of the machine that it runs on; the rest is what its author wanted to see. */
export const ofMachine = (name) => name.startsWith("system/");

/** A map from a metric's name to its lines [[source, [[step, value], …]], …]. */
export async function measures(run, signal) {
  const found = new Map();
  for (const round of run.rounds ?? []) {
    for (const [name, y] of Object.entries(round.metrics)) {
      if (!name.endsWith("examples")) lineOf(found, name, "").push([round.round, y]);
    }
  }
  const logged = await getIfThere(`/v1/runs/${encodeURIComponent(run.id)}/metrics`, signal);
  for (const { name, source, points } of logged?.series ?? []) lineOf(found, name, source).push(...points);
  return found;
}

/** The names of a map's metrics: of the machine last. */
export function inOrder(names) {
  return [...names].sort((a, b) => ofMachine(a) - ofMachine(b) || (a < b ? -1 : 1));
}

function lineOf(found, name, source) {
  if (!found.has(name)) found.set(name, []);
  const lines = found.get(name);
  let line = lines.find(([of]) => of === source);
  if (!line) lines.push((line = [source, []]));
  return line[1];
}
