// SPDX-License-Identifier: Apache-2.0
// Questions and messages over the page, in the browser's own dialog: Escape closes it, focus stays.

import { fill, h } from "./dom.js";

/** What went wrong, as a part of a page. */
export function trouble(error) {
  return h(
    "div",
    { class: "trouble", role: "alert" },
    h("strong", {}, error.title ?? error.message),
    error.detail ? h("p", { class: "pre" }, error.detail) : null,
    error.hint ? h("p", {}, error.hint) : null,
  );
}

/**
 * Ask; resolves to whether it was done.
 *
 * @param content Nodes of the form.
 * @param work Called with the form's data when the person agrees; what it throws is shown. What it
 *   returns, a node, is shown instead of the form.
 */
export function ask({ title, content = [], yes = "OK", danger = false, work }) {
  const said = h("div", { "aria-live": "polite" });
  const agree = h("button", { class: danger ? "danger" : "primary" }, yes);
  const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
  const form = h("form", { onsubmit: submit }, content, said, h("div", { class: "actions" }, agree, cancel));
  const name = `dialog-${Math.random().toString(36).slice(2)}`;
  const dialog = h("dialog", { "aria-labelledby": name }, h("h2", { id: name }, title), form);
  let done = false;

  async function submit(event) {
    event.preventDefault();
    agree.disabled = true;
    try {
      const shown = await work(new FormData(form));
      done = true;
      if (shown instanceof Node) {
        fill(form, shown, h("div", { class: "actions" }, h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close")));
        form.querySelector("button").focus();
      } else dialog.close();
    } catch (error) {
      fill(said, trouble(error));
      agree.disabled = false;
    }
  }

  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    }),
  );
}

/** A field with its label. */
export function field(label, input, help = "") {
  input.id ||= `field-${Math.random().toString(36).slice(2)}`;
  return h(
    "div",
    { class: "field" },
    h("label", { for: input.id }, label),
    input,
    help ? h("small", {}, help) : null,
  );
}

export function choice(name, options, chosen) {
  return h(
    "select",
    { name },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)),
  );
}

/** A secret that is shown this once. */
export function secret(text, told) {
  const box = h("textarea", { readonly: true, rows: 4, class: "secret", "aria-label": "The key" });
  box.value = text;
  const copy = h("button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    box.select();
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Selected: Ctrl-C copies it";
    }
  });
  return h("div", {}, h("p", {}, told), box, copy);
}
