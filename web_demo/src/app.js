/** The page: opens the package, shows the views, runs the self-test, keeps things offline. */

import { ASSETS } from "./assets.js";
import { BACKENDS, Backends, backend } from "./backends/index.js";
import { choices, el } from "./dom.js";
import { describe, power, probe, probeGpu } from "./environment.js";
import { keepOffline } from "./offline.js";
import { Package } from "./package.js";
import { Report } from "./report.js";
import { testModel, testPreprocessing, testStream } from "./selftest.js";
import { DrawView } from "./views/draw.js";
import { ListenView } from "./views/listen.js";
import { MeasureView } from "./views/measure.js";

const TABS = ["draw", "listen", "measure"];
const STORED = "flowexport-runtime";
const $ = (id) => document.getElementById(id);

class App {
  findings = [];
  testing = true;
  #listeners = [];
  #live = new Map();
  #testRun = Promise.resolve();

  constructor(pack, env, description, backends) {
    this.pack = pack;
    this.env = env;
    this.description = description;
    this.backends = backends;
    this.backends.pack = pack;
    this.report = new Report(pack, ASSETS.versions.demo);
    this.liveBackend = BACKENDS[0].id;
  }

  onFindings(listener) {
    this.#listeners.push(listener);
  }

  /** Resolves when no self-test disturbs a measurement. */
  idle() {
    return this.#testRun;
  }

  /**
   * The model on the runtime that the person chose, or on the next that can run it.
   *
   * @returns {Promise<{model: LoadedModel, label: string}>}
   */
  live(model) {
    const key = `${this.liveBackend} ${model.id}`;
    if (!this.#live.has(key)) {
      const loading = this.backends.modelOrFallback(this.liveBackend, 1, model.files, model.id).then(
        ({ model: loaded, requested, reason }) => {
          const { info } = loaded;
          const label = `${info.name} ${info.version ?? ""}, ${info.effective}, ${info.threads} thread${info.threads === 1 ? "" : "s"}`;
          if (reason) {
            notice("warn", `fallback-${key}`, `${model.id}: ${backend(requested).label} was asked for, ${loaded.backend.label} is used. ${reason}.`);
          }
          return { model: loaded, label: reason ? `${label} (not ${backend(requested).label})` : label };
        },
      );
      this.#live.set(key, loading);
      loading.catch(() => this.#live.delete(key));
    }
    return this.#live.get(key);
  }

  /** Test preprocessing, then every model on every runtime; slow ones only when chosen. */
  selfTest() {
    this.#testRun = this.#testRun.then(() => this.#selfTest());
    return this.#testRun;
  }

  async #selfTest() {
    this.testing = true;
    this.findings = [];
    this.#changed();
    const start = await power();
    for (const model of this.pack.models) {
      const finding = await testPreprocessing(this.pack, model);
      this.report.errors = this.report.errors.filter((e) => e.stage !== "preprocessing" || !e.message.startsWith(`${model.id}:`));
      this.report.addPreprocessing(finding);
      this.#found({ ...finding, allowed: Math.max(0, ...model.preprocessing.sources.map((s) => s.golden.max_abs)) });
    }
    for (const spec of BACKENDS.filter((b) => b.eager || b.id === this.liveBackend)) {
      for (const model of this.pack.models) {
        const finding = await testModel(this.pack, this.backends, model, spec.id, 1);
        this.report.addGolden({ model, spec, requestedThreads: 1, power: start }, finding);
        this.#found(finding);
        if (!model.streaming) continue;
        const steps = await testStream(this.pack, this.backends, model, spec);
        if (!steps.notRun) this.report.addGolden({ model, spec, requestedThreads: 1, entry: "step", power: start }, steps);
        this.#found(steps);
      }
    }
    for (const spec of BACKENDS.filter((b) => !b.eager && b.id !== this.liveBackend)) {
      const error = this.backends.missing(spec.id) ?? "not asked for; choose it as the runtime to test it";
      for (const model of this.pack.models) {
        this.#found({ model: model.id, kind: "golden", backend: spec.id, ok: false, notRun: true, cases: [], maxRel: null, loaded: null, error });
      }
    }
    this.testing = false;
    this.#changed();
  }

  #found(finding) {
    this.findings.push(finding);
    if (!finding.ok && !finding.notRun) {
      const what = finding.kind === "preprocessing" ? "this page's preprocessing" : `${backend(finding.backend).label}${finding.kind === "streaming" ? ", step by step" : ""}`;
      const bad = finding.cases.find((c) => !c.ok);
      const why = finding.error ?? `${finding.cases.filter((c) => !c.ok).length} of ${finding.cases.length} golden cases failed (${bad?.name}: ${bad?.reason})`;
      notice("bad", `finding-${finding.model}-${what}`, `Self-test FAILED: ${finding.model} on ${what}. ${why}`);
    }
    this.#changed();
  }

  #changed() {
    const failed = this.findings.filter((f) => !f.ok && !f.notRun).length;
    const passed = this.findings.filter((f) => f.ok).length;
    const health = $("health");
    health.className = `health ${failed ? "bad" : this.testing ? "" : passed ? "good" : "warn"}`;
    health.textContent = failed ? `${failed} FAILED` : this.testing ? "Testing…" : passed ? `${passed} checks passed` : "Not tested";
    document.body.dataset.selftest = this.testing ? "running" : failed ? "failed" : passed ? "passed" : "none";
    for (const listener of this.#listeners) listener();
  }

  /** Note when the first answer was on the page. */
  firstPrediction() {
    if (document.body.dataset.firstPredictionMs) return;
    document.body.dataset.firstPredictionMs = performance.now().toFixed(0);
  }
}

