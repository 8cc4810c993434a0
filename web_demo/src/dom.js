/** Small helpers for elements; no inline style or script, for the content security policy. */

/**
 * Make an element.
 *
 * @param {string} tag `p`, `p.note`, `button.primary`
 * @param attributes properties, `data-*`, `aria-*`, `on*` handlers
 */
export function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && !key.includes("-") && key !== "list" && key !== "role") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}

/** Options of a select: `[[value, label, disabledReason]]`. */
export function choices(entries, selected) {
  return entries.map(([value, label, why]) =>
    el("option", { value, selected: String(value) === String(selected), disabled: Boolean(why) }, why ? `${label} – ${why}` : label),
  );
}

/** A labelled field. */
export function field(label, control, hint) {
  return el("label.field", {}, el("span", {}, label), control, hint ? el("small", {}, hint) : null);
}

/** A verdict: word and colour, never colour alone. */
export function badge(kind, text) {
  return el(`span.badge.${kind}`, {}, text);
}

export const percent = (share, digits = 1) => (share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)} %`);

/** Milliseconds for people. */
export function millis(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;
}

/** A small number in powers of ten. */
export function tiny(value) {
  return value === null || value === undefined ? "–" : value === 0 ? "0" : value.toExponential(1);
}

export function bytes(n) {
  return n >= 1 << 20 ? `${(n / (1 << 20)).toFixed(1)} MiB` : `${Math.round(n / 1024)} KiB`;
}

/** A canvas's 2D context at the screen's resolution; drawn in CSS pixels. */
export function sharpContext(canvas) {
  const ratio = Math.min(globalThis.devicePixelRatio || 1, 3);
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** A colour of the current theme. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
