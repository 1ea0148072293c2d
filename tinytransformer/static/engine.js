// A small Transformer in plain JavaScript: tokenizer, forward pass with a key-value cache, and the
// controls of sampling. nbs/appendix/model_page.ipynb explains it, and the tests hold every part of
// it against PyTorch. Vectors are Float64Arrays; a matrix (out, in) is one flat Float32Array.

// --- reading what a page carries

function base64Bytes(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/** Deflated bytes in base64, as Python's zlib wrote them. */
export async function unpack(text) {
  const stream = new Blob([base64Bytes(text)]).stream();
  const inflated = stream.pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(inflated).arrayBuffer());
}

const SCALES = Float64Array.from({ length: 31 }, (_, exponent) => 2 ** (exponent - 25));

/** The value of a 16-bit float (IEEE 754 binary16), given its bits. */
function halfValue(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return sign * (1024 + fraction) * SCALES[exponent];
}

/** Bytes of one tensor after another to {name: Float32Array}. `dtype` is "float16" or "float32". */
export function readTensors(bytes, shapes, dtype) {
  const width = dtype === "float16" ? 2 : 4;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const tensors = {};
  let at = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const size = shape.reduce((product, n) => product * n, 1);
    if (at + width * size > bytes.length) throw new Error(`the weights end inside ${name}`);
    const values = new Float32Array(size);
    for (let i = 0; i < size; i++, at += width)
      values[i] = width === 2 ? halfValue(view.getUint16(at, true)) : view.getFloat32(at, true);
    tensors[name] = values;
  }
  if (at !== bytes.length) throw new Error(`${bytes.length - at} bytes are left after the weights`);
  return tensors;
}

// --- the tokenizer: byte-level BPE

// How GPT-2 cuts a text into pieces before it merges. `\s` of JavaScript is not quite the white
// space of Unicode that the library `tokenizers` means, so it is spelled out.
const SPACE = "\\t-\\r\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const PIECES = new RegExp(
  `'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+` +
    `|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`,
  "gu",
);

/** For each byte the letter that stands for it in the vocabulary (Radford et al., 2019). */
function byteLetters() {
  const letters = [];
  let unseen = 256;
  for (let byte = 0; byte < 256; byte++) {
    const seen = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCharCode(seen ? byte : unseen++));
  }
  return letters;
}

export class Tokenizer {
  #ranks = new Map(); // "left right" -> which merge it is
  #pieces = new Map(); // piece -> token ids, found before
  #letters = byteLetters();
  #bytes = new Map(byteLetters().map((letter, byte) => [letter, byte]));
  #encoder = new TextEncoder();

  /** From the contents of a tokenizer.json. Throws an error for a kind that it does not know. */
  constructor({ model, pre_tokenizer: splitter, normalizer, added_tokens: added }) {
    if (model?.type !== "BPE" || splitter?.type !== "ByteLevel" || normalizer)
      throw new Error("this tokenizer is not byte-level BPE, the only kind that the page knows");
    if (splitter.add_prefix_space || splitter.use_regex === false)
      throw new Error("this tokenizer cuts text in a way that the page does not know");
    this.ids = new Map(Object.entries(model.vocab));
    this.texts = []; // token id -> its letters
    for (const [text, id] of this.ids) this.texts[id] = text;
    for (const { id, content } of added ?? []) this.texts[id] = content;
    for (const [rank, pair] of model.merges.entries())
      this.#ranks.set(typeof pair === "string" ? pair : pair.join(" "), rank);
  }

  get size() {
    return this.texts.length;
  }

  /** A text in pieces, which no token crosses. */
  cut(text) {
    return text.match(PIECES) ?? [];
  }

  /** Text to token ids. Half of a surrogate pair becomes U+FFFD. */
  encode(text) {
    return this.cut(text).flatMap((piece) => this.#encodePiece(piece));
  }

  #encodePiece(piece) {
    if (!this.#pieces.has(piece)) {
      if (this.#pieces.size > 20000) this.#pieces.clear();
      const letters = [...this.#encoder.encode(piece)].map((byte) => this.#letters[byte]);
      const ids = this.#merge(letters).map((part) => this.ids.get(part));
      this.#pieces.set(
        piece,
        ids.filter((id) => id !== undefined),
      );
    }
    return this.#pieces.get(piece);
  }

  /** Merge the pair that was learned first, wherever it stands, until no pair is left. */
  #merge(letters) {
    let parts = letters;
    for (;;) {
      let best = Number.POSITIVE_INFINITY;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.#ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? best;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts;
      const [left, right] = [parts[at], parts[at + 1]];
      const merged = parts.slice(0, at);
      for (let i = at; i < parts.length; i++)
        merged.push(parts[i] === left && parts[i + 1] === right ? left + parts[++i] : parts[i]);
      parts = merged;
    }
  }