/** A sentence above the views; one a key. */
function notice(kind, key, text) {
  const id = `notice-${key}`.replace(/[^\w-]+/g, "-");
  $(id)?.remove();
  const icon = { bad: "Failure", warn: "Note" }[kind];
  $("notices").append(el(`p.notice.${kind}`, { id, role: kind === "bad" ? "alert" : null }, el("strong", {}, `${icon}: `), text));
}

function selectTab(name, focus = false) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    $(`panel-${tab}`).hidden = !chosen;
    if (chosen && focus) $(`tab-${tab}`).focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
}

function wireTabs() {
  for (const tab of TABS) {
    $(`tab-${tab}`).addEventListener("click", () => selectTab(tab));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? TABS.length - 1 : step ? (TABS.indexOf(tab) + step + TABS.length) % TABS.length : null;
      if (to === null) return;
      event.preventDefault();
      selectTab(TABS[to], true);
    });
  }
  $("health").addEventListener("click", () => selectTab("measure", true));
  const fromHash = () => TABS.includes(location.hash.slice(1)) && selectTab(location.hash.slice(1));
  addEventListener("hashchange", fromHash);
  fromHash();
}

function wireRuntimeChoice(app, views) {
  const select = $("live-backend");
  const stored = localStorage.getItem(STORED);
  if (BACKENDS.some((b) => b.id === stored) && !app.backends.missing(stored)) app.liveBackend = stored;
  select.replaceChildren(...choices(BACKENDS.map((b) => [b.id, b.label, app.backends.missing(b.id)]), app.liveBackend));
  select.disabled = false;
  select.addEventListener("change", () => {
    app.liveBackend = select.value;
    localStorage.setItem(STORED, select.value);
    views.draw?.wait();
    views.draw?.predict();
    views.listen?.start();
    if (!backend(select.value).eager) app.selfTest();
  });
}

function empty(name, text) {
  $(`panel-${name}`).replaceChildren(el("p.waiting", {}, text));
}

function fill(name, view) {
  $(`panel-${name}`).replaceChildren(view.node);
  return view;
}

/** What a start without network needs: the runtimes' wasm and the package. */
function offlineFiles(pack) {
  const litert = performance.getEntriesByType("resource").map((e) => e.name).filter((n) => n.includes(ASSETS.litert));
  const variant = litert.length ? [] : [`${ASSETS.litert}litert_wasm_internal.js`, `${ASSETS.litert}litert_wasm_internal.wasm`];
  return ["package/manifest.json", ...Object.keys(pack.manifest.files).map((f) => `package/${f}`), ASSETS.ortWasm.wasm, ...litert, ...variant];
}

async function main() {
  wireTabs();
  const env = probe();
  const backends = new Backends(env);
  // The runtime starts while the package is opened; its failure is told where it is used.
  backends.runtime(BACKENDS[0].id, 1).catch(() => {});
  if (!env.simd) notice("bad", "simd", env.wasm ? "This browser has no WebAssembly SIMD. No runtime can start, so nothing here gives an answer. A browser of 2021 or later has it." : "This browser has no WebAssembly, so no model can run.");
  if (!env.isolated) notice("warn", "threads", "The page is not cross-origin isolated, so each runtime has one thread. `flowexport demo` on localhost, or https with COOP and COEP headers, gives threads.");
  const [pack, description] = await Promise.all([
    Package.open(new URL("package/", document.baseURI)),
    probeGpu(env).then(() => describe(env)),
  ]);
  const app = new App(pack, env, description, backends);
  const views = {};
  const [image] = pack.ofTask("image-classification");
  const [series, ...others] = pack.ofTask("time-series-classification");
  wireRuntimeChoice(app, views);
  fill("measure", new MeasureView(app));
  if (image) views.draw = fill("draw", new DrawView(app, image));
  else empty("draw", "This package has no image model. Add one: flowexport demo out/digits …");
  // Another series model takes the view over when it is chosen there.
  const openListen = (model, focus = false) => {
    views.listen?.pause();
    views.listen = fill("listen", new ListenView(app, model, [series, ...others], (chosen) => openListen(chosen, true).start()));
    if (focus) views.listen.modelPick.focus();
    return views.listen;
  };
  if (series) openListen(series);
  else empty("listen", "This package has no time-series model. Add one: flowexport demo out/japanese-vowels …");
  if (!image && series && !location.hash) selectTab("listen");
  $("about").textContent = `Models, data and drawings stay in this browser. Package of flowexport ${pack.manifest.flowexport}, ${pack.models.map((m) => m.id).join(", ")}; ${pack.sha256.slice(0, 8)}.`;
  document.body.dataset.ready = "true";
  const credits = [...new Set(pack.models.map((m) => m.evaluation?.attribution).filter(Boolean))];
  for (const credit of credits) $("about").after(el("p.credit", {}, credit));

  await (views.draw ?? views.listen)?.start();
  if (views.draw) await views.listen?.start();
  await app.selfTest();
  if (env.simd) await keepOffline(offlineFiles(pack), (text) => ($("offline").textContent = text));
}

function stopped(error) {
  document.body.dataset.selftest = "failed";
  notice("bad", "start", `The page cannot start: ${error.message}`);
  for (const tab of TABS) empty(tab, "Nothing to show: the package could not be used.");
  $("health").textContent = "FAILED";
  $("health").className = "health bad";
  $("live-backend").replaceChildren(el("option", {}, "none"));
}

addEventListener("error", (event) => notice("bad", "unexpected", `Unexpected: ${event.message}`));
addEventListener("unhandledrejection", (event) => notice("bad", "unexpected", `Unexpected: ${event.reason?.message ?? event.reason}`));
main().catch(stopped);
