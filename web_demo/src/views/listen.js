/**
 * Replay an utterance: the channels as a moving chart, the model's answer beside it.
 *
 * With a streaming model every frame is one step of it; without one, the model hears the
 * growing beginning of the utterance, padded as its preprocessing pads.
 */

import { el, field, millis, percent, choices, sharpContext, colour } from "../dom.js";
import { answerRow, sampleOf } from "../package.js";
import { argmax, softmax } from "../statistics.js";
import { Stream } from "../streaming.js";
import { Bars } from "./bars.js";

const FRAME_MS = 260;

export class ListenView {
  #utterance = null;
  #heard = 0;
  #beliefs = [];
  #playing = false;
  #turn = 0;
  #stream = null;

  /**
   * @param models all series models of the package
   * @param choose called with the one that the person picks instead
   */
  constructor(app, model, models, choose) {
    this.app = app;
    this.model = model;
    this.modelPick = el("select", { id: "listen-model", onchange: () => choose(models[this.modelPick.selectedIndex]) }, choices(models.map((m) => [m.id, m.streaming ? `${m.id} · step by step` : m.id]), model.id));
    this.several = models.length > 1;
    this.source = model.preprocessing.sources.find((s) => s.name === "evaluation") ?? model.preprocessing.sources[0];
    this.node = this.#build();
  }

