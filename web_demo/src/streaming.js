/** Runs a recurrent form of a model step by step; `streaming` of the package's schema. */

import { ARRAYS, sizeOf } from "./package.js";

export class Stream {
  /**
   * @param loaded a LoadedModel of the streaming form
   * @param streaming the package's description of it
   * @throws {Error} it needs more than one frame a step
   */
  constructor(loaded, streaming) {
    if (streaming.inputs.length !== 1) {
      throw new Error(`the streaming model takes ${streaming.inputs.length} inputs a step; this page gives one frame`);
    }
    this.loaded = loaded;
    this.streaming = streaming;
    this.reset();
  }

  /** Forget all frames. */
  reset() {
    this.states = {};
    for (const s of this.streaming.states) {
      const Type = ARRAYS[s.dtype];
      if (!Type) throw new Error(`state ${s.name} has dtype ${s.dtype}, which this page does not keep`);
      this.states[s.name] = { dtype: s.dtype, shape: s.shape, data: new Type(sizeOf(s.shape)).fill(s.initial) };
    }
  }

  /** Go back to the states after an earlier frame; a step replaces them, it never changes them. */
  restore(states) {
    this.states = states;
  }

  /** Take one frame; returns the output's values. */
  async step(frame) {
    const [spec] = this.streaming.inputs;
    const shape = spec.shape.map((d) => (typeof d === "string" ? 1 : d));
    if (sizeOf(shape) !== frame.length) {
      throw new Error(`a frame has ${frame.length} values; the streaming model takes ${sizeOf(shape)}`);
    }
    const feeds = { ...this.states, [spec.name]: { dtype: spec.dtype, shape, data: Float32Array.from(frame) } };
    const { outputs, ms } = await this.loaded.run(feeds);
    this.states = Object.fromEntries(this.streaming.states.map((s) => [s.name, outputs[s.next]]));
    return { values: outputs[this.streaming.outputs[0].name].data, ms };
  }
}
