/**
 * The inside of a runtime's worker: answers the page's requests with one runtime.
 *
 * A runtime is `{init(options) -> info, load(bytes, entry) -> session}`, `entry` being a
 * function's name in a file that holds several, or null; a session is
 * `{run(feeds) -> outputs, dispose()}` with tensors `{shape, data, dtype}` by name.
 * Loops that are measured run here, so that no message passing is measured with them.
 */

import { answerRow } from "../package.js";
import { makeInputs } from "../preprocess.js";
import { argmax, softmax } from "../statistics.js";

const YIELD_MS = 80;

export function serve(runtime) {
  const sessions = new Map();
  const cancelled = new Set();

  const session = (key) => {
    const found = sessions.get(key);
    if (!found) throw new Error(`model ${key} is not loaded`);
    return found;
  };

  const operations = {
    init: (request) => runtime.init(request.options),

    async load({ key, bytes, entry }) {
      sessions.get(key)?.dispose();
      sessions.delete(key);
      const start = performance.now();
      sessions.set(key, await runtime.load(new Uint8Array(bytes), entry));
      return { coldMs: performance.now() - start };
    },

    async unload({ key }) {
      sessions.get(key)?.dispose();
      sessions.delete(key);
    },

    async run({ key, feeds }) {
      const start = performance.now();
      const outputs = await session(key).run(feeds);
      return { outputs, ms: performance.now() - start };
    },

    /** Run one raw sample again and again; times of the three parts, milliseconds. */
    async bench({ id, key, source, raw, specs, output, warmup, runs, seconds }, progress) {
      const model = session(key);
      const pre = [], inference = [], post = [];
      const once = async () => {
        const a = performance.now();
        const feeds = makeInputs(source, raw, specs);
        const b = performance.now();
        const outputs = await model.run(feeds);
        const c = performance.now();
        argmax(softmax(outputs[output].data));
        return [b - a, c - b, performance.now() - c];
      };
      for (let i = 0; i < warmup; i++) await once();
      const start = performance.now();
      let spoke = start;
      const goesOn = () =>
        seconds ? performance.now() - start < seconds * 1000 : inference.length < runs;
      while (goesOn() && !cancelled.has(id)) {
        const [a, b, c] = await once();
        pre.push(a);
        inference.push(b);
        post.push(c);
        if (performance.now() - spoke > YIELD_MS) {
          progress({ runs: inference.length, seconds: (performance.now() - start) / 1000, last: b });
          await pause();
          spoke = performance.now();
        }
      }
      return {
        warmup,
        batch: 1,
        pre_ms: pre,
        inference_ms: inference,
        post_ms: post,
        duration_ms: performance.now() - start,
        cancelled: cancelled.delete(id),
      };
    },

    /** Arg max of every sample; null where the model failed on one, with its message. */
    async evaluate({ id, key, inputs, samples, output, lengths }, progress) {
      const model = session(key);
      const predictions = [];
      const errors = [];
      let spoke = performance.now();
      for (let i = 0; i < samples && !cancelled.has(id); i++) {
        try {
          const outputs = await model.run(slice(inputs, i));
          const best = argmax(answerRow(outputs[output], lengths?.[i] ?? null));
          predictions.push(best < 0 ? null : best);
          if (best < 0) errors.push(`sample ${i}: ${output} is not finite`);
        } catch (error) {
          predictions.push(null);
          errors.push(`sample ${i}: ${error?.message ?? error}`);
        }
        if (performance.now() - spoke > YIELD_MS) {
          progress({ done: i + 1, samples });
          await pause();
          spoke = performance.now();
        }
      }
      return { predictions, errors, cancelled: cancelled.delete(id) };
    },
  };

  self.onmessage = async ({ data: request }) => {
    if (request.op === "cancel") {
      cancelled.add(request.target);
      return;
    }
    const progress = (value) => self.postMessage({ id: request.id, progress: value });
    try {
      const value = await operations[request.op](request, progress);
      self.postMessage({ id: request.id, value });
    } catch (error) {
      self.postMessage({ id: request.id, error: messageOf(error) });
    }
  };
}

/** One line of whatever a runtime throws: wasm runtimes throw numbers and objects, too. */
export function messageOf(error) {
  const text = error instanceof Error ? error.message : typeof error === "number" ? `wasm exception ${error}` : String(error);
  return text.replace(/\s+/g, " ").trim() || "no message";
}

function slice(inputs, index) {
  const feeds = {};
  for (const [name, tensor] of Object.entries(inputs)) {
    const size = tensor.data.length / tensor.shape[0];
    feeds[name] = {
      dtype: tensor.dtype,
      shape: [1, ...tensor.shape.slice(1)],
      data: tensor.data.subarray(index * size, (index + 1) * size),
    };
  }
  return feeds;
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve, 0));
}
