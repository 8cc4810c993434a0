/** Numbers out of raw data: percentiles, softmax, agreement with goldens. Pure functions. */

/** Percentile by linear interpolation between ranks (numpy's default); null of nothing. */
export function percentile(samples, p) {
  const sorted = usable(samples).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const place = ((sorted.length - 1) * p) / 100;
  const low = Math.floor(place);
  const high = Math.min(low + 1, sorted.length - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
}

/** `{runs, min, p50, p90, p99, mean}` in the samples' unit; nulls where there are no samples. */
export function summarise(samples) {
  const kept = usable(samples);
  return {
    runs: kept.length,
    min: kept.length ? Math.min(...kept) : null,
    p50: percentile(kept, 50),
    p90: percentile(kept, 90),
    p99: percentile(kept, 99),
    mean: kept.length ? kept.reduce((a, b) => a + b, 0) / kept.length : null,
  };
}

/** Samples that are finite and not negative, copied. */
export function usable(samples) {
  return Array.from(samples ?? []).filter((v) => typeof v === "number" && Number.isFinite(v) && v >= 0);
}

/** Softmax of logits; sums to one. Non-finite logits give NaN, never a winner. */
export function softmax(logits) {
  const values = Array.from(logits);
  if (!values.every(Number.isFinite)) return values.map(() => NaN);
  const top = Math.max(...values);
  const powers = values.map((v) => Math.exp(v - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((v) => v / sum);
}

/** Index of the largest value; -1 where a value is not finite or there is none. */
export function argmax(values) {
  let best = -1;
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i])) return -1;
    if (best < 0 || values[i] > values[best]) best = i;
  }
  return best;
}

/**
 * Compare an output with its golden one.
 *
 * @returns `{ok, maxAbs, maxRel, reason}`; max_rel is max|a - r| / max|r|, or
 *   max|a - r| where r is all zero. A wrong shape or a value that is not finite is no success.
 */
export function compare(actual, golden, tolerance) {
  if (!actual) return failed(`output ${golden.name} is missing`);
  if (actual.shape.join() !== golden.shape.join() || actual.data.length !== golden.data.length) {
    return failed(`${golden.name} has shape [${actual.shape}]; expected [${golden.shape}]`);
  }
  let maxAbs = 0;
  let scale = 0;
  for (let i = 0; i < golden.data.length; i++) {
    if (!Number.isFinite(actual.data[i])) return failed(`${golden.name}[${i}] is ${actual.data[i]}`);
    maxAbs = Math.max(maxAbs, Math.abs(actual.data[i] - golden.data[i]));
    scale = Math.max(scale, Math.abs(golden.data[i]));
  }
  const maxRel = scale > 0 ? maxAbs / scale : maxAbs;
  const ok = maxRel <= tolerance;
  const reason = ok ? null : `${golden.name} is off by ${maxRel.toExponential(2)}; at most ${tolerance} is allowed`;
  return { ok, maxAbs, maxRel, reason };
}

function failed(reason) {
  return { ok: false, maxAbs: null, maxRel: null, reason };
}

/** Counts of equal-width bins between the smallest and the largest sample. */
export function histogram(samples, bins) {
  const kept = usable(samples);
  if (!kept.length) return { low: null, high: null, counts: [] };
  const low = Math.min(...kept);
  const high = Math.max(...kept);
  const counts = new Array(bins).fill(0);
  for (const v of kept) {
    counts[high > low ? Math.min(bins - 1, Math.floor(((v - low) / (high - low)) * bins)) : 0]++;
  }
  return { low, high, counts };
}

/** Count what is right, and what is as the float64 reference predicts; null is neither. */
export function scorePredictions(predictions, evaluation) {
  let correct = 0;
  let agreeing = 0;
  predictions.forEach((p, i) => {
    if (p === null) return;
    if (p === evaluation.targets[i]) correct += 1;
    if (p === evaluation.reference_top1[i]) agreeing += 1;
  });
  return { correct, agreeing, samples: evaluation.samples, complete: predictions.length === evaluation.samples };
}
