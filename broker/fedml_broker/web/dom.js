// SPDX-License-Identifier: Apache-2.0
// Elements, made of text and never of HTML: what a run is called cannot become a part of the page.

/**
 * An element. Properties: `class`, `on…` (listeners), `data` (an object), everything else is an
 * attribute; null and false leave it out. Children: nodes, texts, numbers, lists of them, null.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  put(element, children);
  return element;
}

/** Append children as `h` takes them. */
export function put(element, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) {
      element.append(child instanceof Node ? child : String(child));
    }
  }
}

/** Have an element hold these children and no others. */
export function fill(element, ...children) {
  element.replaceChildren();
  put(element, children);
  return element;
}

/** A table with a caption for those who do not see it. `columns`: texts, or [text, class]. */
export function table(caption, columns) {
  const heads = columns.map((column) => [column].flat());
  const body = h("tbody");
  const element = h(
    "table",
    {},
    h("caption", { class: "unseen" }, caption),
    h("thead", {}, h("tr", {}, heads.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)))),
    body,
  );
  /** A row; on a narrow screen each cell says which column it is of. */
  const row = (cells, properties = {}) =>
    h(
      "tr",
      properties,
      cells.map((cell, i) =>
        h("td", { class: heads[i][1], data: { of: heads[i][0] } }, h("div", {}, cell)),
      ),
    );
  return { element: h("div", { class: "scroll" }, element), body, row };
}

/** Call `work` soon, once for however many calls come within `after` milliseconds. */
export function soon(work, after) {
  let timer = null;
  return () => {
    timer ??= setTimeout(() => {
      timer = null;
      work();
    }, after);
  };
}
