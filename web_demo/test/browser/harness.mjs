/** Chromium by Playwright, with everything that a test must not miss written down. */
import { chromium } from "playwright-core";

export const PHONE = { width: 360, height: 740 };
export const DESKTOP = { width: 1280, height: 860 };
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];

/** WebGPU on SwiftShader: the real API, computed by the processor. */
const SOFTWARE_GPU = [
  "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan",
  "--use-vulkan=swiftshader", "--disable-vulkan-surface",
];

export async function launch(executablePath, { webgpu = false } = {}) {
  const args = webgpu ? [...FLAGS.filter((f) => f !== "--disable-gpu"), ...SOFTWARE_GPU] : FLAGS;
  return chromium.launch({ executablePath, headless: true, args });
}

/**
 * Open the page in a fresh profile.
 *
 * `log` fills with console errors, page errors, requests off the origin, and bytes received.
 */
export async function open(browser, url, { viewport = DESKTOP, dark = false, before, hash = "", ...context } = {}) {
  const profile = await browser.newContext({
    viewport, colorScheme: dark ? "dark" : "light", acceptDownloads: true, reducedMotion: "reduce", ...context,
  });
  const page = await profile.newPage();
  const log = { console: [], foreign: [], failed: [], bytes: {} };
  const origin = new URL(url).origin;
  page.on("console", (m) => m.type() === "error" && log.console.push(`${m.text()} ${m.location()?.url ?? ""}`));
  page.on("pageerror", (e) => log.console.push(`page error: ${e.message}`));
  profile.on("request", (r) => {
    const u = new URL(r.url());
    if (!["blob:", "data:"].includes(u.protocol) && u.origin !== origin) log.foreign.push(r.url());
  });
  profile.on("requestfailed", (r) => log.failed.push(`${r.url()} ${r.failure()?.errorText}`));
  await before?.(profile, page);
  await page.goto(url + hash);
  return { page, profile, log };
}

/** Wait for the self-test; returns `passed`, `failed` or `none`. */
export async function selfTest(page, timeout = 120_000) {
  await page.waitForFunction(() => ["passed", "failed", "none"].includes(document.body.dataset.selftest), null, { timeout });
  return page.evaluate(() => document.body.dataset.selftest);
}

/** The self-test's table as data. */
export function findings(page) {
  return page.evaluate(() => [...document.querySelectorAll("#panel-measure tbody tr")].map((r) => ({
    model: r.dataset.model, what: r.dataset.what, verdict: r.dataset.verdict,
    cases: r.cells[3].textContent, worst: r.cells[4].textContent, note: r.cells[7].textContent,
  })));
}

export function notices(page) {
  return page.$$eval("#notices .notice", (all) => all.map((n) => n.textContent));
}
