/** Measure: self-test, latency, a sustained run, accuracy, and the report to take away. */

import { BACKENDS, backend } from "../backends/index.js";
import { accuracy, measure } from "../bench.js";
import { badge, bytes, choices, el, field, millis, percent, tiny } from "../dom.js";
import { threadChoices } from "../environment.js";
import { percentile } from "../statistics.js";
import { histogramPlot, timePlot } from "./plots.js";

export class MeasureView {
  #abort = null;

  constructor(app) {
    this.app = app;
    this.node = el("div.view.measure", {}, this.#selfTest(), this.#settings(), this.#report());
    app.onFindings(() => this.#showFindings());
  }

  #selfTest() {
    this.findings = el("tbody");
    this.again = el("button", { type: "button", onclick: () => this.app.selfTest() }, "Test again");
    this.verdict = el("p.verdict-line", { role: "status" }, "Testing…");
    return el("section.card", { "aria-labelledby": "selftest-title" },
      el("h2", { id: "selftest-title" }, "Self-test"),
      el("p.note", {}, "Every start, the page runs the package's golden cases: first its own preprocessing, then each model on each runtime, against outputs computed in float64."),
      this.verdict,
      el("div.scroll", { tabIndex: 0, role: "region", "aria-label": "Results of the self-test" },
        el("table", {},
          el("thead", {}, el("tr", {}, ["Model", "Verdict", "What", "Cases", "Worst", "Allowed", "Load", "Note"].map((t) => el("th", { scope: "col" }, t)))),
          this.findings)),
      el("div.row", {}, this.again),
    );
  }

  #showFindings() {
    const { findings, testing } = this.app;
    this.findings.replaceChildren(...findings.map(findingRow));
    const failed = findings.filter((f) => !f.ok && !f.notRun).length;
    const passed = findings.filter((f) => f.ok).length;
    const skipped = findings.filter((f) => f.notRun).length;
    this.verdict.className = `verdict-line ${failed ? "bad" : testing ? "" : passed ? "good" : "warn"}`;
    this.verdict.textContent = testing
      ? `Testing… ${passed + failed} done${failed ? `, ${failed} FAILED` : ""}`
      : failed
        ? `${failed} of ${findings.length} checks FAILED. Do not trust the answers of what failed.`
        : passed
          ? `All ${passed} checks passed${skipped ? `; ${skipped} did not run` : ""}.`
          : "Nothing could be tested.";
    this.again.disabled = testing;
    this.#syncReport();
  }

