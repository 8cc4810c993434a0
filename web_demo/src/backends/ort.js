/** ONNX Runtime Web in a worker; `make(ort, provider)` serves wasm and WebGPU builds alike. */

// y = x of one float. Only a session makes the runtime fetch and compile its wasm, which
// is no part of a model's load time.
const IDENTITY = "CAgSADo3ChAKAXgSAXkiCElkZW50aXR5EgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==";

/**
 * @param ort the module `onnxruntime-web/wasm` or `onnxruntime-web/webgpu`
 * @param {"wasm" | "webgpu"} provider
 */
export function make(ort, provider) {
  return {
    async init({ threads, files }) {
      ort.env.wasm.numThreads = threads;
      ort.env.wasm.wasmPaths = files;
      ort.env.wasm.proxy = false;
      ort.env.logLevel = "error";
      let reason = null;
      if (threads > 1 && !self.crossOriginIsolated) {
        ort.env.wasm.numThreads = 1;
        reason = "the page is not cross-origin isolated, so there are no threads";
      }
      if (provider === "webgpu" && !(await navigator.gpu?.requestAdapter())) {
        throw new Error("this browser offers no WebGPU adapter");
      }
      const first = await ort.InferenceSession.create(
        Uint8Array.from(atob(IDENTITY), (c) => c.charCodeAt(0)),
        { executionProviders: ["wasm"] },
      );
      await first.release();
      return {
        name: "ONNX Runtime Web",
        version: ort.env.versions?.web ?? null,
        // ORT does not tell where it placed each node; shapes it always keeps on the processor.
        effective: provider === "webgpu" ? "webgpu, with wasm for what it does not take" : provider,
        threads: ort.env.wasm.numThreads,
        reason,
      };
    },

    async load(bytes, entry) {
      if (entry) throw new Error(`an ONNX file has no function ${entry} to enter`);
      const session = await ort.InferenceSession.create(bytes, {
        executionProviders: [provider],
        graphOptimizationLevel: "all",
        logSeverityLevel: 3,
      });
      return {
        async run(feeds) {
          const tensors = {};
          for (const [name, t] of Object.entries(feeds)) {
            tensors[name] = new ort.Tensor(t.dtype, t.data, t.shape);
          }
          const results = await session.run(tensors);
          const outputs = {};
          for (const name of session.outputNames) {
            const t = results[name];
            const data = t.location === "cpu" ? t.data : await t.getData();
            outputs[name] = { dtype: t.type, shape: [...t.dims], data: data.slice() };
            t.dispose();
          }
          return outputs;
        },
        dispose: () => session.release(),
      };
    },
  };
}
