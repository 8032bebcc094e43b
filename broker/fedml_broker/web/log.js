// SPDX-License-Identifier: Apache-2.0
// The end of a log: however much is written, the page holds so much of it and no more.

import { h } from "./dom.js";

const MOST = 200_000; // characters on the page
const PIECE = 8_000; // of one element

export function logTail() {
  const box = h("pre", { class: "log", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off" });
  const cut = h("p", { class: "none" });
  const waiting = [];
  let size = 0;
  let due = false;

  function add(text, kind) {
    waiting.push([text, kind]);
    // What would be thrown away at once is not even drawn.
    let pending = 0;
    for (let i = waiting.length - 1; i >= 0; i -= 1) {
      pending += waiting[i][0].length;
      if (pending > MOST) {
        if (i > 0) lose();
        waiting.splice(0, i);
        break;
      }
    }
    if (!due) {
      due = true;
      requestAnimationFrame(draw);
    }
  }

  function lose() {
    cut.textContent = "The beginning is not shown; fedml run logs RUN has all of it.";
  }

  function draw() {
    due = false;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    for (const [text, kind] of waiting.splice(0)) {
      for (let i = 0; i < text.length; i += PIECE) {
        const piece = text.slice(i, i + PIECE);
        const last = box.lastChild;
        if (last && last.className === kind && last.textContent.length + piece.length <= PIECE) {
          last.firstChild.appendData(piece);
        } else box.append(h("span", { class: kind }, piece));
        size += piece.length;
      }
    }
    while (size > MOST && box.childNodes.length > 1) {
      size -= box.firstChild.textContent.length;
      box.firstChild.remove();
      lose();
    }
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  return { nodes: [cut, box], add, lose };
}
