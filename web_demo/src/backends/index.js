/**
 * The backends that this page has, and models running on them.
 *
 * Each (backend, threads) lives in a worker of its own, begun when it is first asked
 * for: both runtimes fix their number of threads when they start.
 */

import { ASSETS } from "../assets.js";

/** Order is the order of preference for falling back. */
export const BACKENDS = [
  {
    id: "ort-wasm",
    label: "ONNX Runtime",
    format: "onnx",
    worker: () => ASSETS.ortWasmWorker,
    options: () => ({ files: resolveAll(ASSETS.ortWasm) }),
    missing: (env) => (env.simd ? null : NO_SIMD),
    threaded: true,
    eager: true,
  },
  {
    id: "litert-wasm",
    label: "LiteRT",
    format: "tflite",
    worker: () => ASSETS.litertWorker,
    options: () => ({ folder: resolve(ASSETS.litert), version: ASSETS.versions.litert }),
    missing: (env) => (env.simd ? null : NO_SIMD),
    threaded: true,
    eager: true,
  },
  {
    id: "ort-webgpu",
    label: "ONNX Runtime, WebGPU",
    format: "onnx",
    worker: () => ASSETS.ortWebgpuWorker,
    options: () => ({ files: resolveAll(ASSETS.ortWebgpu) }),
    missing: (env) => (!env.simd ? NO_SIMD : env.webgpu ? null : "this browser offers no WebGPU adapter"),
    threaded: false,
    eager: false,
  },
];

const NO_SIMD = "this browser has no WebAssembly SIMD, which both runtimes need";
/** A start, a load or a single run that takes longer than this hangs. */
const PATIENCE_MS = 60_000;

export function backend(id) {
  const found = BACKENDS.find((b) => b.id === id);
  if (!found) throw new Error(`no backend is called ${id}`);
  return found;
}

/** A runtime in its worker. Rejects with the runtime's own message. */
export class Runtime {
  #next = 1;
  #waiting = new Map();
  #turn = Promise.resolve();

  constructor(spec, threads) {
    this.spec = spec;
    this.requestedThreads = threads;
    this.loaded = new Map();
    this.dead = null;
    this.worker = new Worker(resolve(spec.worker()), { name: `${spec.id}-${threads}` });
    this.worker.onmessage = ({ data }) => this.#answer(data);
    this.worker.onerror = (event) => {
      event.preventDefault?.();
      this.#die(event.message || "the worker could not be loaded");
    };
    this.ready = this.#start(threads);
    this.ready.catch(() => {});
  }

  async #start(threads) {
    try {
      this.info = await this.patient("init", { options: { threads, ...this.spec.options() } });
    } catch (error) {
      this.#die(error.message);
      throw new Error(`${this.spec.label} did not start: ${error.message}`);
    }
    return this.info;
  }

  /** Send a request that must be answered soon; a runtime that hangs is ended, and says so. */
  patient(op, request) {
    return this.call(op, request, { patience: PATIENCE_MS });
  }

  /**
   * Send a request in its turn: a WebGPU session that runs twice at once hangs.
   *
   * @param options `onProgress` gets what the worker tells on the way; `signal` stops a loop
   */
  call(op, request = {}, options = {}) {
    const answer = this.#turn.then(() => this.#send(op, request, options));
    this.#turn = answer.catch(() => {});
    return answer;
  }

  async #send(op, request, { onProgress, signal, patience }) {
    if (this.dead) throw new Error(this.dead);
    const id = this.#next++;
    const cancel = () => this.worker.postMessage({ op: "cancel", target: id });
    const late = patience && setTimeout(() => this.#die(`no answer within ${patience / 1000} s`), patience);
    signal?.addEventListener("abort", cancel);
    try {
      return await new Promise((resolve, reject) => {
        this.#waiting.set(id, { resolve, reject, onProgress });
        if (signal?.aborted) cancel();
        this.worker.postMessage({ ...request, id, op });
      });
    } finally {
      clearTimeout(late);
      signal?.removeEventListener("abort", cancel);
    }
  }

  #answer({ id, value, error, progress }) {
    const waiting = this.#waiting.get(id);
    if (!waiting) return;
    if (progress !== undefined) {
      waiting.onProgress?.(progress);
      return;
    }
    this.#waiting.delete(id);
    if (error !== undefined) waiting.reject(new Error(error));
    else waiting.resolve(value);
  }

  #die(message) {
    this.dead = message;
    this.worker.terminate();
    for (const { reject } of this.#waiting.values()) reject(new Error(message));
    this.#waiting.clear();
  }

  close() {
    this.#die("the runtime was closed");
  }
}

