/** LiteRT.js (wasm, XNNPACK) in a worker. A classic script: the loader calls importScripts. */

import { Tensor, loadAndCompile, loadLiteRt, supportsFeature } from "@litertjs/core";
import { serve } from "./serve.js";

let threads = 1;

serve({
  async init(options) {
    threads = options.threads;
    const reasons = [];
    if (threads > 1 && !self.crossOriginIsolated) {
      threads = 1;
      reasons.push("the page is not cross-origin isolated, so there are no threads");
    }
    const relaxed = await supportsFeature("relaxedSimd");
    if (!relaxed) {
      if (threads > 1) reasons.push("LiteRT has threads only with relaxed SIMD, which is missing");
      threads = 1;
    }
    // The glue code looks for its wasm, and its threads' script, beside the worker otherwise.
    const script = `litert_wasm_${relaxed ? (threads > 1 ? "threaded_internal" : "internal") : "compat_internal"}.js`;
    self.Module = {
      locateFile: (file) => options.folder + file,
      mainScriptUrlOrBlob: options.folder + script,
      // LiteRT logs everything to stderr; only what is worse than a warning is an error here.
      printErr: (line) => (/^(INFO|WARNING|VERBOSE)/.test(line) ? console.debug(line) : console.error(line)),
    };
    await loadLiteRt(options.folder, { threads: threads > 1 });
    return {
      name: "LiteRT.js",
      version: options.version,
      effective: relaxed ? "wasm" : "wasm (no relaxed SIMD)",
      threads,
      reason: reasons.join("; ") || null,
    };
  },

  async load(bytes, entry) {
    const model = await loadAndCompile(bytes, { accelerator: "wasm", cpuOptions: { numThreads: threads } });
    if (entry && !model.signatures[entry]) {
      model.delete();
      throw new Error(`there is no signature ${entry}`);
    }
    const signature = entry ? model.signatures[entry] : model;
    return {
      async run(feeds) {
        const tensors = {};
        let results = {};
        try {
          for (const [name, t] of Object.entries(feeds)) tensors[name] = new Tensor(t.data, t.shape);
          results = await signature.run(tensors);
          const outputs = {};
          for (const [name, t] of Object.entries(results)) {
            outputs[name] = {
              dtype: t.type.dtype,
              shape: [...t.type.layout.dimensions],
              data: t.toTypedArray().slice(),
            };
          }
          return outputs;
        } finally {
          for (const t of [...Object.values(tensors), ...Object.values(results)]) t.delete();
        }
      },
      dispose: () => model.delete(),
    };
  },
});
