/**
 * The golden self-test: the page's own preprocessing first, then every model on every
 * backend against the float64 reference's outputs. Returns findings; it does not throw.
 */

import { PackageError, sampleOf, sizeOf } from "./package.js";
import { makeInputs } from "./preprocess.js";
import { messageOf } from "./backends/serve.js";
import { compare } from "./statistics.js";
import { Stream } from "./streaming.js";

/** Cases that a verdict needs where others lie outside a file's calibrated ranges. */
const LEAST_JUDGED = 3;

/**
 * Hold the page's preprocessing against the package's golden vectors.
 *
 * @returns `{model, kind: "preprocessing", ok, cases: [{source, name, ok, maxAbs, reason, inputs}], error}`
 */
export async function testPreprocessing(pack, model) {
  const finding = { model: model.id, kind: "preprocessing", ok: false, cases: [], error: null, errorKind: null };
  try {
    for (const golden of await pack.preprocessingGoldens(model)) {
      const entry = { source: golden.source.name, name: golden.case, ok: true, maxAbs: 0, reason: null, inputs: {} };
      try {
        entry.inputs = makeInputs(golden.source, golden.raw, model.inputs);
        for (const [name, expected] of Object.entries(golden.inputs)) {
          const found = compareAbsolute(entry.inputs[name], expected, golden.maxAbs);
          entry.maxAbs = worst(entry.maxAbs, found.maxAbs);
          if (!found.ok) Object.assign(entry, { ok: false, reason: found.reason });
        }
      } catch (error) {
        Object.assign(entry, { ok: false, maxAbs: null, reason: messageOf(error) });
      }
      finding.cases.push(entry);
    }
    finding.ok = finding.cases.length > 0 && finding.cases.every((c) => c.ok);
    if (!finding.cases.length) finding.error = "the package has no golden raw samples";
  } catch (error) {
    finding.error = messageOf(error);
    finding.errorKind = error instanceof PackageError ? error.kind : null;
  }
  return finding;
}

/**
 * Run every golden case of a model on one backend.
 *
 * `notRun` says that nothing was proven (no such runtime here); it is never `ok`.
 *
 * @returns `{model, kind: "golden", backend, ok, notRun, cases, maxRel, loaded, error}`
 */
export async function testModel(pack, backends, model, id, threads) {
  const finding = {
    model: model.id, kind: "golden", backend: id, ok: false, notRun: false,
    cases: [], maxRel: null, loaded: null, error: null, errorKind: null,
  };
  const missing = backends.missing(id);
  if (missing) return { ...finding, notRun: true, error: missing };
  try {
    finding.loaded = await backends.model(id, threads, model.files, model.id);
    const { file } = finding.loaded;
    await judge(finding, file, await pack.goldens(model), (golden, allowed) => runCase(finding.loaded, golden, allowed));
  } catch (error) {
    finding.error = messageOf(error);
    finding.errorKind = error instanceof PackageError ? error.kind : null;
  }
  return finding;
}

/**
 * Run every case and tell whether all that count are right.
 *
 * A drawn case of which a file's calibrated ranges clip more than its tolerance is run and marked
 * `outside`: finite values of the right shape are asked of it, and it proves nothing.
 */
export async function judge(finding, file, goldens, run) {
  const tolerance = file.tolerance.max_rel;
  for (const golden of goldens) {
    const outside = isOutside(file, golden.name);
    const entry = await run(golden, outside ? Infinity : tolerance);
    finding.cases.push(outside && entry.ok ? { ...entry, outside } : entry);
  }
  const judged = finding.cases.filter((c) => !c.outside);
  finding.ok = judged.length > 0 && judged.every((c) => c.ok);
  finding.maxRel = !judged.length || judged.some((c) => c.maxRel === null) ? null : Math.max(...judged.map((c) => c.maxRel));
  if (judged.length < Math.min(LEAST_JUDGED, finding.cases.length)) {
    finding.ok = false;
    finding.error = `${judged.length} of ${finding.cases.length} cases are inside the calibrated ranges; expected ${LEAST_JUDGED} or more`;
  }
}

function isOutside(file, name) {
  const real = name.split("/").some((part) => part === "evaluation" || part.startsWith("sample-"));
  return !real && (file.clipping?.[name]?.clipped ?? 0) > file.tolerance.max_rel;
}

/**
 * Run the step-by-step form over every golden case; row t of the output is step t's answer.
 *
 * @param spec the backend
 * @returns a finding as of `testModel`, kind "streaming"
 */
