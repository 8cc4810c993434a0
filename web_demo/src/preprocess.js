/**
 * From a raw sample to a model's inputs: the steps of `flowexport.package/1`.
 *
 * The same arithmetic as flowexport/package/preprocessing.py: every step in float64,
 * only the last result is rounded to the input's dtype. A value is `{shape, data}`.
 */

/** A sample that the steps cannot take, or a step that this client does not know. */
export class PreprocessError extends Error {
  constructor(message) {
    super(message);
    this.name = "PreprocessError";
  }
}

/**
 * Make every model input of one raw sample.
 *
 * @param source a preprocessing source of the package
 * @param {{shape: number[], data: ArrayLike<number>}} raw
 * @param {{name: string, dtype: string}[]} specs the model's inputs
 * @returns tensors by input name, batch of one first
 */
export function makeInputs(source, raw, specs) {
  const made = {};
  for (const spec of specs) {
    const steps = source.inputs[spec.name];
    if (!steps) throw new PreprocessError(`source ${source.name} does not make input ${spec.name}.`);
    const value = applySteps(steps, raw);
    const Type = { float32: Float32Array, float64: Float64Array, int32: Int32Array, uint8: Uint8Array }[spec.dtype];
    if (!Type) throw new PreprocessError(`input ${spec.name} has dtype ${spec.dtype}.`);
    made[spec.name] = { name: spec.name, dtype: spec.dtype, shape: value.shape, data: Type.from(value.data) };
  }
  return made;
}

/** Apply steps in order; float64 throughout. */
export function applySteps(steps, raw) {
  let value = { shape: [...raw.shape], data: Float64Array.from(raw.data) };
  for (const step of steps) {
    const operation = OPERATIONS[step.op];
    if (!operation) throw new PreprocessError(`step ${step.op} is not known to this page.`);
    value = operation(value, step);
  }
  return value;
}

const OPERATIONS = {
  scale: (value, step) => ({ shape: value.shape, data: value.data.map((v) => v * step.factor) }),

  normalise(value, step) {
    const count = value.shape.at(-1) ?? 0;
    if (step.mean.length !== count || step.std.length !== count) {
      throw new PreprocessError(
        `normalise has ${step.mean.length} means and ${step.std.length} deviations; expected ${count} of each.`,
      );
    }
    const data = value.data.map((v, i) => (v - step.mean[i % count]) / step.std[i % count]);
    return { shape: value.shape, data };
  },

  crop_to_ink(value, step) {
    const [height, width] = plane(value, step);
    let top = height, bottom = -1, left = width, right = -1;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (value.data[y * width + x] > step.threshold) {
          top = Math.min(top, y);
          bottom = y;
          left = Math.min(left, x);
          right = Math.max(right, x);
        }
      }
    }
    if (bottom < 0) return value;
    const shape = [bottom - top + 1, right - left + 1];
    const data = new Float64Array(shape[0] * shape[1]);
    for (let y = 0; y < shape[0]; y++) {
      const from = (top + y) * width + left;
      data.set(value.data.subarray(from, from + shape[1]), y * shape[1]);
    }
    return { shape, data };
  },

  pad_to_square(value, step) {
    const [height, width] = plane(value, step);
    const side = Math.max(height, width);
    const above = Math.floor((side - height) / 2);
    const before = Math.floor((side - width) / 2);
    const data = new Float64Array(side * side).fill(step.fill);
    for (let y = 0; y < height; y++) {
      data.set(value.data.subarray(y * width, (y + 1) * width), (above + y) * side + before);
    }
    return { shape: [side, side], data };
  },

  resize(value, step) {
    const weigh = { area: areaWeights, bilinear: bilinearWeights }[step.method];
    if (!weigh) throw new PreprocessError(`resize method ${step.method} is not known to this page.`);
    const [height, width] = plane(value, step);
    const [h, w] = step.size;
    const rows = weigh(height, h);
    const columns = weigh(width, w);
    const half = new Float64Array(h * width);
    for (let i = 0; i < h; i++) {
      for (let y = 0; y < height; y++) {
        const share = rows[i * height + y];
        if (share === 0) continue;
        for (let x = 0; x < width; x++) half[i * width + x] += share * value.data[y * width + x];
      }
    }
    const data = new Float64Array(h * w);
    for (let i = 0; i < h; i++) {
      for (let j = 0; j < w; j++) {
        let sum = 0;
        for (let x = 0; x < width; x++) sum += half[i * width + x] * columns[j * width + x];
        data[i * w + j] = sum;
      }
    }
    return { shape: [h, w], data };
  },

  pad_end(value, step) {
    const count = rows(value, step);
    const row = count ? value.data.length / count : value.shape.slice(1).reduce((a, b) => a * b, 1);
    const data = new Float64Array(step.size * row).fill(step.fill);
    data.set(value.data);
    return { shape: [step.size, ...value.shape.slice(1)], data };
  },

  mask_of_length(value, step) {
    const count = rows(value, step);
    return { shape: [step.size], data: new Float64Array(step.size).fill(1, 0, count) };
  },

  reshape(value, step) {
    const size = step.shape.reduce((a, b) => a * b, 1);
    if (size !== value.data.length) {
      throw new PreprocessError(`reshape has ${value.data.length} values; expected shape ${step.shape}.`);
    }
    return { shape: [...step.shape], data: value.data };
  },
};

/** (size, source): each target's share of every source pixel it overlaps. */
export function areaWeights(source, size) {
  const weights = new Float64Array(size * source);
  for (let i = 0; i < size; i++) {
    const low = (i * source) / size;
    const high = ((i + 1) * source) / size;
    for (let p = Math.floor(low); p < Math.min(Math.ceil(high), source); p++) {
      const overlap = Math.min(high, p + 1) - Math.max(low, p);
      weights[i * source + p] = (Math.max(overlap, 0) * size) / source;
    }
  }
  return weights;
}

/** (size, source): pixel centres at half pixels, edges repeated. */
export function bilinearWeights(source, size) {
  const weights = new Float64Array(size * source);
  for (let i = 0; i < size; i++) {
    const place = Math.min(Math.max(((i + 0.5) * source) / size - 0.5, 0), source - 1);
    const low = Math.floor(place);
    const share = place - low;
    weights[i * source + low] += 1 - share;
    weights[i * source + Math.min(low + 1, source - 1)] += share;
  }
  return weights;
}

function plane(value, step) {
  if (value.shape.length !== 2) {
    throw new PreprocessError(`${step.op} has rank ${value.shape.length}; expected 2.`);
  }
  return value.shape;
}

function rows(value, step) {
  const count = value.shape.length ? value.shape[0] : 0;
  if (!value.shape.length || count > step.size) {
    throw new PreprocessError(`${step.op} has ${count} rows; expected at most ${step.size}.`);
  }
  return count;
}