  #settings() {
    const { app } = this;
    const models = app.pack.models;
    this.model = el("select", { id: "bench-model" }, choices(models.map((m) => [m.id, m.id]), models[0].id));
    this.backend = el("select", { id: "bench-backend" }, choices(BACKENDS.map((b) => [b.id, b.label, b.missing(app.env)]), BACKENDS[0].id));
    this.threads = el("select", { id: "bench-threads" }, choices(threadChoices(app.env).map((n) => [n, String(n)]), 1));
    this.runs = el("input", { id: "bench-runs", type: "number", min: "5", max: "5000", value: "100", inputMode: "numeric" });
    this.seconds = el("input", { id: "bench-seconds", type: "number", min: "2", max: "600", value: "20", inputMode: "numeric" });
    this.buttons = [
      el("button.primary", { type: "button", id: "run-latency", onclick: () => this.#start("latency") }, "Latency"),
      el("button", { type: "button", id: "run-accuracy", onclick: () => this.#start("accuracy") }, "Accuracy"),
      el("button", { type: "button", id: "run-sustained", onclick: () => this.#start("sustained") }, "Sustained run"),
      el("button", { type: "button", id: "run-all", onclick: () => this.#everything() }, "All models, all runtimes"),
    ];
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.#abort?.abort() }, "Stop");
    this.progress = el("progress", { hidden: true, max: 1, value: 0, "aria-label": "Progress" });
    this.status = el("p.status", { role: "status" }, "");
    this.results = el("div.results", { id: "results" });
    return el("section.card", { "aria-labelledby": "bench-title" },
      el("h2", { id: "bench-title" }, "Measurements"),
      el("div.fields", {}, field("Model", this.model), field("Runtime", this.backend),
        field("Threads", this.threads, app.env.isolated ? null : "one: the page is not cross-origin isolated"),
        field("Runs", this.runs), field("Sustained, seconds", this.seconds)),
      el("div.row", {}, this.buttons, this.stop),
      this.progress, this.status, this.results,
    );
  }

  #setting() {
    return {
      model: this.app.pack.model(this.model.value),
      backendId: this.backend.value,
      threads: Number(this.threads.value),
    };
  }

  async #start(kind) {
    await this.#guard(() => this.#one(kind, this.#setting()));
  }

  async #everything() {
    await this.#guard(async () => {
      for (const model of this.app.pack.models) {
        for (const spec of BACKENDS.filter((b) => b.eager && !b.missing(this.app.env))) {
          for (const kind of ["latency", "accuracy"]) {
            if (this.#abort.signal.aborted) return;
            await this.#one(kind, { model, backendId: spec.id, threads: Number(this.threads.value) });
          }
        }
      }
    });
  }

  /** One measurement at a time; whatever goes wrong is a result that says so. */
  async #guard(work) {
    if (this.#abort) return;
    if (!this.#valid()) return;
    this.#abort = new AbortController();
    for (const b of this.buttons) b.disabled = true;
    this.stop.hidden = this.progress.hidden = false;
    try {
      await this.app.idle();
      await work();
      this.status.textContent = this.#abort.signal.aborted ? "Stopped." : "Done.";
    } catch (error) {
      this.status.textContent = "Failed.";
      this.results.prepend(el("article.alert", { role: "alert" }, error.message));
    } finally {
      this.#abort = null;
      for (const b of this.buttons) b.disabled = false;
      this.stop.hidden = this.progress.hidden = true;
      this.#syncReport();
    }
  }

  #valid() {
    for (const input of [this.runs, this.seconds]) {
      if (!input.checkValidity() || input.value === "") {
        this.status.textContent = `${input === this.runs ? "Runs" : "Seconds"}: ${input.value || "nothing"} was given; a whole number from ${input.min} to ${input.max} was expected.`;
        input.focus();
        return false;
      }
    }
    return true;
  }

  async #one(kind, setting) {
    const name = `${setting.model.id} · ${backend(setting.backendId).label}`;
    this.progress.value = 0;
    this.status.textContent = `${name}: ${kind}…`;
    const options = { signal: this.#abort.signal };
    try {
      if (kind === "accuracy") {
        options.onProgress = (p) => (this.progress.value = p.done / p.samples);
        this.#put(accuracyCard(name, setting, await accuracy(this.app, setting, options)));
        return;
      }
      const runs = Number(this.runs.value);
      const seconds = Number(this.seconds.value);
      const sustained = kind === "sustained";
      options.onProgress = (p) => (this.progress.value = sustained ? p.seconds / seconds : p.runs / runs);
      const what = sustained ? { kind, seconds, warmup: 5 } : { kind, runs, warmup: Math.min(10, runs) };
      const measured = await measure(this.app, setting, what, options);
      this.#put(sustained ? sustainedCard(name, setting, measured) : latencyCard(name, setting, measured));
    } catch (error) {
      this.#put(el("article.result-card.alert", { role: "alert" }, el("h3", {}, `${name}: ${kind}`), el("p", {}, error.message)));
    }
  }

  #put(card) {
    this.results.prepend(card);
  }

  #report() {
    this.label = el("input", { id: "device-label", type: "text", value: this.app.description.device.label, maxLength: 80, autocomplete: "off" });
    this.download = el("button.primary", { type: "button", id: "download-report", onclick: () => this.#save() }, "Download the report");
    this.contents = el("p.note", {}, "");
    return el("section.card", { "aria-labelledby": "report-title" },
      el("h2", { id: "report-title" }, "Report"),
      el("p.note", {}, "Raw times and outputs as JSON (flowexport.report/1). Nothing is sent anywhere; `flowexport report merge` compares it with other devices."),
      field("This device's name", this.label),
      this.contents,
      el("div.row", {}, this.download),
    );
  }

  #syncReport() {
    const { size, errors } = this.app.report;
    this.contents.textContent = `Holds ${size} setting${size === 1 ? "" : "s"}${errors.length ? ` and ${errors.length} error${errors.length === 1 ? "" : "s"}` : ""}.`;
  }

  #save() {
    const { app } = this;
    const label = this.label.value.trim() || app.description.device.label;
    const description = { ...app.description, device: { ...app.description.device, label } };
    const text = JSON.stringify(app.report.toJson(description), null, 1);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const name = label.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "device";
    el("a", { href: url, download: `flowexport-report-${name}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

function findingRow(f) {
  const what = f.kind === "preprocessing" ? "preprocessing" : `${backend(f.backend).label}${f.kind === "streaming" ? ", step by step" : ""}`;
  const verdict = f.ok ? badge("good", "PASS") : f.notRun ? badge("warn", "NOT RUN") : badge("bad", "FAIL");
  const passed = f.cases.filter((c) => c.ok && !c.outside).length;
  const worst = f.kind === "preprocessing" ? worstOf(f.cases.map((c) => c.maxAbs)) : f.maxRel;
  const outside = f.cases.filter((c) => c.outside).map((c) => c.name);
  const reason = f.error ?? f.cases.find((c) => !c.ok)?.reason
    ?? (outside.length ? `outside the calibrated ranges, not judged: ${outside.join(", ")}` : f.loaded?.info.reason ?? "");
  const bad = f.cases.find((c) => !c.ok);
  const allowed = f.allowed ?? f.loaded?.file.tolerance.max_rel ?? null;
  return el("tr", { "data-verdict": f.ok ? "PASS" : f.notRun ? "NOT_RUN" : "FAIL", "data-model": f.model, "data-what": f.kind === "preprocessing" ? "preprocessing" : f.kind === "streaming" ? `${f.backend} step` : f.backend },
    el("th", { scope: "row" }, f.model), el("td", {}, verdict), el("td", {}, what),
    el("td", {}, f.cases.length ? `${passed} / ${f.cases.length}` : "–"),
    el("td", {}, f.cases.length ? tiny(worst) : "–"), el("td", {}, tiny(allowed)),
    el("td", {}, f.loaded ? `${bytes(f.loaded.file.size_bytes)}, ${millis(f.loaded.load.coldMs)}` : "–"),
    el("td.reason", {}, bad && !f.error ? `${bad.source ? `${bad.source}, ` : ""}${bad.name}: ${reason}` : reason));
}

/** Largest of what was compared; null where a case could not be. */
function worstOf(values) {
  return values.includes(null) ? null : Math.max(...values);
}

function facts(pairs) {
  return el("dl.facts", {}, pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

function effective(setting, loaded) {
  const { info } = loaded;
  const asked = setting.threads;
  const got = info.threads === asked ? `${asked} thread${asked === 1 ? "" : "s"}` : `${info.threads} thread of ${asked} asked for`;
  return `${info.name} ${info.version ?? ""} · ${info.effective} · ${got}${info.reason ? ` (${info.reason})` : ""}`;
}

function latencyCard(name, setting, { result, loaded, summary }) {
  return el("article.result-card", { "data-kind": "latency", "data-model": setting.model.id, "data-backend": setting.backendId, "data-min": String(summary.min), "data-runs": String(summary.runs) },
    el("h3", {}, `${name}: latency`),
    el("p.note", {}, effective(setting, loaded)),
    facts([["median", millis(summary.p50)], ["fastest", millis(summary.min)], ["90 %", millis(summary.p90)], ["99 %", millis(summary.p99)], ["preparing", millis(percentile(result.pre_ms, 50))], ["runs", String(summary.runs)]]),
    histogramPlot(result.inference_ms, "Inference times"));
}

function sustainedCard(name, setting, { result, loaded, summary }) {
  const part = Math.max(1, Math.floor(summary.runs / 5));
  const first = percentile(result.inference_ms.slice(0, part), 50);
  const last = percentile(result.inference_ms.slice(-part), 50);
  return el("article.result-card", { "data-kind": "sustained", "data-model": setting.model.id, "data-backend": setting.backendId, "data-runs": String(summary.runs) },
    el("h3", {}, `${name}: sustained`),
    el("p.note", {}, effective(setting, loaded)),
    facts([["runs", String(summary.runs)], ["a second", summary.runs ? (summary.runs / (result.duration_ms / 1000)).toFixed(0) : "–"], ["median, first fifth", millis(first)], ["median, last fifth", millis(last)], ["change", first && last ? `${last >= first ? "+" : "−"}${Math.abs(100 * (last / first - 1)).toFixed(1)} %` : "–"]]),
    timePlot(result.inference_ms, "Inference time, run by run"));
}

function accuracyCard(name, setting, { correct, agreeing, samples, complete, evaluation, loaded, predictions, errors }) {
  const native = loaded.file.verification.accuracy;
  const kind = !complete || errors.length || agreeing < samples ? "bad" : "good";
  const labels = setting.model.labels;
  const wrong = predictions.map((p, i) => [p, i]).filter(([p, i]) => p !== evaluation.targets[i]).slice(0, 6);
  return el("article.result-card", { "data-kind": "accuracy", "data-model": setting.model.id, "data-backend": setting.backendId, "data-correct": String(correct), "data-agreeing": String(agreeing), "data-samples": String(samples), "data-complete": String(complete) },
    el("h3", {}, `${name}: accuracy `, badge(kind, complete ? (agreeing === samples ? "as the reference" : `${samples - agreeing} differ`) : "broken off")),
    el("p.note", {}, `${effective(setting, loaded)} · ${evaluation.name}`),
    complete
      ? facts([["accuracy", percent(correct / samples, 2)], ["correct", `${correct} of ${samples}`], ["as float64 predicts", `${agreeing} of ${samples}`], ["native, whole set", percent(native, 2)]])
      : el("p", {}, `Stopped after ${predictions.length} of ${samples} samples; that is no accuracy.`),
    errors.length ? el("p.alert", {}, `${errors.length} samples failed: ${errors[0]}`) : null,
    wrong.length && complete ? el("p.note", {}, `Not as labelled: ${wrong.map(([p, i]) => `#${i} ${labels[evaluation.targets[i]]} → ${p === null ? "failed" : labels[p]}`).join(", ")}${samples - correct > wrong.length ? ", …" : ""}`) : null);
}
