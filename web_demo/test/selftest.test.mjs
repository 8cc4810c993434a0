import assert from "node:assert/strict";
import { test } from "node:test";

import { judge } from "../src/selftest.js";
import { compare } from "../src/statistics.js";

const NAMES = ["random-0", "zeros", "large", "sample-0", "sample-1"];
const file = { tolerance: { max_rel: 0.3 }, clipping: { large: { layer: "fc", clipped: 0.67, stretch: 9 }, zeros: { clipped: 0.2 }, "sample-0": { clipped: 0.5 } } };

async function found(off, declared = file, names = NAMES) {
  const finding = { cases: [], ok: false, maxRel: null, error: null };
  await judge(finding, declared, names.map((name) => ({ name })), (golden, allowed) => {
    const value = off[golden.name] ?? 1.01;
    return { name: golden.name, ...compare({ shape: [1], data: [value] }, { name: "logits", shape: [1], data: [1] }, allowed) };
  });
  return finding;
}

test("a drawn case that the calibrated ranges clip is run, marked, and counts for nothing", async () => {
  const { ok, maxRel, cases } = await found({ large: 3 });
  assert.ok(ok);
  assert.ok(maxRel < 0.011);
  assert.deepEqual(cases.filter((c) => c.outside).map((c) => c.name), ["large"]);
});

test("one inside, and a real sample however much is clipped, is judged", async () => {
  assert.equal((await found({ zeros: 3 })).ok, false);
  assert.equal((await found({ "sample-0": 3 })).ok, false);
  assert.equal((await found({ large: 3 }, { ...file, clipping: undefined })).ok, false);
});

test("what is not finite is no success anywhere", async () => {
  assert.equal((await found({ large: NaN })).ok, false);
});

test("too few cases inside prove nothing", async () => {
  const finding = await found({}, file, ["large", "sample-0", "sample-1"]);
  assert.equal(finding.ok, false);
  assert.match(finding.error, /2 of 3 cases are inside/);
  assert.equal((await found({}, file, [])).ok, false);
});
