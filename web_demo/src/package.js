/**
 * Reads a package (`flowexport.package/1`): manifest, checked files, tensors.
 *
 * Nothing of a file is used before its size and its sha256 are those of the manifest.
 */

export const SCHEMA = "flowexport.package/1";

/** A package, or a file of it, that cannot be used; `kind` says why. */
export class PackageError extends Error {
  /** @param {"schema" | "missing" | "integrity" | "format"} kind */
  constructor(kind, message) {
    super(message);
    this.name = "PackageError";
    this.kind = kind;
  }
}

export const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  int32: Int32Array,
  uint8: Uint8Array,
};

/** Lower-case hexadecimal sha256 of bytes. Needs a secure context (https or localhost). */
export async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (!subtle) {
    throw new PackageError(
      "integrity",
      "this address gives no WebCrypto, so no file can be checked; open the page by https or localhost.",
    );
  }
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}

/**
 * Refuse a manifest that this client does not understand.
 *
 * @returns the manifest
 * @throws {PackageError} another schema version, or what the client needs is absent.
 */
export function checkManifest(manifest) {
  const schema = manifest && typeof manifest === "object" ? manifest.schema : undefined;
  if (schema !== SCHEMA) {
    throw new PackageError(
      "schema",
      `the package has schema ${JSON.stringify(schema ?? null)}; this page reads ${SCHEMA}.`,
    );
  }
  if (!Array.isArray(manifest.models) || manifest.models.length === 0) {
    throw new PackageError("format", "the package has no models.");
  }
  for (const model of manifest.models) {
    for (const key of ["id", "task", "inputs", "outputs", "labels", "preprocessing", "files", "golden"]) {
      if (model?.[key] == null) {
        throw new PackageError("format", `model ${model?.id ?? "?"} has no ${key}.`);
      }
    }
  }
  return manifest;
}

/** One package, opened. Files are fetched once and kept. */
export class Package {
  #files = new Map();

  constructor(base, manifest, manifestSha256) {
    this.base = base;
    this.manifest = manifest;
    this.sha256 = manifestSha256;
  }

  /**
   * Fetch and check `manifest.json` of the folder at `base`.
   *
   * @param {URL | string} base ends with a slash
   */
  static async open(base) {
    const { bytes } = await download(new URL("manifest.json", base), "manifest.json");
    let manifest;
    try {
      manifest = JSON.parse(new TextDecoder().decode(bytes));
    } catch (error) {
      throw new PackageError("format", `manifest.json is no JSON: ${error.message}.`);
    }
    return new Package(base, checkManifest(manifest), await sha256(bytes));
  }

  get models() {
    return this.manifest.models;
  }

  model(id) {
    const found = this.models.find((m) => m.id === id);
    if (!found) throw new PackageError("missing", `the package has no model ${id}.`);
    return found;
  }

  /** Models of a task, those with a step-by-step form first. */
  ofTask(task) {
    return this.models.filter((m) => m.task === task).sort((a, b) => Number(Boolean(b.streaming)) - Number(Boolean(a.streaming)));
  }

  /**
   * Fetch a file and check its size and sha256.
   *
   * @param {{path: string, sha256: string, size_bytes: number}} file
   * @returns {Promise<{bytes: ArrayBuffer, sha256: string, fetchMs: number, from: string | null}>}
   * @throws {PackageError} `missing` or `integrity`
   */
  file(file) {
    const key = `${file.path} ${file.sha256}`;
    if (!this.#files.has(key)) {
      const loading = this.#load(file);
      this.#files.set(key, loading);
      loading.catch(() => this.#files.delete(key));
    }
    return this.#files.get(key);
  }

  async #load(file) {
    const got = await download(new URL(file.path, this.base), file.path);
    if (got.bytes.byteLength !== file.size_bytes) {
      throw new PackageError(
        "integrity",
        `${file.path} has ${got.bytes.byteLength} bytes; the manifest says ${file.size_bytes}. It was not used.`,
      );
    }
    const digest = await sha256(got.bytes);
    if (digest !== file.sha256) {
      throw new PackageError(
        "integrity",
        `${file.path} has sha256 ${digest.slice(0, 12)}…; the manifest says ${file.sha256.slice(0, 12)}…. It was not used.`,
      );
    }
    return { ...got, sha256: digest };
  }

