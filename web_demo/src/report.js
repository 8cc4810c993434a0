/**
 * What this device measured, as `flowexport.report/1`: raw data only, null where nothing
 * was measured. `flowexport report merge` recomputes every statistic and verdict from it.
 */

export const REPORT_SCHEMA = "flowexport.report/1";

/** Collects measurements by (model, backend, threads). */
export class Report {
  #runs = new Map();
  #preprocessing = new Map();
  errors = [];

  constructor(pack, version) {
    this.pack = pack;
    this.version = version;
  }

  /** How many settings something was measured with. */
  get size() {
    return this.#runs.size;
  }

  /** Note an error that belongs to no single setting. */
  fail(stage, message) {
    this.errors.push({ stage, message: String(message) || "no message" });
  }

  /** Keep the inputs that the page's preprocessing made of the golden raw samples. */
  addPreprocessing(finding) {
    this.#preprocessing.set(
      finding.model,
      finding.cases.map((c) => ({
        source: c.source,
        case: c.name,
        inputs: Object.values(c.inputs).map(tensor),
        error: c.ok || Object.keys(c.inputs).length ? null : c.reason,
      })),
    );
    if (finding.error) this.fail("preprocessing", `${finding.model}: ${finding.error}`);
  }

  /**
   * The run of one setting, made when first asked for.
   *
   * @param setting `{model, spec, requestedThreads}`; `entry` is "step" for the step-by-step form; `loaded` is the LoadedModel, or null where it did not load
   */
  run({ model, spec, requestedThreads, entry = "forward", loaded = null, power = null }) {
    const key = `${model.id} ${spec.id} ${requestedThreads} ${entry}`;
    if (!this.#runs.has(key)) this.#runs.set(key, emptyRun(model, spec, requestedThreads, entry, power));
    const run = this.#runs.get(key);
    if (loaded) {
      Object.assign(run, {
        model_sha256: loaded.load.sha256,
        model_size_bytes: loaded.file.size_bytes,
        runtime: { name: loaded.info.name, version: loaded.info.version },
        precision: loaded.file.precision ?? model.files[spec.format].precision,
        load: { cold_ms: loaded.load.coldMs, fetch_ms: loaded.load.fetchMs, from: loaded.load.from },
      });
      run.backend.effective = loaded.info.effective;
      run.backend.fallback_reason = loaded.info.reason;
      run.threads.effective = loaded.info.threads;
    }
    return run;
  }

  /** Keep a golden self-test of one setting. */
  addGolden(setting, finding) {
    const run = this.run({ ...setting, loaded: finding.loaded });
    run.errors = run.errors.filter((e) => e.stage !== "load" && e.stage !== "golden");
    if (finding.error) {
      run.errors.push({ stage: finding.loaded ? "golden" : "load", message: finding.error });
    }
    if (finding.cases.length) {
      run.golden = finding.cases.map((c) => {
        const outputs = Object.entries(c.outputs).map(([name, t]) => tensor({ ...t, name }));
        return { name: c.name, outputs, error: outputs.length ? null : c.reason };
      });
    }
    return run;
  }

  /** The whole document. */
  toJson(description, created = new Date()) {
    const runs = [...this.#runs.values()].map((run) => ({
      ...run,
      preprocessing: this.#preprocessing.get(run.model) ?? null,
    }));
    return {
      schema: REPORT_SCHEMA,
      created: created.toISOString().replace(/\.\d+Z$/, "Z"),
      client: { name: "flowexport web demo", version: this.version, kind: "web" },
      package_sha256: this.pack.sha256,
      ...description,
      runs,
      errors: [...this.errors],
    };
  }
}

/** Raw times of a benchmark, without what is not the schema's. */
export function latencyOf(result) {
  const { warmup, batch, pre_ms, inference_ms, post_ms, duration_ms } = result;
  return { warmup, batch, pre_ms, inference_ms, post_ms, duration_ms };
}

/** A tensor as base64 of its little-endian values. */
export function tensor({ name, dtype, shape, data }) {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  }
  return { name, dtype, shape: [...shape], data: btoa(text) };
}

function emptyRun(model, spec, requestedThreads, entry, power) {
  const unknown = { thermal: null, battery_level: null, charging: null };
  return {
    model: model.id,
    format: spec.format,
    entry,
    model_sha256: null,
    model_size_bytes: null,
    runtime: { name: null, version: null },
    backend: { requested: spec.id, effective: null, fallback_reason: null },
    threads: { requested: requestedThreads, effective: null },
    precision: null,
    load: { cold_ms: null, fetch_ms: null, from: null },
    preprocessing: null,
    golden: null,
    latency: null,
    sustained: null,
    evaluation: null,
    memory: { before_bytes: null, peak_bytes: null, source: null },
    power: { start: power ?? unknown, end: unknown },
    errors: [],
  };
}
