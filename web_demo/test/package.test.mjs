import assert from "node:assert/strict";
import { afterEach, test } from "node:test";

import { Package, PackageError, answerRow, checkManifest, readTensor, sampleOf, sha256 } from "../src/package.js";
import { Report } from "../src/report.js";
import { runSteps } from "../src/selftest.js";
import { Stream } from "../src/streaming.js";
import { rolesOf } from "../src/views/listen.js";

const real = globalThis.fetch;
afterEach(() => (globalThis.fetch = real));

const kinds = async (promise) => promise.then(() => "none", (e) => (e instanceof PackageError ? e.kind : `${e}`));

test("another schema version is refused by name", () => {
  assert.throws(() => checkManifest({ schema: "flowexport.package/2", models: [] }), /package\/2.*package\/1/);
  assert.throws(() => checkManifest(null), PackageError);
  assert.throws(() => checkManifest({ schema: "flowexport.package/1", models: [] }), /no models/);
  assert.throws(() => checkManifest({ schema: "flowexport.package/1", models: [{ id: "a" }] }), /model a has no/);
});

test("a file is used only when size and sha256 are the manifest's", async () => {
  const good = new Uint8Array([1, 2, 3]);
  const digest = await sha256(good);
  assert.equal(digest, "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81");
  const pack = new Package("http://localhost/package/", { models: [] }, "0");
  const serve = (bytes, status = 200) => (globalThis.fetch = async () => new Response(bytes, { status }));
  const file = { path: "m.onnx", sha256: digest, size_bytes: 3 };
  serve(good.subarray(0, 2));
  assert.equal(await kinds(pack.file(file)), "integrity");
  serve(new Uint8Array([1, 2, 4]));
  assert.equal(await kinds(pack.file(file)), "integrity");
  serve(good, 404);
  assert.equal(await kinds(pack.file(file)), "missing");
  globalThis.fetch = async () => { throw new TypeError("offline"); };
  assert.equal(await kinds(pack.file(file)), "missing");
  serve(good);
  assert.equal((await pack.file(file)).sha256, digest);
});

test("tensors are read where the manifest says, and nowhere else", () => {
  const buffer = new ArrayBuffer(24);
  new DataView(buffer).setFloat64(8, 2.5, true);
  const entry = { name: "t", dtype: "float64", shape: [1], offset: 8, bytes: 8 };
  assert.deepEqual([...readTensor(buffer, entry).data], [2.5]);
  assert.throws(() => readTensor(buffer, { ...entry, offset: 24 }), PackageError);
  assert.throws(() => readTensor(buffer, { ...entry, shape: [2] }), PackageError);
  assert.throws(() => readTensor(buffer, { ...entry, dtype: "float16" }), PackageError);
  const t = { shape: [2, 2], data: new Float32Array([1, 2, 3, 4]) };
  assert.deepEqual([...sampleOf(t, 1).data], [3, 4]);
});

test("a streaming model gets its own states back", async () => {
  const streaming = {
    inputs: [{ name: "x", shape: ["batch", 2], dtype: "float32" }],
    outputs: [{ name: "logits" }],
    states: [{ name: "s", next: "s_next", shape: [1, 1], dtype: "float32", initial: 0.5 }],
  };
  const loaded = {
    async run({ x, s }) {
      const sum = s.data[0] + x.data[0] + x.data[1];
      return { ms: 1, outputs: { logits: { data: [sum] }, s_next: { dtype: "float32", shape: [1, 1], data: new Float32Array([sum]) } } };
    },
  };
  const stream = new Stream(loaded, streaming);
  assert.equal((await stream.step([1, 2])).values[0], 3.5);
  assert.equal((await stream.step([1, 0])).values[0], 4.5);
  const kept = stream.states;
  await stream.step([9, 9]);
  stream.restore(kept);
  assert.equal((await stream.step([0, 0])).values[0], 4.5);
  stream.reset();
  assert.equal((await stream.step([0, 0])).values[0], 0.5);
  await assert.rejects(stream.step([1, 2, 3]), /3 values/);
  assert.throws(() => new Stream(loaded, { ...streaming, inputs: [1, 2] }), /2 inputs/);
});

test("steps are held against the rows of the golden output", async () => {
  const streaming = { inputs: [{ name: "x", shape: [1, 1], dtype: "float32" }], outputs: [{ name: "y" }], states: [{ name: "s", next: "n", shape: [1], dtype: "float32", initial: 0 }] };
  const loaded = { run: async ({ x, s }) => ({ ms: 1, outputs: { y: { data: [s.data[0] + x.data[0]] }, n: { shape: [1], data: new Float32Array([s.data[0] + x.data[0]]) } } }) };
  const golden = (rows) => ({
    name: "sums", batch: 2,
    inputs: { x: { shape: [2, 3, 1], data: new Float32Array([1, 2, 3, 10, 20, 30]) } },
    outputs: { y: { name: "y", shape: [2, 3, 1], data: rows } },
  });
  const stream = new Stream(loaded, streaming);
  assert.ok((await runSteps(stream, golden([1, 3, 6, 10, 30, 60]), 1e-6)).ok);
  const wrong = await runSteps(stream, golden([1, 3, 6, 10, 30, 61]), 1e-6);
  assert.equal(wrong.ok, false);
  assert.match(wrong.reason, /off by/);
  assert.throws(() => new Stream(loaded, { ...streaming, states: [{ ...streaming.states[0], dtype: "int64" }] }), /int64/);
});

test("a model with a row a step answers by the sample's last real row", () => {
  const rows = { shape: [1, 3, 2], data: new Float32Array([1, 2, 3, 4, 5, 6]) };
  assert.deepEqual([...answerRow(rows, 2)], [3, 4]);
  assert.deepEqual([...answerRow({ shape: [1, 2], data: new Float32Array([7, 8]) }, 2)], [7, 8]);
  assert.equal(answerRow(rows, null), rows.data);
});

test("the series and its mask are told by the steps", () => {
  const source = { inputs: { a: [{ op: "pad_end", size: 3, fill: 9 }], b: [{ op: "mask_of_length", size: 3 }] } };
  assert.deepEqual(rolesOf(source), { series: { name: "a", fill: 9 }, mask: { name: "b" } });
  assert.throws(() => rolesOf({ inputs: { a: [{ op: "scale", factor: 1 }] } }));
  assert.throws(() => rolesOf(undefined));
});

test("a report says null, not zero, for what was not measured", () => {
  const report = new Report({ sha256: "0".repeat(64) }, "1");
  const model = { id: "m" };
  const spec = { id: "ort-wasm", format: "onnx" };
  report.addGolden({ model, spec, requestedThreads: 2 }, { loaded: null, error: "no wasm", cases: [] });
  const { runs, package_sha256: sha } = report.toJson({ device: {} }, new Date(0));
  assert.equal(sha, "0".repeat(64));
  assert.deepEqual(runs[0].errors, [{ stage: "load", message: "no wasm" }]);
  for (const key of ["latency", "sustained", "evaluation", "golden", "model_sha256", "precision"]) assert.equal(runs[0][key], null, key);
  assert.equal(runs[0].threads.effective, null);
});