  /** The bytes of one token. */
  bytes(id) {
    const letters = [...this.texts[id]];
    if (letters.every((letter) => this.#bytes.has(letter)))
      return Uint8Array.from(letters, (letter) => this.#bytes.get(letter));
    return this.#encoder.encode(this.texts[id]);
  }

  /** For each token the characters that it completes; bytes that are no character are U+FFFD. */
  pieces(ids) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const pieces = ids.map((id) => decoder.decode(this.bytes(id), { stream: true }));
    if (pieces.length) pieces.push(pieces.pop() + decoder.decode());
    return pieces;
  }

  /** Token ids to text. */
  decode(ids) {
    return this.pieces(ids).join("");
  }

  /** One token by itself; bytes that are no character as \\x and two digits. */
  show(id) {
    const text = this.decode([id]);
    if (!text.includes("\ufffd")) return text;
    const hex = (byte) => byte.toString(16).padStart(2, "0");
    return Array.from(this.bytes(id), (byte) =>
      byte < 128 ? String.fromCharCode(byte) : `\\x${hex(byte)}`,
    ).join("");
  }
}

// --- the model

/** matrix (rows, x.length) times x, plus bias. */
function linear(matrix, bias, x) {
  const C = x.length;
  const rows = matrix.length / C;
  const out = new Float64Array(rows);
  for (let row = 0, at = 0; row < rows; row++) {
    let sum = bias ? bias[row] : 0;
    for (let i = 0; i < C; i++) sum += matrix[at++] * x[i];
    out[row] = sum;
  }
  return out;
}

/** LayerNorm, or RMSNorm where there is no bias. */
function normalize(x, gain, bias) {
  const mean = bias ? x.reduce((sum, value) => sum + value, 0) / x.length : 0;
  const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
  const scale = 1 / Math.sqrt(variance + 1e-5);
  return x.map((value, i) => (value - mean) * scale * gain[i] + (bias ? bias[i] : 0));
}

const gelu = (z) => 0.5 * z * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (z + 0.044715 * z ** 3)));
const silu = (z) => z / (1 + Math.exp(-z));
const add = (x, y) => x.map((value, i) => value + y[i]);

/** Rotate the pairs (i, i + D/2) of each head by an angle that grows with the position. */
function rotate(x, D, position) {
  const out = new Float64Array(x.length);
  for (let head = 0; head < x.length; head += D)
    for (let i = 0; i < D / 2; i++) {
      const angle = position * 10000 ** ((-2 * i) / D);
      const [a, b] = [x[head + i], x[head + i + D / 2]];
      out[head + i] = a * Math.cos(angle) - b * Math.sin(angle);
      out[head + i + D / 2] = a * Math.sin(angle) + b * Math.cos(angle);
    }
  return out;
}

/** Scores to weights that sum to one. */
export function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const weights = scores.map((score) => Math.exp(score - most));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

const KNOWN = {
  activation: ["relu", "gelu", "swiglu"],
  norm: ["layer", "rms"],
  positions: ["learned", "rotary"],
};

export class Transformer {
  /** `config` as in config.yaml's `model`, `tensors` by their names in PyTorch. */
  constructor(config, tensors) {
    for (const [part, names] of Object.entries(KNOWN))
      if (!names.includes(config[part]))
        throw new Error(`model.${part} is ${config[part]}: the page knows ${names.join(" and ")}`);
    this.config = config;
    this.tensors = tensors;
    this.headDim = config.embed_dim / config.num_heads;
  }