  #build() {
    this.pick = el("select", { id: "listen-utterance", onchange: () => this.open(Number(this.pick.value)) });
    this.playButton = el("button.primary", { type: "button", onclick: () => (this.#playing ? this.pause() : this.play()) }, "Play");
    this.next = el("button", { type: "button", onclick: () => this.#another() }, "Another utterance");
    this.speed = el("select", { "aria-label": "Speed" }, choices([[0.5, "½ speed"], [1, "normal"], [3, "fast"]], 1));
    this.scrub = el("input", { type: "range", min: "0", max: "1", step: "1", value: "0", oninput: () => this.#jump(Number(this.scrub.value)) });
    this.place = el("output", {}, "");
    this.chart = el("canvas.chart", { role: "img", "aria-label": "Channels over time" });
    this.belief = el("canvas.belief", { role: "img", "aria-label": "Share of every speaker over time" });
    this.answer = el("output.answer.words", { "aria-live": "polite" }, "–");
    this.confidence = el("p.confidence", {}, "Press Play");
    this.bars = new Bars(this.model.labels);
    this.timing = el("p.timing", {}, " ");
    this.mode = el("p.note", {});
    this.error = el("p.alert", { role: "alert", hidden: true });
    for (const canvas of [this.chart, this.belief]) new ResizeObserver(() => this.#paint()).observe(canvas);

    return el("div.view.listen", {},
      el("section.card", { "aria-label": "Utterance" },
        this.several ? field("Model", this.modelPick) : null,
        el("div.row.pick", {}, field("Utterance", this.pick), field("Speed", this.speed)),
        this.chart,
        el("div.row.player", {}, this.playButton, el("label.scrub", {}, el("span.hidden", {}, "Frame"), this.scrub), this.place),
        el("div.row", {}, this.next)),
      el("section.card.result", { "aria-label": "The model's answer" },
        this.error,
        el("div.verdict", {}, this.answer, el("div", {}, this.confidence)),
        this.bars.node,
        el("h2", {}, "How the answer grew"),
        this.belief,
        this.timing,
        this.mode),
    );
  }

  async start() {
    try {
      this.evaluation = await this.app.pack.evaluation(this.model);
      if (!this.evaluation) throw new Error("the package has no utterances for it");
      this.roles = rolesOf(this.source);
      await this.#openStream();
    } catch (error) {
      this.fail(error);
      return;
    }
    const { targets, samples } = this.evaluation;
    this.pick.replaceChildren(...choices([...Array(samples).keys()].map((i) => [i, `${i + 1} · ${this.model.labels[targets[i]]}`]), 0));
    await this.open(0);
    await this.#jump(this.#utterance.length);
  }

  async #openStream() {
    const { streaming } = this.model;
    this.mode.textContent = "One frame is 12 numbers that describe the voice's spectrum (LPC cepstrum). At every frame the model hears the beginning of the utterance up to there, padded to its full length.";
    if (!streaming) return;
    try {
      const live = await this.app.live({ ...this.model, id: `${this.model.id} (streaming)`, files: streaming.files });
      this.#stream = new Stream(live.model, streaming);
      this.#stream.label = live.label;
      this.mode.textContent = "Every frame is one step of the streaming model, which keeps its state between frames.";
    } catch (error) {
      this.mode.textContent += ` The streaming model does not run here: ${error.message}.`;
    }
  }

  /** Take an utterance: the recorded steps are those whose mask is one. */
  async open(index) {
    this.pause();
    const x = sampleOf(this.evaluation.inputs[this.roles.series.name], index);
    const mask = this.roles.mask ? sampleOf(this.evaluation.inputs[this.roles.mask.name], index) : null;
    const [, steps, channels] = x.shape;
    const kept = this.evaluation.lengths?.[index] ?? (mask ? mask.data.reduce((a, b) => a + b, 0) : steps);
    this.#utterance = { index, length: kept, channels, data: x.data.slice(0, kept * channels), x, mask };
    this.pick.value = String(index);
    this.scrub.max = String(kept);
    this.chart.setAttribute("aria-label", `${channels} channels of utterance ${index + 1} over ${kept} frames, spoken by ${this.model.labels[this.evaluation.targets[index]]}`);
    this.#forget();
  }

  #forget() {
    this.#turn += 1;
    this.#heard = 0;
    this.#beliefs = [];
    this.#stream?.reset();
    this.answer.textContent = "–";
    this.confidence.textContent = "Press Play";
    this.bars.show(null);
    this.#place();
    this.#paint();
  }

  async #another() {
    await this.open((this.#utterance.index + 37) % this.evaluation.samples);
    this.play();
  }

  async play() {
    if (this.#heard >= this.#utterance.length) this.#forget();
    this.#playing = true;
    this.playButton.textContent = "Pause";
    const turn = ++this.#turn;
    while (this.#playing && turn === this.#turn && this.#heard < this.#utterance.length) {
      const start = performance.now();
      if (!(await this.#hear(turn))) break;
      const wait = FRAME_MS / Number(this.speed.value) - (performance.now() - start);
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, wait)));
    }
    if (turn === this.#turn) this.pause();
  }

  pause() {
    this.#playing = false;
    this.playButton.textContent = this.#utterance && this.#heard >= this.#utterance.length ? "Play again" : "Play";
  }

  /** Hear up to a frame; every frame on the way gets its answer. */
  async #jump(frame) {
    this.pause();
    const turn = ++this.#turn;
    if (frame < this.#heard) {
      this.#heard = frame;
      this.#beliefs.length = frame;
      if (frame) this.#stream?.restore(this.#beliefs[frame - 1].states);
      else this.#stream?.reset();
    }
    while (turn === this.#turn && this.#heard < frame) if (!(await this.#hear(turn))) return;
    if (this.#beliefs.length) this.#show(this.#beliefs.at(-1));
    else this.bars.show(null);
    this.#place();
    this.#paint();
    this.pause();
  }

  async #hear(turn) {
    const { data, channels } = this.#utterance;
    const count = this.#heard + 1;
    try {
      const belief = this.#stream
        ? await this.#stream.step(data.subarray(this.#heard * channels, count * channels)).then(({ values, ms }) => ({ logits: values, states: this.#stream.states, ms, label: `${this.#stream.label}, one step a frame` }))
        : await this.#prefix(count);
      if (turn !== this.#turn) return false;
      if (argmax(belief.logits) < 0) throw new Error("the model's output is not finite");
      this.#heard = count;
      this.#beliefs[count - 1] = belief;
      this.#show(belief);
      this.#place();
      this.#paint();
      return true;
    } catch (error) {
      this.fail(error);
      this.pause();
      return false;
    }
  }

  /** The utterance as the evaluation gives it, everything behind `count` frames padded. */
  async #prefix(count) {
    const { x, mask, channels } = this.#utterance;
    const { series, mask: masked } = this.roles;
    const feeds = { [series.name]: { ...x, data: x.data.slice().fill(series.fill, count * channels) } };
    if (mask) feeds[masked.name] = { ...mask, data: mask.data.slice().fill(0, count) };
    const live = await this.app.live(this.model);
    const { outputs, ms } = await live.model.run(feeds);
    return { logits: answerRow(outputs[this.model.evaluation.output], count), ms, label: live.label };
  }

  #show({ logits, ms, label }) {
    const shares = softmax(logits);
    const best = argmax(logits);
    const truth = this.evaluation.targets[this.#utterance.index];
    const done = this.#heard >= this.#utterance.length;
    this.error.hidden = true;
    this.answer.textContent = this.model.labels[best];
    this.confidence.textContent = `${percent(shares[best])} sure after ${this.#heard} of ${this.#utterance.length} frames${done ? (best === truth ? " · right" : ` · wrong, it was ${this.model.labels[truth]}`) : ""}`;
    this.bars.show(shares);
    this.timing.textContent = `Model ${millis(ms)} a frame · ${label}`;
  }

  #place() {
    this.scrub.value = String(this.#heard);
    this.place.textContent = `${this.#heard} / ${this.#utterance.length}`;
    this.scrub.setAttribute("aria-valuetext", `frame ${this.#heard} of ${this.#utterance.length}`);
  }

  #paint() {
    if (this.#utterance) {
      this.#paintChannels();
      this.#paintBeliefs();
    }
  }

  /** One lane a channel; what is not heard yet is a faint line. */
  #paintChannels() {
    const { context, width, height } = sharpContext(this.chart);
    if (!width) return;
    const { data, channels, length } = this.#utterance;
    const left = 30, right = 10, top = 14;
    const lane = (height - 2 * top) / channels;
    const x = (frame) => left + (frame / Math.max(length - 1, 1)) * (width - left - right);
    const largest = Math.max(1e-6, ...data.map(Math.abs));
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (let c = 0; c < channels; c++) {
      const middle = top + lane * (c + 0.5);
      const y = (frame) => middle - (data[frame * channels + c] / largest) * lane * 0.9;
      context.fillStyle = colour("muted");
      context.textAlign = "right";
      context.fillText(String(c + 1), left - 10, middle);
      line(context, colour("line"), 1, [[left, middle], [width - right, middle]]);
      const points = [...Array(length).keys()].map((f) => [x(f), y(f)]);
      line(context, colour("faint"), 1.5, points);
      line(context, `hsl(${(168 + c * 17) % 360} 60% ${colour("trace-light")})`, 2.2, points.slice(0, this.#heard));
      if (this.#heard) dot(context, points[this.#heard - 1], `hsl(${(168 + c * 17) % 360} 60% ${colour("trace-light")})`);
    }
    if (this.#heard) {
      const at = x(this.#heard - 1);
      line(context, colour("accent"), 1.5, [[at, top], [at, height - top]]);
    }
  }

  #paintBeliefs() {
    const { context, width, height } = sharpContext(this.belief);
    if (!width) return;
    const { length } = this.#utterance;
    const left = 46, right = 8, top = 8, bottom = 20;
    const x = (frame) => left + (frame / Math.max(length - 1, 1)) * (width - left - right);
    const y = (share) => top + (1 - share) * (height - top - bottom);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.fillStyle = colour("muted");
    for (const share of [0, 0.5, 1]) {
      line(context, colour("line"), 1, [[left, y(share)], [width - right, y(share)]]);
      context.textAlign = "right";
      context.fillText(`${share * 100} %`, left - 6, y(share));
    }
    context.textAlign = "left";
    context.fillText("frame 1", left, height - 7);
    context.textAlign = "right";
    context.fillText(String(length), width - right, height - 7);
    if (!this.#beliefs.length) return;
    const shares = this.#beliefs.map((b) => softmax(b.logits));
    const best = argmax(shares.at(-1));
    this.model.labels.forEach((_, c) => {
      if (c !== best) line(context, colour("faint"), 1.5, shares.map((s, f) => [x(f), y(s[c])]));
    });
    const winner = shares.map((s, f) => [x(f), y(s[best])]);
    line(context, colour("accent"), 2.5, winner);
    dot(context, winner.at(-1), colour("accent"));
  }

  fail(error) {
    this.error.hidden = false;
    this.error.textContent = `No answer. ${error.message}`;
    this.answer.textContent = "–";
    this.confidence.textContent = "";
    this.bars.show(null);
  }
}

/**
 * Which input is the series and which its mask, as the preprocessing's steps tell.
 *
 * @throws {Error} they do not pad one series
 */
export function rolesOf(source) {
  const inputs = Object.entries(source?.inputs ?? {});
  const padded = inputs.map(([name, steps]) => [name, steps.find((s) => s.op === "pad_end")]).filter(([, step]) => step);
  const masks = inputs.filter(([, steps]) => steps.some((s) => s.op === "mask_of_length"));
  if (padded.length !== 1 || inputs.length !== 1 + masks.length || masks.length > 1) {
    throw new Error("the package does not say how an utterance becomes an input");
  }
  const [[name, step]] = padded;
  return { series: { name, fill: step.fill }, mask: masks.length ? { name: masks[0][0] } : null };
}

function line(context, style, width, points) {
  if (points.length < 2) return;
  context.strokeStyle = style;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}

function dot(context, [x, y], style) {
  context.fillStyle = style;
  context.beginPath();
  context.arc(x, y, 3.5, 0, 2 * Math.PI);
  context.fill();
}