  /** Golden cases: `[{name, batch, inputs, outputs}]`, tensors by name. */
  async goldens(model) {
    const { bytes } = await this.file(model.golden.file);
    return model.golden.cases.map((c) => ({
      name: c.name,
      batch: c.batch,
      inputs: readTensors(bytes, c.inputs),
      outputs: readTensors(bytes, c.outputs),
    }));
  }

  /** Golden preprocessing: `[{source, case, raw, inputs, maxAbs}]`. */
  async preprocessingGoldens(model) {
    const { bytes } = await this.file(model.golden.file);
    return model.preprocessing.sources.flatMap((source) =>
      source.golden.cases.map((c) => ({
        source,
        case: c.name,
        raw: readTensor(bytes, c.raw),
        inputs: readTensors(bytes, c.inputs),
        maxAbs: source.golden.max_abs,
      })),
    );
  }

  /** The evaluation set, or null: inputs by name (samples first), targets, reference_top1. */
  async evaluation(model) {
    if (!model.evaluation) return null;
    const { bytes } = await this.file(model.evaluation.file);
    return {
      ...model.evaluation,
      inputs: readTensors(bytes, model.evaluation.inputs),
      targets: readTensor(bytes, model.evaluation.targets).data,
      reference_top1: readTensor(bytes, model.evaluation.reference_top1).data,
      lengths: model.evaluation.lengths ? readTensor(bytes, model.evaluation.lengths).data : null,
    };
  }
}

/**
 * Read one tensor of a binary file.
 *
 * @param {ArrayBuffer} buffer little-endian, C order
 * @param entry a `tensor` of the schema
 * @returns {{name: string, dtype: string, shape: number[], data: ArrayLike<number>}}
 */
export function readTensor(buffer, entry) {
  const Type = ARRAYS[entry.dtype];
  if (!Type) throw new PackageError("format", `tensor ${entry.name} has dtype ${entry.dtype}.`);
  const count = sizeOf(entry.shape);
  if (entry.bytes !== count * Type.BYTES_PER_ELEMENT || entry.offset + entry.bytes > buffer.byteLength) {
    throw new PackageError(
      "format",
      `tensor ${entry.name} has ${entry.bytes} bytes at ${entry.offset}; shape ${entry.shape} of ${entry.dtype} in a file of ${buffer.byteLength} bytes was expected.`,
    );
  }
  return {
    name: entry.name,
    dtype: entry.dtype,
    shape: [...entry.shape],
    data: new Type(buffer.slice(entry.offset, entry.offset + entry.bytes)),
  };
}

/** Tensors by name. */
export function readTensors(buffer, entries) {
  return Object.fromEntries(entries.map((e) => [e.name, readTensor(buffer, e)]));
}

/** Sample `index` of a tensor whose first dimension counts samples; batch of one. */
export function sampleOf(tensor, index) {
  const size = sizeOf(tensor.shape.slice(1));
  return {
    ...tensor,
    shape: [1, ...tensor.shape.slice(1)],
    data: tensor.data.slice(index * size, (index + 1) * size),
  };
}

/**
 * The scores that are the answer: the only row, or row `length - 1` of a model that gives a row a step.
 *
 * @param output `{shape, data}`, batch of one
 * @param {number | null} length real steps of the sample
 */
export function answerRow(output, length) {
  if (length === null || output.shape.length < 3) return output.data;
  const width = output.shape.at(-1);
  return output.data.slice((length - 1) * width, length * width);
}

/** Product of a shape. */
export function sizeOf(shape) {
  return shape.reduce((product, n) => product * n, 1);
}

async function download(url, name) {
  const start = performance.now();
  let response;
  try {
    response = await fetch(url, { credentials: "same-origin" });
  } catch (error) {
    throw new PackageError("missing", `${name} could not be fetched: ${error.message}.`);
  }
  if (!response.ok) {
    throw new PackageError("missing", `${name} could not be fetched: HTTP ${response.status}.`);
  }
  let bytes;
  try {
    bytes = await response.arrayBuffer();
  } catch (error) {
    throw new PackageError("missing", `${name} broke off: ${error.message}.`);
  }
  return { bytes, fetchMs: performance.now() - start, from: sourceOf(url) };
}

/** Whether the browser's own timing says that a download came from the network. */
function sourceOf(url) {
  const entry = performance.getEntriesByName?.(String(url)).at(-1);
  if (!entry || entry.transferSize === undefined) return null;
  return entry.transferSize > 0 ? "network" : "cache";
}