  #part(name) {
    const { [`${name}.weight`]: weight, [`${name}.bias`]: bias } = this.tensors;
    if (!weight) throw new Error(`the weights have no ${name}.weight`);
    return [weight, bias];
  }

  #linear(name, x) {
    return linear(...this.#part(name), x);
  }

  #norm(name, x) {
    return normalize(x, ...this.#part(name));
  }

  emptyCache() {
    const { num_layers: layers } = this.config;
    return {
      keys: Array.from({ length: layers }, () => []),
      values: [...Array(layers)].map(() => []),
    };
  }

  /**
   * Read one more token, and give the logits (V) for the one after it. `off` has "layer.head" of
   * each head that is switched off, and `patch` maps it to the vector (D) that is put in place of what
   * a head computes here. What is computed on the way is put into `trace`, if given.
   */
  read(id, cache, { off = new Set(), patch = new Map(), trace = null } = {}) {
    const { embed_dim: C, num_layers: layers, seq_len: most } = this.config;
    const position = cache.keys[0].length;
    if (position >= most) throw new Error(`the context of ${most} tokens is full`);
    const row = (name, i) => Float64Array.from(this.#part(name)[0].subarray(i * C, (i + 1) * C));
    const token = row("embeddings.token", id);
    const place = this.config.positions === "learned" && row("embeddings.position", position);
    let x = place ? add(token, place) : token;
    if (trace) Object.assign(trace, { id, position, token, place, x, layers: [] });
    for (let layer = 0; layer < layers; layer++) {
      const seen = trace && {};
      const attended = this.#attend(
        layer,
        this.#norm(`blocks.${layer}.norm1`, x),
        cache,
        { off, patch },
        seen,
      );
      const middle = add(x, attended);
      const fed = this.#feedForward(layer, this.#norm(`blocks.${layer}.norm2`, middle), seen);
      x = add(middle, fed);
      if (trace) trace.layers.push(Object.assign(seen, { attended, middle, fed, x }));
    }
    const normed = this.#norm("norm", x);
    const logits = this.#project(normed);
    if (trace) Object.assign(trace, { normed, logits });
    return logits;
  }

  #project(normed) {
    return linear(this.headMatrix, null, normed);
  }

  /** The output matrix (V, C), row by row. */
  get headMatrix() {
    return this.#part(this.config.tie_weights ? "embeddings.token" : "head")[0];
  }

  /** The logits (V) that a vector (C) of the residual stream has, if no block is left. */
  logitsOf(x) {
    return this.#project(this.#norm("norm", x));
  }

  #attend(layer, normed, cache, { off, patch }, seen) {
    const { embed_dim: C, num_heads: H, positions } = this.config;
    const D = this.headDim;
    const qkv = this.#linear(`blocks.${layer}.attention.qkv`, normed);
    let [q, k] = [qkv.slice(0, C), qkv.slice(C, 2 * C)];
    const v = qkv.slice(2 * C);
    const keys = cache.keys[layer];
    const values = cache.values[layer];
    if (positions === "rotary") [q, k] = [q, k].map((vector) => rotate(vector, D, keys.length));
    keys.push(k);
    values.push(v);
    const heads = new Float64Array(C);
    const scores = []; // q·k before it is scaled
    const weights = [];
    for (let head = 0; head < H; head++) {
      const [from, to] = [head * D, (head + 1) * D];
      const dot = (key) => {
        let sum = 0;
        for (let i = from; i < to; i++) sum += q[i] * key[i];
        return sum;
      };
      scores.push(Float64Array.from(keys, dot));
      weights.push(softmax(scores[head].map((score) => score / Math.sqrt(D))));
      if (off.has(`${layer}.${head}`)) continue;
      const given = patch.get(`${layer}.${head}`);
      if (given) {
        heads.set(given, from);
        continue;
      }
      for (let s = 0; s < keys.length; s++)
        for (let i = from; i < to; i++) heads[i] += weights[head][s] * values[s][i];
    }
    if (seen) Object.assign(seen, { normed1: normed, q, k, v, scores, weights, heads });
    return this.#linear(`blocks.${layer}.attention.proj`, heads);
  }

  #feedForward(layer, normed, seen) {
    const name = `blocks.${layer}.ffn`;
    if (seen) seen.normed2 = normed;
    if (this.config.activation === "swiglu") {
      const both = this.#linear(`${name}.gate_up`, normed);
      const up = both.subarray(both.length / 2);
      const inner = up.map((value, i) => silu(both[i]) * value);
      if (seen) seen.inner = inner;
      return this.#linear(`${name}.down`, inner);
    }
    const activation = this.config.activation === "gelu" ? gelu : (z) => Math.max(0, z);
    const inner = this.#linear(`${name}.0`, normed).map(activation);
    if (seen) seen.inner = inner;
    return this.#linear(`${name}.2`, inner);
  }
}

// --- choosing the next token, as in chapter 06

export const SETTINGS = {
  temperature: 1, // 0 takes the likeliest token
  top_k: 0, // 0 keeps all
  top_p: 1,
  min_p: 0,
  repetition_penalty: 1, // of tokens that stand in the text
  frequency_penalty: 0, // for each time that a token was written
  presence_penalty: 0, // once, if a token was written
};
const GREEDY_BELOW = 1e-6; // a temperature below this takes the likeliest token

