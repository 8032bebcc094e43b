// SPDX-License-Identifier: Apache-2.0
// Users and the keys with which machines join; for admins.

import { call } from "./api.js";
import { ask, choice, field, secret } from "./dialog.js";
import { fill, h, table } from "./dom.js";
import { count } from "./format.js";
import { chip, labels, section, when } from "./parts.js";

const ROLES = [
  ["viewer", "viewer: sees everything, changes nothing"],
  ["member", "member: runs things and stops them"],
  ["admin", "admin: manages users, keys and machines"],
];

export async function show(page) {
  const people = h("div");
  const keys = h("div");
  page.root.append(
    section("Users", h("div", { class: "actions" }, h("button", { type: "button", onclick: newUser }, "New user")), people),
    section("Login keys for machines", h("div", { class: "actions" }, h("button", { type: "button", onclick: newKey }, "New login key")), keys),
  );

  async function read() {
    const [found, made] = await Promise.all([page.get("/v1/users"), page.get("/v1/keys")]);
    const users = table("Users", ["Name", "Role", ["Tokens", "number"], "Made", ["Actions", "end"]]);
    for (const user of found.users) {
      users.body.append(
        users.row([
          user.name, user.role, count(user.tokens), when(user.created_at),
          [
            h("button", { type: "button", class: "small", "aria-label": `Role of ${user.name}`, onclick: () => role(user) }, "Role"),
            " ",
            h("button", { type: "button", class: "small", "aria-label": `New token of ${user.name}`, onclick: () => token(user) }, "New token"),
            " ",
            h("button", { type: "button", class: "small danger", "aria-label": `Sign ${user.name} out everywhere`, onclick: () => signOut(user) }, "Sign out"),
          ],
        ]),
      );
    }
    fill(people, users.element);
    const now = Date.now() / 1000;
    const list = table("Login keys", ["Key", "State", ["Used", "number"], "Ends", "Labels", "Made by", ["Actions", "end"]]);
    for (const key of made.keys) {
      const over = key.revoked ? "revoked" : key.expires_at !== null && key.expires_at < now ? "expired" : key.uses !== null && key.used >= key.uses ? "used up" : "";
      list.body.append(
        list.row([
          key.id, chip(over || "active"), key.uses === null ? count(key.used) : `${key.used} of ${key.uses}`,
          key.expires_at === null ? "never" : h("span", {}, new Date(key.expires_at * 1000).toLocaleDateString()),
          labels(key.labels), key.created_by,
          over ? "" : h("button", { type: "button", class: "small danger", "aria-label": `Revoke ${key.id}`, onclick: () => revoke(key) }, "Revoke"),
        ]),
      );
    }
    fill(keys, made.keys.length ? list.element : h("p", { class: "none" }, "None yet."));
  }

  async function newUser() {
    await ask({
      title: "New user",
      content: [
        field("Name", h("input", { name: "name", required: true, autocomplete: "off" })),
        field("Role", choice("role", ROLES, "member")),
      ],
      yes: "Make",
      work: async (form) => {
        const name = form.get("name").trim();
        await call("POST", "/v1/users", { name, role: form.get("role") });
        const { key } = await call("POST", `/v1/users/${encodeURIComponent(name)}/tokens`, {});
        return secret(key, `${name} signs in with this key, here and with fedml login. It is shown this once.`);
      },
    });
    await page.again(read);
  }

  async function token(user) {
    await ask({
      title: `New token of ${user.name}`,
      content: field("Good for how many days", h("input", { name: "days", type: "number", min: "1", placeholder: "for ever" }), "Empty: it never expires."),
      yes: "Make",
      work: async (form) => {
        const days = form.get("days") ? Number(form.get("days")) : null;
        const { key } = await call("POST", `/v1/users/${encodeURIComponent(user.name)}/tokens`, { days });
        return secret(key, "It is shown this once.");
      },
    });
    await page.again(read);
  }

  async function signOut(user) {
    const done = await ask({
      title: `Sign ${user.name} out everywhere?`,
      content: h("p", {}, `All tokens of ${user.name} end at once, and all sessions of browsers; but not what you are signed in with here. What was started runs on.`),
      yes: "Sign out",
      danger: true,
      work: () => call("DELETE", `/v1/users/${encodeURIComponent(user.name)}/tokens`),
    });
    if (done) await page.again(read);
  }

  async function role(user) {
    await ask({
      title: `Role of ${user.name}`,
      content: field("Role", choice("role", ROLES, user.role)),
      yes: "Change",
      work: (form) => call("PUT", `/v1/users/${encodeURIComponent(user.name)}/role`, { role: form.get("role") }),
    });
    await page.again(read);
  }

  async function newKey() {
    await ask({
      title: "New login key",
      content: [
        field("For how many machines", h("input", { name: "uses", type: "number", min: "1", value: "1" }), "Empty: any number."),
        field("Good for how many days", h("input", { name: "days", type: "number", min: "1", value: "7" }), "Empty: it never expires."),
        field("Labels that they get", h("input", { name: "labels", placeholder: "site=north rack=4", autocomplete: "off", spellcheck: "false" })),
      ],
      yes: "Make",
      work: async (form) => {
        const pairs = form.get("labels").split(/[\s,]+/).filter(Boolean).map((text) => [text.split("=")[0], text.split("=").slice(1).join("=")]);
        const number = (name) => (form.get(name) ? Number(form.get(name)) : null);
        const { key } = await call("POST", "/v1/keys", { uses: number("uses"), days: number("days"), labels: Object.fromEntries(pairs) });
        return secret(`fedml-agent login ${key}`, "On each machine, then fedml-agent run. It is shown this once.");
      },
    });
    await page.again(read);
  }

  async function revoke(key) {
    const done = await ask({
      title: `Revoke ${key.id}?`,
      content: h("p", {}, "No further machine joins with it; those that did stay."),
      yes: "Revoke",
      danger: true,
      work: () => call("DELETE", `/v1/keys/${encodeURIComponent(key.id)}`),
    });
    if (done) await page.again(read);
  }

  await read();
}
