/**
 * Drives the page in Chromium through one scenario and prints what it saw as JSON.
 *
 * node drive.mjs SCENARIO URL OUT CHROMIUM; screenshots and downloads go to OUT.
 * Facts only: what they must be is judged by runtime_tests/test_web_demo.py.
 */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { DESKTOP, PHONE, findings, launch, notices, open, selfTest } from "./harness.mjs";

const [scenario, url, out, chromium] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const shot = (page, name, fullPage = true) => page.screenshot({ path: path.join(out, `web-${name}.png`), fullPage });

/** Strokes of a digit in shares of the canvas's side. */
const DIGITS = {
  0: [[...Array(33).keys()].map((i) => [0.5 + 0.22 * Math.sin((i / 16) * Math.PI), 0.5 - 0.33 * Math.cos((i / 16) * Math.PI)])],
  1: [[[0.5, 0.15], [0.5, 0.85]]],
  7: [[[0.25, 0.2], [0.72, 0.2], [0.45, 0.85]]],
};

async function drawDigit(page, digit) {
  await page.click("text=Clear");
  const box = await page.locator("canvas.pad").boundingBox();
  const at = ([x, y]) => [box.x + x * box.width, box.y + y * box.height];
  for (const stroke of DIGITS[digit]) {
    await page.mouse.move(...at(stroke[0]));
    await page.mouse.down();
    for (const point of stroke.slice(1)) await page.mouse.move(...at(point), { steps: 6 });
    await page.mouse.up();
  }
  await page.waitForTimeout(400);
  return answer(page, "draw");
}

function answer(page, view) {
  return page.evaluate((v) => ({
    answer: document.querySelector(`#panel-${v} .answer`).textContent,
    confidence: document.querySelector(`#panel-${v} .confidence`).textContent,
    timing: document.querySelector(`#panel-${v} .timing`).textContent,
    alert: document.querySelector(`#panel-${v} .result > .alert:not([hidden])`)?.textContent ?? null,
  }), view);
}

/** Rule violations of axe-core, WCAG 2.2 AA and best practices. */
async function accessibility(page, where) {
  await page.waitForTimeout(150);
  // Added through the debugger, which the page's content security policy does not stop.
  if (!(await page.evaluate(() => "axe" in window))) await page.evaluate(axe);
  const found = await page.evaluate(async () => (await window.axe.run(document, { resultTypes: ["violations"] })).violations);
  return found.map((v) => ({ where, id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.slice(0, 4).map((n) => `${n.html.slice(0, 160)} ${n.failureSummary?.slice(0, 200)}`) }));
}

const overflow = (page) => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);

async function watchShifts(profile) {
  await profile.addInitScript(() => {
    window.layoutShift = 0;
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.layoutShift += entry.value;
    }).observe({ type: "layout-shift", buffered: true });
  });
}

const facts = async (page, log) => ({
  console: log.console, foreign: log.foreign, notices: await notices(page), findings: await findings(page),
  health: await page.textContent("#health"), options: await page.$$eval("#live-backend option", (all) => all.map((o) => o.textContent)),
});

async function listen(page, model) {
  if ((await page.$("#listen-model")) && (await page.inputValue("#listen-model")) !== model) {
    await page.selectOption("#listen-model", model);
    await page.waitForFunction(() => document.querySelector("#listen-utterance").options.length > 5);
    await page.waitForTimeout(800);
  }
  await page.selectOption("#panel-listen select[aria-label=Speed]", "3");
  await page.selectOption("#listen-utterance", "5");
  await page.click("#panel-listen button.primary");
  await page.waitForTimeout(700);
  await shot(page, `desktop-listen-${model}`);
  await page.waitForFunction(() => /^(Play again)$/.test(document.querySelector("#panel-listen button.primary").textContent), null, { timeout: 60_000 });
  const heard = await answer(page, "listen");
  // By keyboard: back by five frames on the slider.
  await page.focus("#panel-listen input[type=range]");
  for (let i = 0; i < 5; i++) await page.keyboard.press("ArrowLeft");
  await page.waitForTimeout(500);
  return { ...heard, place: await page.textContent("#panel-listen .player output"), scrubbed: await answer(page, "listen"), mode: await page.textContent("#panel-listen .result .note") };
}

