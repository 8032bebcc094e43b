// SPDX-License-Identifier: Apache-2.0
// The broker's API: questions and answers, and streams that come back after a cut.

/** An answer that is an error, in the broker's words (RFC 9457), or no answer at all (status 0). */
export class Problem extends Error {
  constructor(status, title, detail = "", hint = "") {
    super(title);
    Object.assign(this, { status, title, detail, hint });
  }
}

let csrf = "";

/** Called with the problem when the broker no longer knows who we are. */
export const signedOut = { tell: () => {} };

export function useSession(session) {
  csrf = session.csrf;
}

async function ask(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (method !== "GET") headers["X-CSRF-Token"] = csrf;
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "the broker does not answer", String(error.message), "is it running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const problem = new Problem(
    response.status,
    said.title ?? `the broker answered ${response.status}`,
    said.detail,
    said.hint,
  );
  if (response.status === 401 && path !== "/v1/session") signedOut.tell(problem);
  throw problem;
}

/** One question and its answer. */
export async function call(method, path, body, signal) {
  return (await ask(method, path, body, signal)).json();
}

export const get = (path, signal) => call("GET", path, undefined, signal);

/** The same, null where there is nothing: parts of a run that not every broker has. */
export async function getIfThere(path, signal) {
  try {
    return await get(path, signal);
  } catch (error) {
    if (error instanceof Problem && error.status === 404) return null;
    throw error;
  }
}

async function* lines(path, signal) {
  const response = await ask("GET", path, undefined, signal);
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

const SILENCE_MS = 45000;

/**
 * Read a stream for as long as the page is looked at; a cut one is begun anew.
 *
 * A hidden page lets go of it: a browser has six connections to a host, for all its pages together.
 *
 * @param path Called at each beginning.
 * @param each Called with each line; true ends the stream for good.
 * @param told Called with "live", "lost" or "over".
 * @param speaks Whether the broker says something at least every 15 s.
 * @returns A function that ends it.
 */
export function stream(path, each, { told = () => {}, speaks = false } = {}) {
  let over = false;
  let controller = null;
  let wake = () => {};

  async function readOnce() {
    controller = new AbortController();
    let watchdog = null;
    const heard = () => {
      clearTimeout(watchdog);
      if (speaks) watchdog = setTimeout(() => controller.abort(), SILENCE_MS);
    };
    try {
      heard();
      for await (const line of lines(path(), controller.signal)) {
        heard();
        told("live");
        if (each(line) === true) over = true;
        if (over) return;
      }
    } finally {
      clearTimeout(watchdog);
      controller.abort();
    }
  }

  async function run() {
    let failures = 0;
    while (!over) {
      if (document.hidden) {
        await new Promise((done) => (wake = done));
        continue;
      }
      const begun = Date.now();
      try {
        await readOnce();
      } catch (error) {
        if (error instanceof Problem && [401, 403, 404].includes(error.status)) over = true;
      }
      if (over) break;
      if (document.hidden) continue;
      told("lost");
      failures = Date.now() - begun > 5000 ? 0 : failures + 1;
      const pause = Math.min(300 * 2 ** failures, 10000);
      await new Promise((done) => {
        wake = done;
        setTimeout(done, pause);
      });
    }
    told("over");
    document.removeEventListener("visibilitychange", seen);
    window.removeEventListener("online", seen);
  }

  function seen() {
    if (document.hidden) controller?.abort();
    else wake();
  }
  document.addEventListener("visibilitychange", seen);
  window.addEventListener("online", seen);
  run();
  return () => {
    over = true;
    controller?.abort();
    wake();
  };
}
