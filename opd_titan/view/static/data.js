// The blocks of data in the page: compressed JSON in base64, decoded when they are needed.

const parsed = new Promise((resolve) => {
  if (document.readyState !== "loading") resolve();
  else document.addEventListener("DOMContentLoaded", resolve, { once: true });
});

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(id) {
  // The browser may not have loaded the whole page yet.
  if (!document.getElementById(id)?.nextSibling) await parsed;
  const bytes = bytesOf(document.getElementById(id).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const MOST_CHUNKS = 12;
const chunks = new Map(); // the most recently used chunks, as promises

function chunk(number) {
  const found = chunks.get(number) ?? unpack(`chunk-${number}`);
  chunks.delete(number);
  chunks.set(number, found);
  if (chunks.size > MOST_CHUNKS) chunks.delete(chunks.keys().next().value);
  return found;
}

const fromUnits = (values) => values && values.map((v) => (v === null ? null : v / 1000));

// The teacher's most likely tokens at each position, as [text, log-prob].
function alternativesOf(row, words) {
  if (!row.top) return null;
  const logprobs = fromUnits(row.top_logprobs);
  let next = 0;
  return row.top_sizes.map((size) => {
    const first = next;
    next += size;
    return row.top.slice(first, next).map((w, k) => [words[w], logprobs[first + k]]);
  });
}

// One rollout with its values per token. Values that the file does not have are null.
async function rollout(index, i) {
  const { words, rows } = await chunk(index.chunk[i]);
  const row = rows[index.place[i]];
  const student = fromUnits(row.student);
  const teacher = fromUnits(row.teacher);
  return {
    prompt: words[row.prompt],
    finish: words[row.finish],
    answer: row.answer === null ? null : words[row.answer],
    response: row.pieces ? null : words[row.response],
    pieces: row.pieces ? row.pieces.map((w) => words[w]) : row.ids.map(String),
    named: Boolean(row.pieces),
    logprobs: { student, teacher, reference: fromUnits(row.reference) },
    ranks: {
      student: row.student_ranks,
      teacher: row.teacher_ranks,
      reference: row.reference_ranks,
    },
    advantages: fromUnits(row.advantages),
    gaps: (row.pieces ?? row.ids).map((_, t) =>
      student && teacher && student[t] !== null && teacher[t] !== null
        ? student[t] - teacher[t]
        : null,
    ),
    top: alternativesOf(row, words),
  };
}

// All elements are created here, so that text is always inserted as text.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);
const minus = (text) => text.replace("-", "\u2212");
const nats = (value, digits = 3) =>
  value === null || value === undefined ? "\u2013" : minus(value.toFixed(digits));
const signed = (value, digits = 3) => (value > 0 ? "+" : "") + nats(value, digits);

function percent(logprob) {
  if (logprob === null) return "\u2013";
  const p = 100 * Math.exp(logprob);
  if (p >= 99.95 && logprob < 0) return ">99.9%";
  return p < 0.01 ? "<0.01%" : `${p.toFixed(p < 10 ? 2 : 1)}%`;
}

// Show invisible characters and direction marks as symbols, or by their numbers.
const UNSEEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]/gu;
const visible = (text) =>
  text.replace(UNSEEN, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
// The same on one line, with visible spaces.
const inOneLine = (text) =>
  visible(text).replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replaceAll(" ", "\u2423");
