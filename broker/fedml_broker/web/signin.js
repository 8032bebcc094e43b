// SPDX-License-Identifier: Apache-2.0
// Signing in: paste a key, get a cookie.

import { call, getIfThere } from "./api.js";
import { field, trouble } from "./dialog.js";
import { fill, h } from "./dom.js";

/** Show the form; resolves to the session. `why`: the problem that led here, if one did. */
export function signIn(main, why = null) {
  document.title = "Sign in · fedml";
  const said = h("div", {}, why ? trouble(why) : null);
  const input = h("input", {
    name: "key", type: "password", autocomplete: "current-password", required: true, spellcheck: "false",
  });
  const button = h("button", { class: "primary" }, "Sign in");
  const elsewhere = h("span");
  // A form that cannot say so is still a form.
  getIfThere("/v1/oidc").then(({ provider }) => {
    if (provider) fill(elsewhere, h("a", { class: "button", href: "/v1/oidc/start?to=dashboard" }, `Sign in with ${provider}`));
  }, () => {});
  return new Promise((resolve) => {
    const form = h(
      "form",
      {
        class: "card",
        onsubmit: async (event) => {
          event.preventDefault();
          button.disabled = true;
          try {
            resolve(await call("POST", "/v1/session", { key: input.value }));
            input.value = "";
          } catch (error) {
            fill(said, trouble(error));
            input.focus();
          } finally {
            button.disabled = false;
          }
        },
      },
      h("h1", {}, "Sign in to fedml"),
      said,
      field("Your key", input, "It starts with fedml1u_. An admin makes one: fedml-broker users token NAME; the broker's own admin finds it in admin.key."),
      h("div", { class: "actions" }, button, elsewhere),
    );
    fill(main, h("div", { class: "signin" }, form));
    input.focus();
  });
}
