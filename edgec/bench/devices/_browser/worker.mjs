// The measuring worker of edgec's browser device: edgec/bench/worker.py, once more, for onnxruntime-web.
//
// Reads job.json beside it, loads model/…, answers with the same JSON events by POST to events. Token ids come with
// the job, so that no tokenizer is needed here; times therefore leave tokenization out.

const say = async (event, values) => {
  const answer = await fetch("events", {method: "POST", body: JSON.stringify({event, ...values}) + "\n"});
  if (!answer.ok) throw new Error(`the harness refused an answer: ${answer.status}`);
};

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};

/** The 95th percentile, a value that was measured: the smallest that at least 95 % do not exceed. */
const p95 = (values) => [...values].sort((a, b) => a - b)[Math.ceil(0.95 * values.length) - 1];
const LEAST_LATENCIES = 40;

/** Whole numbers as a tensor of the type that the graph wants. */
const integers = (ort, type, values, shape) =>
  new ort.Tensor(type, type === "int32" ? Int32Array.from(values) : BigInt64Array.from(values, BigInt), shape);

const base64 = (floats) => {
  const bytes = new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
};

/** Sentences [N, T] → embeddings [N, d], flat; last_hidden_state is averaged over the mask, as the loader does. */
const embed = async (ort, session, job, batch) => {
  const feeds = {};
  for (const [name, type] of Object.entries(job.inputs)) feeds[name] = integers(ort, type, batch[name], batch.shape);
  const value = (await session.run(feeds, [job.output]))[job.output];
  const data = Float32Array.from(value.data);
  if (!job.pool) return data;
  const [rows, tokens, width] = value.dims, result = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    let count = 0;
    for (let t = 0; t < tokens; t++) {
      if (!batch.attention_mask[row * tokens + t]) continue;
      count++;
      const start = (row * tokens + t) * width;
      for (let i = 0; i < width; i++) result[row * width + i] += data[start + i];
    }
    for (let i = 0; i < width; i++) result[row * width + i] /= Math.max(count, 1);
  }
  return result;
};

const encoderSampler = (ort, session, job) => async (minSeconds) => {
  let batches = 0, elapsed = 0;
  const started = performance.now();
  do {
    await embed(ort, session, job, job.batch);
    batches++;
    elapsed = (performance.now() - started) / 1e3;
  } while (elapsed < minSeconds);
  const latencies = [];
  while (latencies.length < (minSeconds ? LEAST_LATENCIES : 1)) {
    for (const single of job.singles) {
      const begun = performance.now();
      await embed(ort, session, job, single);
      latencies.push(performance.now() - begun);
    }
  }
  const rate = (batches * job.batch.shape[0]) / elapsed;
  return {items_s: rate, item_ms: median(latencies), item_p95_ms: p95(latencies)};
};

/** One step of a decoder: new ids after `past` tokens → its outputs; the cache grows by what `present` returns. */
const step = (ort, session, job, ids, past, cache) => {
  const feeds = {[job.names.ids]: integers(ort, job.inputs[job.names.ids], ids, [1, ids.length])};
  const total = past + ids.length;
  if (job.names.mask) {
    const ones = new Array(total).fill(1);
    feeds[job.names.mask] = integers(ort, job.inputs[job.names.mask], ones, [1, total]);
  }
  if (job.names.positions) {
    const positions = ids.map((_, i) => past + i);
    feeds[job.names.positions] = integers(ort, job.inputs[job.names.positions], positions, [1, ids.length]);
  }
  return session.run({...feeds, ...cache});
};

const emptyCache = (ort, job) => {
  const kind = job.cache.type === "float16" ? Float16Array : Float32Array;
  const [, heads, , width] = job.cache.shape;
  const make = () => new ort.Tensor(job.cache.type, new kind(0), [1, heads, 0, width]);
  return Object.fromEntries(job.cache.pairs.map(([past]) => [past, make()]));
};

const grown = (job, outputs) => Object.fromEntries(job.cache.pairs.map(([past, present]) => [past, outputs[present]]));

