/** Class probabilities as bars: a list that a screen reader reads as text. */

import { el, percent } from "../dom.js";

export class Bars {
  constructor(labels) {
    this.rows = labels.map((label) => {
      const fill = el("span.fill");
      const value = el("span.value", {}, "–");
      return { node: el("li", {}, el("span.name", {}, label), el("span.track", { "aria-hidden": "true" }, fill), value), fill, value };
    });
    this.node = el("ol.bars", { "aria-label": "Share of every class" }, this.rows.map((r) => r.node));
  }

  /** @param {number[] | null} shares softmax, or null to empty them */
  show(shares) {
    const best = shares ? shares.indexOf(Math.max(...shares)) : -1;
    this.rows.forEach((row, i) => {
      const share = shares?.[i] ?? 0;
      row.fill.style.setProperty("--share", String(share));
      row.value.textContent = shares ? percent(share) : "–";
      row.node.classList.toggle("best", i === best);
    });
  }
}