const indexOfLargest = (values) =>
  values.reduce((best, value, i) => (value > values[best] ? i : best), 0);

function applyPenalties(logits, ids, written, settings) {
  const { repetition_penalty: repeat, frequency_penalty: often, presence_penalty: once } = settings;
  const out = Float64Array.from(logits);
  if (repeat !== 1)
    for (const id of new Set(ids)) out[id] = out[id] > 0 ? out[id] / repeat : out[id] * repeat;
  for (const id of written) out[id] -= often;
  for (const id of new Set(written)) out[id] -= once;
  return out;
}

function keepTopP(logits, p) {
  if (p >= 1) return logits;
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a] || a - b);
  const probabilities = softmax(logits);
  const out = logits.slice();
  let before = 0;
  for (const id of order) {
    if (before >= p && before > 0) out[id] = Number.NEGATIVE_INFINITY;
    before += probabilities[id];
  }
  return out;
}

function keepAtLeast(logits, least) {
  return logits.map((logit) => (logit < least ? Number.NEGATIVE_INFINITY : logit));
}

/** Logits (V) to the distribution that the next token is drawn from; `written` are the ids of `ids`
 * that the model wrote itself. The order is that of chapter 06: penalties, temperature, top-k,
 * top-p, min-p. */
export function nextDistribution(logits, ids, written, settings) {
  let z = applyPenalties(logits, ids, written, settings);
  if (settings.temperature < GREEDY_BELOW) {
    const likeliest = indexOfLargest(z);
    return z.map((_, id) => (id === likeliest ? 1 : 0));
  }
  z = z.map((logit) => logit / settings.temperature);
  if (settings.top_k > 0 && settings.top_k < z.length)
    z = keepAtLeast(z, z.slice().sort()[z.length - settings.top_k]);
  z = keepTopP(z, settings.top_p);
  if (settings.min_p > 0) z = keepAtLeast(z, z[indexOfLargest(z)] + Math.log(settings.min_p));
  return softmax(z);
}

/** The token at which the running sum of the probabilities passes `u`, a number from 0 to 1. */
export function drawToken(probabilities, u) {
  const total = probabilities.reduce((sum, p) => sum + p, 0);
  let sum = 0;
  let last = 0;
  for (const [id, p] of probabilities.entries()) {
    if (p === 0) continue;
    sum += p;
    last = id;
    if (sum > u * total) return id;
  }
  return last;
}

/** Random numbers from 0 to 1 that depend on the seed alone (the generator "mulberry32"). */
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 15), z | 1);
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32;
  };
}

// --- a text that grows

/** How many of the last n tokens the model sees, as in chapter 06. */
export function windowLength(n, context) {
  const jump = Math.max(1, Math.floor(context / 4));
  return n <= context ? n : context - jump + 1 + ((n - context - 1) % jump);
}

/** A text that is read token by token: the logits after its last token, and what was computed for
 * the tokens in the window. */
export class Text {
  constructor(model, off = new Set()) {
    this.model = model;
    this.off = off;
    this.ids = [];
    this.logits = null; // (V), after the last token
    this.surprises = []; // in nats, of each token that follows another
    this.#forget();
  }

  #forget() {
    this.cache = this.model.emptyCache();
    this.traces = [];
  }

  #read(id) {
    const trace = {};
    this.model.read(id, this.cache, { off: this.off, trace });
    this.traces.push(trace);
    return trace.logits;
  }

  push(id) {
    if (this.logits) this.surprises.push(-Math.log(softmax(this.logits)[id]));
    this.ids.push(id);
    const seen = windowLength(this.ids.length, this.model.config.seq_len);
    if (seen <= this.traces.length) {
      this.#forget(); // the window was full and has jumped
      for (const earlier of this.ids.slice(-seen, -1)) this.#read(earlier);
    }
    this.logits = this.#read(id);
    if (!this.logits.every(Number.isFinite))
      throw new Error("the model's logits are not finite: its training has diverged");
    return this.logits;
  }
}

// --- what a page carries, as model_page.py packed it

/** [model, tokenizer] out of the data of a page. */
export async function readModel({ config, weights, shapes, dtype, tokenizer }) {
  const tensors = readTensors(await unpack(weights), shapes, dtype);
  const json = new TextDecoder().decode(await unpack(tokenizer));
  return [new Transformer(config, tensors), new Tokenizer(JSON.parse(json))];
}