/** The likeliest token at the last position; ends of text are masked in this copy of the logits. */
const likeliest = (job, logits) => {
  const width = logits.dims[2], row = logits.data.subarray(logits.data.length - width);
  for (const end of job.ends) row[end] = -Infinity;
  let best = 0;
  for (let i = 1; i < width; i++) if (row[i] > row[best]) best = i;
  if (!Number.isFinite(row[best])) throw new Error("the model answered NaN or Inf");
  return best;
};

const causalSampler = (ort, session, job) => async (minSeconds) => {
  const first = [], rest = [], steps = [];
  do {
    const begun = performance.now();
    let outputs = await step(ort, session, job, job.prompt, 0, emptyCache(ort, job));
    let token = likeliest(job, outputs[job.names.logits]);
    const prefilled = performance.now();
    let ended = prefilled;
    for (let i = 1; i < job.new_tokens; i++) {
      outputs = await step(ort, session, job, [token], job.prompt.length + i - 1, grown(job, outputs));
      token = likeliest(job, outputs[job.names.logits]);
      const before = ended;
      ended = performance.now();
      steps.push(ended - before);
    }
    first.push(prefilled - begun);
    rest.push(ended - prefilled);
  } while (mean(first) * first.length + mean(rest) * rest.length < 1e3 * minSeconds);
  const result = {ttft_ms: mean(first), prefill_tok_s: job.prompt.length / (mean(first) / 1e3)};
  if (job.new_tokens > 1) {
    result.decode_tok_s = (job.new_tokens - 1) / (mean(rest) / 1e3);
    Object.assign(result, {step_ms: median(steps), step_p95_ms: p95(steps)});
  }
  return result;
};

/** What the model answers to the input that the harness gives another machine too. */
const answered = async (ort, session, job) => {
  if (job.task === "encoder") {
    const values = await embed(ort, session, job, job.check);
    return {shape: [job.check.shape[0], values.length / job.check.shape[0]], values: base64(values)};
  }
  // A graph may give the logits of the last position only, so the last rows are asked for one by one.
  const rows = Math.min(job.check_rows, job.check.length), found = [];
  let past = 0, cache = emptyCache(ort, job);
  while (found.length < rows) {
    const end = job.check.length - rows + found.length + 1;
    const outputs = await step(ort, session, job, job.check.slice(past, end), past, cache);
    const logits = outputs[job.names.logits];
    found.push(Float32Array.from(logits.data.subarray(logits.data.length - logits.dims[2])));
    [past, cache] = [end, grown(job, outputs)];
  }
  const width = found[0].length, values = new Float32Array(rows * width);
  found.forEach((row, i) => values.set(row, i * width));
  return {shape: [rows, width], values: base64(values)};
};

const main = async () => {
  const job = await (await fetch("job.json")).json();
  if (job.threads > 1 && !self.crossOriginIsolated) throw new Error("the page is not isolated: no threads");
  const ort = await import("./ort/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = job.threads;
  ort.env.wasm.wasmPaths = new URL("ort/", self.location.href).href;
  ort.env.logLevel = "error";
  await say("ready", {versions: {"onnxruntime-web": ort.env.versions.web}});
  const started = performance.now();
  const session = await ort.InferenceSession.create(new URL(job.model, self.location.href).href, {
    executionProviders: ["wasm"],
    externalData: job.external.map(({path, url}) => ({path, data: new URL(url, self.location.href).href})),
  });
  const loaded = {load_s: (performance.now() - started) / 1e3};
  if (job.sentence_tokens) loaded.sentence_tokens = job.sentence_tokens;
  await say("loaded", loaded);
  const sample = (job.task === "encoder" ? encoderSampler : causalSampler)(ort, session, job);
  for (let i = 0; i < job.warmup + job.samples; i++) {
    const metrics = await sample(i < job.warmup ? 0 : job.min_sample_s);
    if (i >= job.warmup) await say("sample", {metrics});
  }
  await say("measured", {});
  if (job.check) await say("answer", await answered(ort, session, job));
  await say("done", {});
};

main().catch((error) => say("error", {message: String(error?.message ?? error).slice(0, 1500)}));
