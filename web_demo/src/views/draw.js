/** Draw a digit: a canvas by mouse, touch or pen; test images by button; live top classes. */

import { el, millis, percent, sharpContext, colour } from "../dom.js";
import { sampleOf } from "../package.js";
import { makeInputs } from "../preprocess.js";
import { argmax, softmax } from "../statistics.js";
import { Bars } from "./bars.js";

/** Side of the drawing, in the pixels that the model's preprocessing gets. */
const SIDE = 280;

export class DrawView {
  #strokes = [];
  #current = null;
  #sample = null;
  #busy = false;
  #again = false;
  #offset = 0;

  constructor(app, model) {
    this.app = app;
    this.model = model;
    this.source = model.preprocessing.sources.find((s) => s.name === "canvas");
    this.pen = (this.source?.hints.pen_share_of_side ?? 0.09) * SIDE;
    this.ink = new OffscreenCanvas(SIDE, SIDE);
    this.node = this.#build();
  }

  #build() {
    this.canvas = el("canvas.pad", { role: "img", "aria-label": "Drawing area. Without a pointer, choose a test image below." });
    this.hint = el("p.pad-hint", { "aria-hidden": "true" }, "Draw a digit");
    this.clearButton = el("button", { type: "button", onclick: () => this.clear() }, "Clear");
    this.undoButton = el("button", { type: "button", onclick: () => this.undo() }, "Undo");
    this.samples = el("div.samples", { role: "group", "aria-label": "Test images" });
    this.answer = el("output.answer", { "aria-live": "polite" }, "–");
    this.confidence = el("p.confidence", {}, "Waiting for the model");
    this.bars = new Bars(this.model.labels);
    this.seen = el("canvas.seen", { width: 32, height: 32, role: "img", "aria-label": "The image as the model gets it" });
    this.timing = el("p.timing", {}, " ");
    this.error = el("p.alert", { role: "alert", hidden: true });
    const more = el("button.quiet", { type: "button", onclick: () => this.#otherSamples() }, "More images");

    this.canvas.addEventListener("pointerdown", (e) => this.#begin(e));
    this.canvas.addEventListener("pointermove", (e) => this.#move(e));
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => this.#end());
    new ResizeObserver(() => this.#paint()).observe(this.canvas);

    return el("div.view.draw", {},
      el("section.card.pad-card", { "aria-label": "Drawing" },
        el("div.pad-frame", {}, this.canvas, this.hint),
        el("div.row", {}, this.clearButton, this.undoButton, more),
        this.samples,
        this.#canvasNote()),
      el("section.card.result", { "aria-label": "The model's answer" },
        this.error,
        el("div.verdict", {}, this.answer, el("div", {}, this.confidence, el("div.seen-row", {}, this.seen, el("small", {}, "what the model sees, 32 × 32")))),
        this.bars.node,
        this.timing),
    );
  }

  #canvasNote() {
    const text = this.source
      ? "Strokes are cropped, squared and brought to 8 × 8 shares of ink, as the data set's makers did, then to the model's 32 × 32."
      : "This package does not say how a drawing becomes an input; test images work.";
    return el("p.note", {}, text);
  }

  /** Show what can be shown once the model is there; the first test image is the first answer. */
  async start() {
    // Beside the test images; what goes wrong is told by the prediction.
    this.app.live(this.model).catch(() => {});
    this.evaluation = await this.app.pack.evaluation(this.model).catch((error) => {
      this.fail(error);
      return null;
    });
    if (!this.evaluation) return;
    this.#listSamples();
    await this.choose(this.chosen[3] ?? this.chosen[0]);
  }

  #otherSamples() {
    this.#offset += 1;
    this.#listSamples();
  }

  /** One test image a class; each click on "other" takes the next of every class. */
  #listSamples() {
    if (!this.evaluation) return;
    const { targets, samples, inputs } = this.evaluation;
    const byClass = this.model.labels.map((_, c) => [...Array(samples).keys()].filter((i) => targets[i] === c));
    this.chosen = byClass.filter((m) => m.length).map((m) => m[this.#offset % m.length]);
    const [image] = Object.values(inputs);
    const side = image.shape.at(-1);
    this.samples.replaceChildren(...this.chosen.map((index) => {
      const thumb = el("canvas", { width: side, height: side, "aria-hidden": "true" });
      paintGrey(thumb, sampleOf(image, index).data, side);
      const label = this.model.labels[targets[index]];
      return el("button.sample", { type: "button", title: `test image ${index}, labelled ${label}`, "aria-label": `Test image labelled ${label}`, "data-index": String(index), onclick: () => this.choose(index) }, thumb);
    }));
  }

  /** Run a test image exactly as the evaluation does. */
  async choose(index) {
    this.#strokes = [];
    this.#sample = index;
    this.#paint();
    await this.predict();
  }

  clear() {
    this.#strokes = [];
    this.#sample = null;
    this.#paint();
    this.answer.textContent = "–";
    this.confidence.textContent = "Draw, or choose a test image";
    this.timing.textContent = " ";
    this.bars.show(null);
    this.seen.getContext("2d").clearRect(0, 0, 32, 32);
  }

  undo() {
    this.#strokes.pop();
    if (!this.#strokes.length) return this.clear();
    this.#paint();
    return this.predict();
  }

  /** A point in the pixels of the drawing. */
  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
  }

  #begin(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.#sample = null;
    this.#current = [this.#point(event)];
    this.#strokes.push(this.#current);
    this.#paint();
  }

  #move(event) {
    if (!this.#current) return;
    for (const e of event.getCoalescedEvents?.() ?? [event]) this.#current.push(this.#point(e));
    this.#paint();
    this.predict();
  }

  #end() {
    if (!this.#current) return;
    this.#current = null;
    this.predict();
  }

  #paint() {
    const ink = this.ink.getContext("2d", { willReadFrequently: true });
    ink.clearRect(0, 0, SIDE, SIDE);
    this.#drawStrokes(ink, 1, "#fff");
    const { context, width } = sharpContext(this.canvas);
    if (!width) return;
    this.hint.hidden = this.#strokes.length > 0 || this.#sample !== null;
    if (this.#sample !== null && this.evaluation) {
      const [image] = Object.values(this.evaluation.inputs);
      const side = image.shape.at(-1);
      const small = new OffscreenCanvas(side, side);
      paintInk(small, sampleOf(image, this.#sample).data, side, colour("ink"));
      context.imageSmoothingQuality = "high";
      context.drawImage(small, 0, 0, width, width);
    }
    this.#drawStrokes(context, width / SIDE, colour("ink"));
    for (const button of this.samples.children) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.index) === this.#sample));
    }
  }

  #drawStrokes(context, scale, style) {
    Object.assign(context, { strokeStyle: style, fillStyle: style, lineWidth: this.pen * scale, lineCap: "round", lineJoin: "round" });
    for (const stroke of this.#strokes) {
      context.beginPath();
      if (stroke.length === 1) {
        context.arc(stroke[0][0] * scale, stroke[0][1] * scale, (this.pen * scale) / 2, 0, 2 * Math.PI);
        context.fill();
        continue;
      }
      stroke.forEach(([x, y], i) => (i ? context.lineTo(x * scale, y * scale) : context.moveTo(x * scale, y * scale)));
      context.stroke();
    }
  }

  /** The drawing's ink, 0 to 255, as the package's `canvas` source wants it. */
  raw() {
    const rgba = this.ink.getContext("2d").getImageData(0, 0, SIDE, SIDE).data;
    const data = new Uint8Array(SIDE * SIDE);
    for (let i = 0; i < data.length; i++) data[i] = rgba[4 * i + 3];
    return { shape: [SIDE, SIDE], dtype: "uint8", data };
  }

  #feeds() {
    if (this.#sample !== null) {
      return Object.fromEntries(Object.entries(this.evaluation.inputs).map(([n, t]) => [n, sampleOf(t, this.#sample)]));
    }
    if (!this.source) throw new Error("this package does not say how a drawing becomes an input");
    return makeInputs(this.source, this.raw(), this.model.inputs);
  }

  /** Say that another runtime is being started. */
  wait() {
    this.timing.textContent = "Starting the runtime…";
  }

  /** Answer the newest drawing; one run at a time, older drawings are passed over. */
  async predict() {
    if (this.#sample === null && !this.#strokes.length) return;
    if (this.#busy) {
      this.#again = true;
      return;
    }
    this.#busy = true;
    try {
      const start = performance.now();
      const feeds = this.#feeds();
      const pre = performance.now() - start;
      const live = await this.app.live(this.model);
      const { outputs, ms } = await live.model.run(feeds);
      this.#show(outputs[this.model.evaluation?.output ?? this.model.outputs[0].name].data, feeds, pre, ms, live);
    } catch (error) {
      this.fail(error);
    } finally {
      this.#busy = false;
      if (this.#again) {
        this.#again = false;
        this.predict();
      }
    }
  }

  #show(logits, feeds, pre, ms, live) {
    const shares = softmax(logits);
    const best = argmax(logits);
    if (best < 0) throw new Error("the model's output is not finite");
    this.error.hidden = true;
    this.answer.textContent = this.model.labels[best];
    this.confidence.textContent = `${percent(shares[best])} sure${this.#sample === null ? "" : ` · labelled ${this.model.labels[this.evaluation.targets[this.#sample]]}`}`;
    this.bars.show(shares);
    const [image] = Object.values(feeds);
    const side = image.shape.at(-1);
    this.seen.width = this.seen.height = side;
    paintGrey(this.seen, image.data, side);
    this.timing.textContent = `Preparing ${millis(pre)} · model ${millis(ms)} · ${live.label}`;
    this.app.firstPrediction();
  }

  fail(error) {
    this.error.hidden = false;
    this.error.textContent = `No answer. ${error.message}`;
    this.answer.textContent = "–";
    this.confidence.textContent = "";
    this.bars.show(null);
  }
}

function paintGrey(canvas, values, side) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    const v = Math.round(255 * Math.min(Math.max(values[i], 0), 1));
    image.data.set([v, v, v, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

/** Values as the opacity of one colour. */
function paintInk(canvas, values, side, style) {
  const context = canvas.getContext("2d");
  context.fillStyle = style;
  for (let i = 0; i < side * side; i++) {
    context.globalAlpha = Math.min(Math.max(values[i], 0), 1);
    context.fillRect(i % side, Math.floor(i / side), 1, 1);
  }
}
