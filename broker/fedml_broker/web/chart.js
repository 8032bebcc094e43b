// SPDX-License-Identifier: Apache-2.0
// Lines over steps, drawn by uPlot in the colours of the theme; the numbers stand below as a table.

import uPlot from "./uplot.js";
import { h, table } from "./dom.js";
import { value } from "./format.js";

const HEIGHT = 220;
// Between two marks on the axis of steps: there is no half one.
const WHOLE = [1, 2, 5].flatMap((first) => [...Array(12).keys()].map((zeros) => first * 10 ** zeros)).sort((a, b) => a - b);
const ROWS = 100;
// Told apart by colour and, where there are many, by dashes too.
const DASHES = [[], [], [], [], [], [], [8, 4], [8, 4], [8, 4], [8, 4], [8, 4], [8, 4]];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** `series`: a list of [name, [[x, y], …]]. */
export function chart(page, title, xName, series) {
  const place = h("div", { class: "plot", role: "img", "aria-label": `${title} over ${xName}: ${summary(series)}` });
  const numbers = h("details", {}, h("summary", {}, "Numbers"));
  const element = h("figure", { class: "chart" }, h("figcaption", {}, title), place, numbers);
  let plot = null;
  let data = null;

  function aligned() {
    const steps = [...new Set(series.flatMap(([, points]) => points.map(([x]) => x)))].sort((a, b) => a - b);
    return [
      steps,
      ...series.map(([, points]) => {
        const of = new Map(points);
        return steps.map((x) => of.get(x) ?? null);
      }),
    ];
  }

  function draw() {
    plot?.destroy();
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    plot = new uPlot(
      {
        width: Math.max(place.clientWidth, 200),
        height: HEIGHT,
        scales: { x: { time: false } },
        cursor: { points: { size: 7 } },
        axes: [{ ...axis, incrs: WHOLE, label: xName, labelSize: 18, size: 34 }, { ...axis, size: 62, values: (_, ticks) => ticks.map(value) }],
        series: [
          { label: xName },
          ...series.map(([name], i) => ({
            label: name,
            stroke: colour(`--line-${(i % 6) + 1}`),
            dash: DASHES[i % 12],
            width: 2,
            spanGaps: true,
            points: { show: data[0].length < 40 },
            value: (_, y) => (y === null || y === undefined ? "–" : value(y)),
          })),
        ],
      },
      data,
      place,
    );
  }

  function tell() {
    const rows = table(`${title}, the last ${ROWS} steps`, [xName, ...series.map(([name]) => name)]);
    const from = Math.max(0, data[0].length - ROWS);
    for (let i = data[0].length - 1; i >= from; i -= 1) {
      rows.body.append(rows.row(data.map((column, n) => (column[i] === null ? "–" : n ? value(column[i]) : column[i]))));
    }
    numbers.replaceChildren(numbers.firstChild, rows.element);
  }

  /** Other points of the same series. */
  function set(next) {
    series = next;
    data = aligned();
    place.setAttribute("aria-label", `${title} over ${xName}: ${summary(series)}`);
    if (plot && plot.series.length === series.length + 1) plot.setData(data);
    else if (place.isConnected) draw();
    if (numbers.open) tell();
  }

  numbers.addEventListener("toggle", () => numbers.open && tell());
  const sizes = new ResizeObserver(() => {
    if (plot === null) draw();
    else plot.setSize({ width: Math.max(place.clientWidth, 200), height: HEIGHT });
  });
  sizes.observe(place);
  window.addEventListener("theme", draw);
  page.ends.push(() => {
    sizes.disconnect();
    window.removeEventListener("theme", draw);
    plot?.destroy();
  });
  set(series);
  return { element, set };
}

function summary(series) {
  return series
    .map(([name, points]) => (points.length ? `${name} is ${value(points.at(-1)[1])} at ${points.at(-1)[0]}` : `${name} has no points`))
    .join("; ");
}