async function measured(page, kind, model, backend, settings = {}) {
  await page.selectOption("#bench-model", model);
  await page.selectOption("#bench-backend", backend);
  if (settings.threads) await page.selectOption("#bench-threads", String(settings.threads));
  if (settings.runs) await page.fill("#bench-runs", String(settings.runs));
  if (settings.seconds) await page.fill("#bench-seconds", String(settings.seconds));
  const before = await page.$$eval("#results > *", (all) => all.length);
  await page.click(`#run-${kind}`);
  await page.waitForFunction((n) => document.querySelectorAll("#results > *").length > n && document.querySelector("#run-latency").disabled === false, before, { timeout: 180_000 });
  return page.$eval("#results > *", (card) => ({ ...card.dataset, text: card.textContent, alert: card.classList.contains("alert") }));
}

const SCENARIOS = {
  /** Everything a person does, at a desk. */
  async tour(browser) {
    const { page, log } = await open(browser, url, { before: watchShifts });
    const state = await selfTest(page);
    const models = [...new Set((await findings(page)).map((f) => f.model))];
    const result = { state, models, firstPredictionMs: Number(await page.evaluate(() => document.body.dataset.firstPredictionMs)), violations: [] };
    result.sample = await answer(page, "draw");
    result.layoutShift = await page.evaluate(() => window.layoutShift);
    await shot(page, "desktop-draw");
    result.violations.push(...await accessibility(page, "draw"));
    result.drawn = {};
    for (const digit of Object.keys(DIGITS)) result.drawn[digit] = await drawDigit(page, digit);
    await shot(page, "desktop-drawn");
    // By keyboard: a test image, then the tabs.
    await page.focus(".sample >> nth=4");
    await page.keyboard.press("Enter");
    await page.waitForTimeout(300);
    result.byKeyboard = { ...await answer(page, "draw"), label: await page.getAttribute(".sample >> nth=4", "aria-label") };
    await page.selectOption("#live-backend", "litert-wasm");
    await page.waitForTimeout(600);
    result.onLitert = await answer(page, "draw");
    await page.focus("#tab-draw");
    await page.keyboard.press("ArrowRight");
    result.tabByKey = await page.evaluate(() => [document.activeElement.id, !document.getElementById("panel-listen").hidden]);
    await page.selectOption("#live-backend", "ort-wasm");
    await page.click("#tab-listen");
    result.heard = {};
    for (const model of models.filter((m) => m.includes("vowels"))) result.heard[model] = await listen(page, model);
    await shot(page, "desktop-listen");
    result.violations.push(...await accessibility(page, "listen"));
    await page.click("#tab-measure");
    result.results = [];
    for (const model of models) {
      for (const backend of ["ort-wasm", "litert-wasm"]) {
        result.results.push(await measured(page, "latency", model, backend, { runs: 60, threads: 1 }));
        result.results.push(await measured(page, "accuracy", model, backend));
      }
    }
    result.results.push(await measured(page, "sustained", models[0], "ort-wasm", { seconds: 2 }));
    result.threaded = [];
    for (const backend of ["ort-wasm", "litert-wasm"]) {
      result.threaded.push(await measured(page, "latency", models[0], backend, { runs: 10, threads: 2 }));
    }
    await page.fill("#bench-runs", "0");
    await page.click("#run-latency");
    result.absurdRuns = await page.textContent("#panel-measure .status");
    await page.fill("#bench-runs", "20");
    await page.fill("#device-label", "CI Chromium");
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#download-report")]);
    await download.saveAs(path.join(out, "web-report.json"));
    await shot(page, "desktop-measure");
    result.violations.push(...await accessibility(page, "measure"));
    return { ...result, ...await facts(page, log) };
  },

  /** A phone: 360 pixels, touch, dark. */
  async phone(browser) {
    const { page, log } = await open(browser, url, { viewport: PHONE, dark: true, hasTouch: true, isMobile: true, deviceScaleFactor: 2 });
    const result = { state: await selfTest(page), overflow: {}, violations: [] };
    await page.tap("text=Clear");
    const box = await page.locator("canvas.pad").boundingBox();
    const client = await page.context().newCDPSession(page);
    const touch = (type, points) => client.send("Input.dispatchTouchEvent", { type, touchPoints: points });
    const at = (x, y) => [{ x: box.x + x * box.width, y: box.y + y * box.height }];
    await touch("touchStart", at(0.5, 0.15));
    for (let i = 1; i <= 12; i++) await touch("touchMove", at(0.5, 0.15 + (0.7 * i) / 12));
    await touch("touchEnd", []);
    await page.waitForTimeout(500);
    result.touched = await answer(page, "draw");
    for (const view of ["draw", "listen", "measure"]) {
      await page.tap(`#tab-${view}`);
      await page.waitForTimeout(300);
      result.overflow[view] = await overflow(page);
      result.violations.push(...await accessibility(page, `phone ${view}`));
      await shot(page, `phone-${view}`);
    }
    return { ...result, ...await facts(page, log) };
  },

  /** First visit, second visit, and a third without network, in one profile. */
  async visits(browser) {
    const { page, profile, log } = await open(browser, url);
    const result = { states: [await selfTest(page)] };
    await page.waitForFunction(() => /offline/.test(document.getElementById("offline").textContent), null, { timeout: 60_000 });
    result.offlineSays = await page.textContent("#offline");
    const first = async () => Number(await page.evaluate(() => document.body.dataset.firstPredictionMs));
    result.firstPredictionMs = [await first()];
    await page.reload();
    result.states.push(await selfTest(page));
    result.firstPredictionMs.push(await first());
    await profile.setOffline(true);
    await page.reload();
    result.states.push(await selfTest(page));
    result.offlineAnswer = await answer(page, "draw");
    return { ...result, ...await facts(page, log) };
  },

  /** First visit only; the server counts the bytes. */
  async first(browser) {
    const { page, log } = await open(browser, url);
    const state = await selfTest(page);
    await page.waitForFunction(() => /offline/.test(document.getElementById("offline").textContent), null, { timeout: 60_000 });
    return { state, ...await facts(page, log) };
  },

  /** A package that something is wrong with. */
  async broken(browser) {
    const { page, log } = await open(browser, url);
    const state = await selfTest(page);
    await page.waitForTimeout(300);
    const text = await page.textContent("main");
    const draw = (await page.$("#panel-draw .answer")) ? await answer(page, "draw") : null;
    await shot(page, `broken-${path.basename(out)}`);
    return { state, draw, text: text.replace(/\s+/g, " ").slice(0, 2000), ...await facts(page, log) };
  },

  /** A server without COOP and COEP. */
  async unisolated(browser) {
    const { page, log } = await open(browser, url, {
      serviceWorkers: "block",
      before: (profile) => profile.route("**/*", async (route) => {
        const response = await route.fetch();
        const headers = { ...response.headers() };
        delete headers["cross-origin-opener-policy"];
        delete headers["cross-origin-embedder-policy"];
        await route.fulfill({ response, headers });
      }),
    });
    const state = await selfTest(page);
    await page.click("#tab-measure");
    const threads = await page.$$eval("#bench-threads option", (all) => all.map((o) => o.value));
    return { state, threads, offline: await page.textContent("#offline"), ...await facts(page, log) };
  },

  /** WebGPU, chosen by the person, on a software adapter. */
  async webgpu(browser) {
    const { page, log } = await open(browser, url);
    if (!(await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter())))) return { adapter: false };
    const result = { adapter: true, before: await selfTest(page) };
    await page.selectOption("#live-backend", "ort-webgpu");
    await page.waitForFunction(() => document.body.dataset.selftest === "running", null, { timeout: 10_000 }).catch(() => {});
    result.state = await selfTest(page, 240_000);
    await page.click(".sample >> nth=6");
    await page.waitForFunction(() => /6/.test(document.querySelector("#panel-draw .answer").textContent), null, { timeout: 120_000 }).catch(() => {});
    result.drawn = await answer(page, "draw");
    await page.click("#tab-measure");
    await shot(page, "desktop-webgpu");
    return { ...result, ...await facts(page, log) };
  },

  /** A browser whose WebAssembly knows no SIMD. */
  async nosimd(browser) {
    const { page, log } = await open(browser, url, {
      before: (profile) => profile.addInitScript(() => { WebAssembly.validate = () => false; }),
    });
    const state = await selfTest(page);
    await page.waitForTimeout(300);
    return { state, draw: await answer(page, "draw"), ...await facts(page, log) };
  },
};

const browser = await launch(chromium, { webgpu: scenario === "webgpu" });
try {
  process.stdout.write(JSON.stringify(await SCENARIOS[scenario](browser)));
} finally {
  await browser.close();
}
