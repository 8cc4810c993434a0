/** Small plots as SVG; colours come from the style sheet. */

import { millis } from "../dom.js";
import { histogram, percentile, usable } from "../statistics.js";

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 480;

/** Times as a histogram up to the 99th percentile, so that one outlier does not flatten it. */
export function histogramPlot(samples, title) {
  const top = percentile(samples, 99);
  const { low, high, counts } = histogram(usable(samples).filter((v) => v <= top), 32);
  const most = Math.max(1, ...counts);
  const bar = WIDTH / Math.max(counts.length, 1);
  const root = svg(title, 96);
  counts.forEach((n, i) => {
    const height = (n / most) * 70;
    root.append(node("rect", { x: i * bar + 1, y: 74 - height, width: bar - 2, height, rx: 2, class: "bar" }));
  });
  label(root, 0, 92, "start", millis(low));
  label(root, WIDTH, 92, "end", millis(high));
  return root;
}

/** One point a run, in order; thinned to what the width can show. */
export function timePlot(samples, title) {
  const kept = usable(samples);
  const root = svg(title, 120);
  if (!kept.length) return root;
  const columns = Math.min(kept.length, 240);
  const size = kept.length / columns;
  const medians = [...Array(columns).keys()].map((i) => percentile(kept.slice(Math.floor(i * size), Math.max(Math.floor((i + 1) * size), Math.floor(i * size) + 1)), 50));
  const top = Math.max(...medians) * 1.15 || 1;
  const points = medians.map((v, i) => `${(i / Math.max(columns - 1, 1)) * WIDTH},${100 - (v / top) * 92}`);
  root.append(node("line", { x1: 0, x2: WIDTH, y1: 100, y2: 100, class: "axis" }), node("polyline", { points: points.join(" "), class: "curve" }));
  label(root, 0, 116, "start", "first run; the line is the median of neighbouring runs");
  label(root, WIDTH, 12, "end", `top ${millis(top)}`);
  return root;
}

function svg(title, height) {
  const root = node("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "plot", role: "img", "aria-label": title });
  return root;
}

function label(root, x, y, anchor, text) {
  const made = node("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  root.append(made);
}

function node(name, attributes) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}
