/** What this browser and device can do and are; what it does not tell is null. */

// (module (func (result v128) i32.const 0 i8x16.splat i8x16.popcnt))
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);

/** What is known at once; `probeGpu` adds the rest. */
export function probe() {
  return {
    wasm: typeof WebAssembly === "object",
    simd: typeof WebAssembly === "object" && WebAssembly.validate(SIMD),
    isolated: Boolean(globalThis.crossOriginIsolated),
    cores: navigator.hardwareConcurrency ?? null,
    webgpu: false,
    gpu: null,
    clockMs: clockResolution(),
  };
}

/** Ask for a WebGPU adapter and note it in `env`. */
export async function probeGpu(env) {
  const adapter = await withTimeout(navigator.gpu?.requestAdapter?.().catch(() => null), 1500);
  env.webgpu = Boolean(adapter);
  env.gpu = [adapter?.info?.vendor, adapter?.info?.architecture].filter(Boolean).join(" ") || null;
}

/** Thread counts worth offering: one, and up to the cores (8 at most). */
export function threadChoices(env) {
  if (!env.isolated) return [1];
  const most = Math.min(env.cores ?? 1, 8);
  return [1, 2, 4, 8].filter((n) => n <= most);
}

/** Smallest step of the clock that latencies are read from, milliseconds; null if none was seen. */
export function clockResolution() {
  let smallest = Infinity;
  for (let i = 0; i < 20; i++) {
    const start = performance.now();
    let now = start;
    for (let spins = 0; now === start && spins < 200_000; spins++) now = performance.now();
    if (now > start) smallest = Math.min(smallest, now - start);
  }
  return Number.isFinite(smallest) ? Number(smallest.toFixed(6)) : null;
}

/** Device, OS and browser, as far as the browser tells; the report's parts. */
export async function describe(env) {
  const ua = navigator.userAgent;
  const hints = await withTimeout(
    navigator.userAgentData?.getHighEntropyValues?.(["platformVersion", "architecture", "bitness", "model"]).catch(() => null),
    1000,
  );
  const brand = navigator.userAgentData?.brands?.find((b) => !/not.?a.?brand/i.test(b.brand) && b.brand !== "Chromium")
    ?? navigator.userAgentData?.brands?.find((b) => b.brand === "Chromium");
  const [, name, version] = ua.match(/(Firefox|Edg|OPR|HeadlessChrome|Chrome|Version)\/([\d.]+)/) ?? [];
  const os = parseOs(ua);
  const browser = {
    name: brand?.brand ?? (name === "Version" ? "Safari" : (name ?? null)),
    version: version ?? brand?.version ?? null,
    user_agent: ua,
  };
  const mobile = navigator.userAgentData?.mobile ?? /Mobi/.test(ua);
  const memory = navigator.deviceMemory ? navigator.deviceMemory * 2 ** 30 : null;
  return {
    device: {
      label: `${browser.name ?? "browser"} ${browser.version?.split(".")[0] ?? ""} on ${os.name ?? "unknown"}`.replace(/\s+/g, " "),
      kind: /iPad|Tablet/.test(ua) ? "tablet" : mobile ? "phone" : "desktop",
      manufacturer: null,
      model: hints?.model || null,
      cpu: null,
      gpu: env.gpu,
      architecture: hints?.architecture ? `${hints.architecture}${hints.bitness ? `-${hints.bitness}` : ""}` : null,
      cores: env.cores,
      memory_bytes: memory,
    },
    os: { name: navigator.userAgentData?.platform || os.name, version: hints?.platformVersion || os.version },
    browser,
    environment: {
      cross_origin_isolated: env.isolated,
      wasm_simd: env.simd,
      webgpu: env.webgpu,
      clock_resolution_ms: env.clockMs,
      // The browser rounds the memory to a power of two and caps it.
      memory_is_rounded: memory === null ? null : true,
    },
  };
}

/** Thermal state (no browser tells it), battery and charging. */
export async function power() {
  const battery = await withTimeout(navigator.getBattery?.().catch(() => null), 500);
  return {
    thermal: null,
    battery_level: battery?.level ?? null,
    charging: battery?.charging ?? null,
  };
}

/** Bytes that the page and its workers use, or null; isolated Chromium tells, and may take its time. */
export async function memoryBytes(timeoutMs) {
  if (!globalThis.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const measured = await withTimeout(performance.measureUserAgentSpecificMemory().catch(() => null), timeoutMs);
  return measured?.bytes || null;
}

function parseOs(ua) {
  const found =
    ua.match(/(Android) ([\d.]+)/) ??
    ua.match(/(iPhone OS|CPU OS) ([\d_]+)/) ??
    ua.match(/(Windows) NT ([\d.]+)/) ??
    ua.match(/(Mac OS X) ([\d_]+)/) ??
    ua.match(/(Linux)()/);
  if (!found) return { name: null, version: null };
  const name = /OS$/.test(found[1]) && found[1] !== "Mac OS X" ? "iOS" : found[1];
  return { name, version: found[2]?.replaceAll("_", ".") || null };
}

function withTimeout(promise, ms) {
  if (!promise) return Promise.resolve(null);
  return Promise.race([promise, new Promise((resolve) => setTimeout(() => resolve(null), ms))]);
}
