/** Measurements that a person starts: latency, a sustained run, accuracy. They fill the report. */

import { backend } from "./backends/index.js";
import { memoryBytes, power } from "./environment.js";
import { latencyOf } from "./report.js";
import { scorePredictions, summarise } from "./statistics.js";

const MEMORY_MS = 4000;

/**
 * Measure one setting.
 *
 * @param app `{pack, backends, report}`
 * @param setting `{model, backendId, threads}`
 * @param what `{kind: "latency", runs, warmup}` or `{kind: "sustained", seconds, warmup}`
 * @returns `{result, loaded, summary}`; throws what the runtime throws, noted in the report
 */
export async function measure(app, setting, what, options) {
  const { model, threads } = setting;
  const spec = backend(setting.backendId);
  const start = await power();
  const noted = { model, spec, requestedThreads: threads, power: start };
  try {
    const before = await memoryBytes(MEMORY_MS);
    const loaded = await app.backends.model(spec.id, threads, model.files, model.id);
    const run = app.report.run({ ...noted, loaded });
    const goldens = await app.pack.preprocessingGoldens(model);
    // The largest raw sample: a whole drawing, an utterance of full length.
    const golden = goldens.reduce((a, b) => (b.raw.data.length > (a?.raw.data.length ?? 0) ? b : a), null);
    if (!golden) throw new Error(`${model.id} has no raw sample to begin from`);
    const request = {
      source: golden.source,
      raw: golden.raw,
      specs: model.inputs,
      output: model.evaluation?.output ?? model.outputs[0].name,
      warmup: what.warmup,
      runs: what.runs,
      seconds: what.seconds,
    };
    const result = await loaded.bench(request, options);
    run[what.kind] = latencyOf(result);
    const after = await memoryBytes(MEMORY_MS);
    if (before !== null || after !== null) {
      run.memory = { before_bytes: before, peak_bytes: after, source: "measureUserAgentSpecificMemory before and after the run" };
    }
    run.power = { start, end: await power() };
    return { result, loaded, summary: summarise(result.inference_ms) };
  } catch (error) {
    app.report.run(noted).errors.push({ stage: what.kind, message: error.message });
    throw error;
  }
}

/**
 * Predict every sample of the evaluation set.
 *
 * @returns `{predictions, evaluation, correct, agreeing, samples, complete}`
 */
export async function accuracy(app, setting, options) {
  const { model, threads } = setting;
  const spec = backend(setting.backendId);
  const noted = { model, spec, requestedThreads: threads };
  try {
    const evaluation = await app.pack.evaluation(model);
    if (!evaluation) throw new Error(`${model.id} has no evaluation set`);
    const loaded = await app.backends.model(spec.id, threads, model.files, model.id);
    const run = app.report.run({ ...noted, loaded });
    const { samples, output, inputs, lengths } = evaluation;
    const result = await loaded.evaluate({ inputs, samples, output, lengths }, options);
    const score = scorePredictions(result.predictions, evaluation);
    run.errors = run.errors.filter((e) => e.stage !== "evaluation");
    for (const message of result.errors.slice(0, 5)) run.errors.push({ stage: "evaluation", message });
    // A set that was broken off is no accuracy.
    if (score.complete) run.evaluation = { name: evaluation.name, predictions: result.predictions };
    return { ...score, evaluation, loaded, predictions: result.predictions, errors: result.errors };
  } catch (error) {
    app.report.run(noted).errors.push({ stage: "evaluation", message: error.message });
    throw error;
  }
}