export async function testStream(pack, backends, model, { id, format }) {
  const finding = {
    model: model.id, kind: "streaming", backend: id, ok: false, notRun: false,
    cases: [], maxRel: null, loaded: null, error: null, errorKind: null,
  };
  const { streaming } = model;
  const missing = backends.missing(id) ?? (streaming.files[format] ? null : `the package has no ${format} file of the step`);
  if (missing) return { ...finding, notRun: true, error: missing };
  try {
    finding.loaded = await backends.model(id, 1, streaming.files, `${model.id} step`);
    const stream = new Stream(finding.loaded, streaming);
    finding.allowed = model.files[format].tolerance.max_rel;
    await judge(finding, model.files[format], await pack.goldens(model), (golden, allowed) => runSteps(stream, golden, allowed));
  } catch (error) {
    finding.error = messageOf(error);
    finding.errorKind = error instanceof PackageError ? error.kind : null;
  }
  return finding;
}

/** The steps of one case's samples against the rows of its golden output. */
export async function runSteps(stream, golden, tolerance) {
  const entry = { name: golden.name, ok: true, maxRel: 0, maxAbs: 0, reason: null, outputs: {} };
  try {
    const [input] = Object.values(golden.inputs);
    const [expected] = Object.values(golden.outputs);
    const [batch, steps, channels] = input.shape;
    const rows = new Float32Array(sizeOf(expected.shape));
    const width = expected.shape.at(-1);
    for (let b = 0; b < batch; b++) {
      stream.reset();
      for (let t = 0; t < steps; t++) {
        const from = (b * steps + t) * channels;
        const { values } = await stream.step(input.data.subarray(from, from + channels));
        rows.set(values, (b * steps + t) * width);
      }
    }
    entry.outputs = { [expected.name]: { dtype: "float32", shape: expected.shape, data: rows } };
    const found = compare(entry.outputs[expected.name], expected, tolerance);
    Object.assign(entry, { ok: found.ok, maxRel: found.maxRel, maxAbs: found.maxAbs, reason: found.reason });
  } catch (error) {
    Object.assign(entry, { ok: false, maxRel: null, maxAbs: null, reason: messageOf(error), outputs: {} });
  }
  return entry;
}

/** One case against its golden outputs; a fixed batch takes a batched case sample by sample. */
export async function runCase(loaded, golden, tolerance) {
  const entry = { name: golden.name, ok: true, maxRel: 0, maxAbs: 0, reason: null, outputs: {} };
  try {
    entry.outputs = await runBatch(loaded, golden);
    for (const expected of Object.values(golden.outputs)) {
      const found = compare(entry.outputs[expected.name], expected, tolerance);
      entry.maxRel = worst(entry.maxRel, found.maxRel);
      entry.maxAbs = worst(entry.maxAbs, found.maxAbs);
      if (!found.ok) Object.assign(entry, { ok: false, reason: found.reason });
    }
  } catch (error) {
    Object.assign(entry, { ok: false, maxRel: null, maxAbs: null, reason: messageOf(error) });
  }
  return entry;
}

async function runBatch(loaded, golden) {
  if (golden.batch === 1 || loaded.dynamicBatch) return (await loaded.run(golden.inputs)).outputs;
  const parts = [];
  for (let i = 0; i < golden.batch; i++) {
    const feeds = {};
    for (const [name, tensor] of Object.entries(golden.inputs)) feeds[name] = sampleOf(tensor, i);
    parts.push((await loaded.run(feeds)).outputs);
  }
  const outputs = {};
  for (const [name, first] of Object.entries(parts[0])) {
    const shape = [golden.batch, ...first.shape.slice(1)];
    const data = new first.data.constructor(sizeOf(shape));
    parts.forEach((p, i) => data.set(p[name].data, i * first.data.length));
    outputs[name] = { dtype: first.dtype, shape, data };
  }
  return outputs;
}

function compareAbsolute(actual, golden, maxAbs) {
  const found = compare(actual, golden, Infinity);
  if (!found.ok) return found;
  const ok = found.maxAbs <= maxAbs;
  return { ...found, ok, reason: ok ? null : `${golden.name} is off by ${found.maxAbs.toExponential(2)}; at most ${maxAbs} is allowed` };
}

function worst(a, b) {
  return a === null || b === null ? null : Math.max(a, b);
}
