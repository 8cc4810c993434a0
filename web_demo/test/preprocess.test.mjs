import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { test } from "node:test";
import { pathToFileURL } from "node:url";

import { readTensor, readTensors } from "../src/package.js";
import { PreprocessError, applySteps, areaWeights, bilinearWeights, makeInputs } from "../src/preprocess.js";

const close = (a, b, eps = 1e-12) => a.forEach((v, i) => assert.ok(Math.abs(v - b[i]) <= eps, `${i}: ${v} is not ${b[i]}`));

test("area weights share a pixel by its overlap", () => {
  close(areaWeights(3, 2), [2 / 3, 1 / 3, 0, 0, 1 / 3, 2 / 3]);
  for (const [source, size] of [[280, 8], [5, 8], [1, 4]]) {
    const weights = areaWeights(source, size);
    for (let i = 0; i < size; i++) {
      const sum = weights.subarray(i * source, (i + 1) * source).reduce((a, b) => a + b, 0);
      assert.ok(Math.abs(sum - 1) < 1e-12, `row ${i} of ${source}->${size} sums to ${sum}`);
    }
  }
});

test("bilinear weights sit on half pixels and repeat the edges", () => {
  close(bilinearWeights(2, 4), [1, 0, 0.75, 0.25, 0.25, 0.75, 0, 1]);
  close(bilinearWeights(1, 3), [1, 1, 1]);
});

test("crop, square and resize keep a drawing where it belongs", () => {
  const data = new Uint8Array(6 * 5);
  data[2 * 5 + 1] = 200;
  data[3 * 5 + 1] = 200;
  const raw = { shape: [6, 5], data };
  const cropped = applySteps([{ op: "crop_to_ink", threshold: 64 }], raw);
  assert.deepEqual([cropped.shape, [...cropped.data]], [[2, 1], [200, 200]]);
  const square = applySteps([{ op: "crop_to_ink", threshold: 64 }, { op: "pad_to_square", fill: 7 }], raw);
  assert.deepEqual([square.shape, [...square.data]], [[2, 2], [200, 7, 200, 7]]);
  assert.deepEqual(applySteps([{ op: "crop_to_ink", threshold: 250 }], raw).shape, [6, 5]);
});

test("a series is padded, and its mask counts the rows", () => {
  const raw = { shape: [2, 3], data: [1, 2, 3, 4, 5, 6] };
  const x = applySteps([{ op: "pad_end", size: 3, fill: -1 }, { op: "reshape", shape: [1, 3, 3] }], raw);
  assert.deepEqual([x.shape, [...x.data]], [[1, 3, 3], [1, 2, 3, 4, 5, 6, -1, -1, -1]]);
  assert.deepEqual([...applySteps([{ op: "mask_of_length", size: 4 }], raw).data], [1, 1, 0, 0]);
  const normal = applySteps([{ op: "normalise", mean: [1, 2, 3], std: [1, 2, 4] }], raw);
  close(normal.data, [0, 0, 0, 3, 1.5, 0.75]);
});

test("what cannot be done is refused, not guessed", () => {
  const long = { shape: [4, 1], data: [1, 2, 3, 4] };
  for (const step of [
    { op: "pad_end", size: 3, fill: 0 },
    { op: "mask_of_length", size: 3 },
    { op: "reshape", shape: [3] },
    { op: "normalise", mean: [0, 0], std: [1, 1] },
    { op: "resize", method: "lanczos", size: [2, 2] },
    { op: "sharpen" },
  ]) {
    assert.throws(() => applySteps([step], long), PreprocessError, step.op);
  }
  assert.throws(() => applySteps([{ op: "crop_to_ink", threshold: 0 }], { shape: [3], data: [1, 2, 3] }), PreprocessError);
  assert.throws(() => makeInputs({ name: "s", inputs: {} }, long, [{ name: "x", dtype: "float32" }]), PreprocessError);
});

// FLOWEXPORT_PACKAGE: a folder made by `flowexport package`; pytest gives it.
const folder = process.env.FLOWEXPORT_PACKAGE;
test("every golden raw sample gives its golden inputs", { skip: folder ? false : "FLOWEXPORT_PACKAGE is not set" }, async () => {
  const manifest = JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8"));
  let cases = 0;
  for (const model of manifest.models) {
    const file = await readFile(new URL(model.golden.file.path, pathToFileURL(`${folder}/`)));
    const buffer = file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength);
    for (const source of model.preprocessing.sources) {
      for (const golden of source.golden.cases) {
        const made = makeInputs(source, readTensor(buffer, golden.raw), model.inputs);
        for (const [name, expected] of Object.entries(readTensors(buffer, golden.inputs))) {
          assert.deepEqual(made[name].shape, expected.shape, `${model.id} ${golden.name} ${name}`);
          close(made[name].data, expected.data, source.golden.max_abs);
          // A wrong input must not pass for the right one.
          const damaged = expected.data.slice();
          damaged[0] += 2 * source.golden.max_abs;
          assert.throws(() => close(made[name].data, damaged, source.golden.max_abs));
          cases += 1;
        }
      }
    }
  }
  assert.ok(cases > 0, "the package has golden raw samples");
});
