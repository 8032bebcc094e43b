// SPDX-License-Identifier: Apache-2.0
// The frame of the dashboard: who is signed in, which page is shown, what is live.

import { call, get, signedOut, stream, useSession } from "./api.js";
import { trouble } from "./dialog.js";
import { fill, h } from "./dom.js";
import { retell } from "./parts.js";
import { signIn } from "./signin.js";

// Each page's module exports `show(page)`; a page is loaded when it is first gone to.
const PAGES = {
  fleet: { title: "Fleet", load: () => import("./fleet.js") },
  queue: { title: "Queue", load: () => import("./queue.js") },
  runs: { title: "Runs", load: (rest) => (rest ? import("./run.js") : import("./runs.js")) },
  workflows: { title: "Workflows", load: (rest) => (rest ? import("./flow.js") : import("./workflows.js")) },
  labels: { title: "Labels", load: () => import("./labels.js") },
  people: { title: "Users & keys", load: () => import("./people.js"), role: "admin" },
  audit: { title: "Audit", load: () => import("./audit.js"), role: "admin" },
  about: { title: "About", load: () => import("./about.js") },
  devices: { title: "Machine", load: () => import("./device.js"), hidden: true },
  compare: { title: "Compare runs", load: () => import("./compare.js"), hidden: true },
};
const ROLES = ["viewer", "member", "admin"];

const main = document.getElementById("main");
const head = document.getElementById("head");
const live = document.getElementById("live");
let session = null;
let present = null;

/** One shown page: where it draws, what it was asked, and what ends with it. */
class Page {
  constructor(name, rest, query) {
    Object.assign(this, { name, rest, query, session });
    this.address = location.hash;
    this.from = document.activeElement;
    this.ends = [];
    this.controller = new AbortController();
    this.signal = this.controller.signal;
    this.root = h("div", { class: `page ${name}` });
  }

  may(role) {
    return ROLES.indexOf(this.session.role) >= ROLES.indexOf(role);
  }

  /** The heading, and what stands beside it. */
  heading(title, ...beside) {
    document.title = `${title} · fedml`;
    return h("div", { class: "heading" }, h("h1", { tabindex: "-1" }, title), h("div", { class: "beside" }, beside));
  }

  get(path) {
    return get(path, this.signal);
  }

  /** A stream that ends with the page; the head says whether it flows. */
  stream(path, each, options = {}) {
    const words = { live: "live", lost: "reconnecting…", over: "" };
    const told = (state) => {
      if (this.signal.aborted) return;
      live.className = state;
      if (live.textContent !== words[state]) live.textContent = words[state];
      options.told?.(state);
    };
    this.ends.push(stream(path, each, { ...options, told }));
  }

  /**
   * Read `path` after the stream of changes has begun, so that nothing is missed in between; and
   * again whenever it had to be begun anew.
   */
  async watch(of, read, each) {
    let shown;
    const first = new Promise((resolve, reject) => (shown = { resolve, reject }));
    const reading = () => read().then(shown.resolve, (error) => {
      shown.reject(error);
    });
    const late = setTimeout(reading, 1500);
    this.stream(
      () => `/v1/watch?of=${of}`,
      (line) => {
        if (line.hello) {
          clearTimeout(late);
          reading();
        } else each(line);
      },
      { speaks: true },
    );
    this.ends.push(() => clearTimeout(late));
    await first;
  }

  /** Do `work` once more after the page is drawn; what goes wrong is shown on it. */
  async again(work) {
    try {
      await work();
    } catch (error) {
      if (!this.signal.aborted) this.root.append(trouble(error));
    }
  }

  every(seconds, work) {
    const timer = setInterval(work, seconds * 1000);
    this.ends.push(() => clearInterval(timer));
  }

  end() {
    this.controller.abort();
    for (const end of this.ends) end();
  }
}

async function go() {
  if (session === null) return;
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...more] = path.split("/").map(decodeURIComponent);
  const known = PAGES[name];
  if (known === undefined || (known.role && known.role !== session.role)) {
    location.replace("#/fleet");
    return;
  }
  present?.end();
  live.textContent = "";
  const page = (present = new Page(name, more.join("/"), new URLSearchParams(query)));
  for (const link of document.querySelectorAll("#nav a")) {
    const here = link.dataset.page === name || (link.dataset.page === "runs" && name === "compare") || (link.dataset.page === "fleet" && name === "devices");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  fill(main, page.root);
  title(page, known.title);
  try {
    const module = await known.load(page.rest);
    if (present !== page) return;
    await module.show(page);
  } catch (error) {
    if (error.name === "AbortError" || present !== page) return;
    // A script that is gone: the broker was upgraded while this page was open.
    if (error instanceof TypeError && /import|module/i.test(error.message)) {
      error = { title: "this page is older than the broker", hint: "reload it" };
    } else if (error.status === undefined) console.error(error);
    page.root.append(trouble(error));
  }
  if (present === page) arrive(page);
}

function title(page, text) {
  fill(page.root, page.heading(text));
}

/**
 * Whoever came by keyboard or with a screen reader starts at the new heading; but whoever went on
 * while the page was still loading, to another link perhaps, stays there.
 */
function arrive(page) {
  const at = document.activeElement;
  if (at === document.body || at === main || (at === page.from && at?.closest("#nav"))) {
    page.root.querySelector("h1")?.focus({ preventScroll: true });
  }
  main.dataset.shown = page.address;
  performance.mark("shown");
}

function dress() {
  const links = Object.entries(PAGES).filter(([, page]) => !page.hidden && (!page.role || page.role === session.role));
  fill(
    document.getElementById("nav"),
    links.map(([name, page]) => h("li", {}, h("a", { href: `#/${name}`, data: { page: name } }, page.title))),
  );
  fill(document.getElementById("name"), `${session.name} (${session.role})`);
  head.classList.remove("shut");
}

async function begin(why = null) {
  present?.end();
  present = session = null;
  head.classList.add("shut");
  live.textContent = "";
  // The page's script may come while we ask who is there; what goes wrong with it shows later.
  const [name, rest] = location.hash.replace(/^#\/?/, "").split("?")[0].split("/");
  PAGES[name]?.load(rest).catch(() => {});
  try {
    session = why ? null : await get("/v1/session");
  } catch (error) {
    // A first visit is no problem to be shown; one that has run out says so.
    why = error.status === 401 && error.title === "not signed in" ? null : error;
  }
  session ??= await signIn(main, why);
  useSession(session);
  dress();
  if (!PAGES[location.hash.replace(/^#\/?/, "").split(/[/?]/)[0]]) history.replaceState(null, "", "#/fleet");
  await go();
}

function nextTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  window.dispatchEvent(new Event("theme"));
}

document.getElementById("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.dispatchEvent(new Event("theme")));
document.getElementById("out").addEventListener("click", async () => {
  try {
    await call("DELETE", "/v1/session");
  } finally {
    location.hash = "#/fleet";
    location.reload();
  }
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  (main.querySelector("h1") ?? main).focus();
});
signedOut.tell = (problem) => {
  if (session !== null) begin(problem);
};
window.addEventListener("hashchange", go);
setInterval(retell, 5000);
begin();
