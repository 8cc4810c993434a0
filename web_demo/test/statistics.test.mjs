import assert from "node:assert/strict";
import { test } from "node:test";

import { argmax, compare, histogram, percentile, scorePredictions, softmax, summarise } from "../src/statistics.js";

test("percentiles interpolate as numpy's do", () => {
  assert.equal(percentile([4, 1, 3, 2], 50), 2.5);
  assert.equal(percentile([1, 2, 3, 4], 90), 3.7);
  assert.equal(percentile([5], 99), 5);
  assert.equal(percentile([], 50), null);
});

test("what is no time is no sample", () => {
  assert.deepEqual(summarise([null, NaN, -1, Infinity]), { runs: 0, min: null, p50: null, p90: null, p99: null, mean: null });
  assert.equal(summarise([2, null, 4]).mean, 3);
});

test("softmax is stable and does not hide a NaN", () => {
  const shares = softmax([1000, 1000, -1000]);
  assert.deepEqual(shares, [0.5, 0.5, 0]);
  assert.ok(softmax([0, NaN]).every(Number.isNaN));
  assert.equal(argmax([0, NaN]), -1);
  assert.equal(argmax([]), -1);
  assert.equal(argmax([1, 3, 3]), 1);
});

const golden = { name: "logits", shape: [1, 2], data: [2, -4] };
test("agreement is judged by the largest golden value", () => {
  const found = compare({ shape: [1, 2], data: [2.00004, -4] }, golden, 1.1e-5);
  assert.ok(found.ok);
  assert.ok(Math.abs(found.maxRel - 1e-5) < 1e-9);
  assert.equal(compare({ shape: [1, 2], data: [2.00004, -4] }, golden, 0.9e-5).ok, false);
  assert.equal(compare({ shape: [1, 2], data: [1e-6, 0] }, { ...golden, data: [0, 0] }, 1e-5).maxRel, 1e-6);
});

test("a missing, misshapen or infinite output is no success", () => {
  assert.equal(compare(undefined, golden, 1).ok, false);
  assert.equal(compare({ shape: [2, 1], data: [2, -4] }, golden, 1).ok, false);
  assert.equal(compare({ shape: [1, 2], data: [2, NaN] }, golden, 1).ok, false);
  assert.equal(compare({ shape: [1, 2], data: [2] }, golden, 1).ok, false);
});

test("a failed sample is neither right nor as the reference", () => {
  const evaluation = { samples: 3, targets: [1, 0, 2], reference_top1: [1, 1, 2] };
  assert.deepEqual(scorePredictions([1, 1, null], evaluation), { correct: 1, agreeing: 2, samples: 3, complete: true });
  assert.equal(scorePredictions([1], evaluation).complete, false);
});

test("a histogram counts every sample once", () => {
  const { counts, low, high } = histogram([1, 2, 3, 3, null], 4);
  assert.deepEqual([counts.reduce((a, b) => a + b), low, high], [4, 1, 3]);
  assert.deepEqual(histogram([2, 2], 3).counts, [2, 0, 0]);
  assert.deepEqual(histogram([], 3).counts, []);
});