/** Runtimes by (backend, threads), and models by (runtime, file). */
export class Backends {
  #runtimes = new Map();

  /** Set `pack` before a model is asked for; runtimes start without it. */
  constructor(env) {
    this.env = env;
    this.pack = null;
  }

  /** Why a backend cannot run here at all, or null. */
  missing(id) {
    return backend(id).missing(this.env);
  }

  /** Start, or find, a runtime. */
  async runtime(id, threads) {
    const spec = backend(id);
    const missing = spec.missing(this.env);
    if (missing) throw new Error(missing);
    const key = `${id} ${threads}`;
    if (!this.#runtimes.has(key) || this.#runtimes.get(key).dead) {
      this.#runtimes.set(key, new Runtime(spec, threads));
    }
    const runtime = this.#runtimes.get(key);
    await runtime.ready;
    return runtime;
  }

  /**
   * Load a model's file, checked, on a backend.
   *
   * @param files a model's `files` (or those of its streaming form)
   * @throws {PackageError} the file is damaged; {Error} the runtime refuses it.
   */
  async model(id, threads, files, name) {
    const spec = backend(id);
    const file = files[spec.format];
    if (!file) throw new Error(`the package has no ${spec.format} file of ${name}`);
    if (file.parts) throw new Error(`${file.path} is a folder; this backend reads one file`);
    // Fetched beside the runtime's start, for neither needs the other.
    const fetching = this.pack.file(file);
    fetching.catch(() => {});
    const runtime = await this.runtime(id, threads);
    const got = await fetching;
    const key = keyOf(file);
    if (!runtime.loaded.has(key)) {
      const loading = runtime.patient("load", { key, bytes: got.bytes, entry: file.entry ?? null }).then(
        ({ coldMs }) => ({ coldMs, fetchMs: got.fetchMs, from: got.from, sha256: got.sha256 }),
        (error) => {
          runtime.loaded.delete(key);
          throw new Error(`${runtime.info.name} refuses ${file.path}: ${error.message}`);
        },
      );
      runtime.loaded.set(key, loading);
    }
    return new LoadedModel(name, runtime, file, await runtime.loaded.get(key));
  }

  /**
   * Load a model where it can run: as asked, else on the next backend.
   *
   * A damaged file is not fallen back from: it is an error to be seen.
   *
   * @returns {Promise<{model: LoadedModel, requested: string, reason: string | null}>}
   */
  async modelOrFallback(id, threads, files, name) {
    const order = [id, ...BACKENDS.filter((b) => b.id !== id && b.eager).map((b) => b.id)];
    const reasons = [];
    for (const candidate of order) {
      try {
        const model = await this.model(candidate, threads, files, name);
        return { model, requested: id, reason: reasons.join("; ") || null };
      } catch (error) {
        if (error.kind === "integrity") throw error;
        reasons.push(`${backend(candidate).label}: ${error.message.replace(/\.$/, "")}`);
      }
    }
    throw new Error(reasons.join("; "));
  }

  /** Let go of runtimes that a measurement began, to give their memory back. */
  close(id, threads) {
    const key = `${id} ${threads}`;
    this.#runtimes.get(key)?.close();
    this.#runtimes.delete(key);
  }
}

/** A model file on a running backend. */
export class LoadedModel {
  constructor(name, runtime, file, load) {
    this.name = name;
    this.runtime = runtime;
    this.file = file;
    this.load = load;
    this.backend = runtime.spec;
    this.info = runtime.info;
  }

  get key() {
    return keyOf(this.file);
  }

  /** Whether the first dimension of every input may be of any size. */
  get dynamicBatch() {
    return this.file.inputs.every((s) => typeof s.shape[0] === "string");
  }

  /** Run once; `{outputs, ms}`. */
  run(feeds) {
    return this.runtime.patient("run", { key: this.key, feeds });
  }

  bench(request, options) {
    return this.runtime.call("bench", { key: this.key, ...request }, options);
  }

  evaluate(request, options) {
    return this.runtime.call("evaluate", { key: this.key, ...request }, options);
  }
}

/** One file may hold several functions: a model, and its step. */
function keyOf(file) {
  return file.entry ? `${file.sha256} ${file.entry}` : file.sha256;
}

function resolve(path) {
  return new URL(path, document.baseURI).href;
}

function resolveAll(paths) {
  return Object.fromEntries(Object.entries(paths).map(([k, v]) => [k, resolve(v)]));
}
