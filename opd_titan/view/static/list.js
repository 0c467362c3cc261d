// A list of any length. Only the visible rows exist as elements.

const ROW = 66;
const MARGIN = 6;

class List {
  // `draw(i)` creates the content of item i. Calls `pick(place)` with the position of a selection.
  constructor(box, draw, pick) {
    this.box = box;
    this.draw = draw;
    this.items = [];
    this.chosen = -1;
    this.rows = new Map();
    this.space = element("div", { class: "space", role: "presentation" });
    box.append(this.space);
    box.addEventListener("scroll", () => this.show(), { passive: true });
    new ResizeObserver(() => this.show()).observe(box);
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) pick(Number(row.dataset.place));
    });
  }

  fill(items) {
    this.items = items;
    this.chosen = -1;
    this.space.style.height = `${items.length * ROW}px`;
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.box.scrollTop = 0;
    this.box.removeAttribute("aria-activedescendant");
    this.show();
  }

  choose(place) {
    this.rows.get(this.chosen)?.setAttribute("aria-selected", "false");
    this.chosen = place;
    if (place < 0) return;
    const { scrollTop, clientHeight } = this.box;
    if (place * ROW < scrollTop) this.box.scrollTop = place * ROW;
    if ((place + 1) * ROW > scrollTop + clientHeight)
      this.box.scrollTop = (place + 1) * ROW - clientHeight;
    this.show();
    this.rows.get(place)?.setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", `row-${place}`);
  }

  show() {
    const { scrollTop, clientHeight } = this.box;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - MARGIN);
    const last = Math.min(this.items.length, Math.ceil((scrollTop + clientHeight) / ROW) + MARGIN);
    for (const [place, row] of this.rows) {
      if (place < first || place >= last) {
        row.remove();
        this.rows.delete(place);
      }
    }
    for (let place = first; place < last; place++) {
      if (this.rows.has(place)) continue;
      const row = element("div", {
        role: "option",
        id: `row-${place}`,
        "data-place": place,
        "aria-selected": String(place === this.chosen),
        "aria-posinset": place + 1,
        "aria-setsize": this.items.length,
      });
      row.append(...this.draw(this.items[place]));
      row.style.transform = `translateY(${place * ROW}px)`;
      this.space.append(row);
      this.rows.set(place, row);
    }
  }
}

const GRADES = [
  ["wrong", "\u2717", "wrong"],
  ["right", "\u2713", "right"],
];

// Kind, sign and name of a grade; a grader may also return a score between wrong and right.
function gradeOf(correct) {
  const score = correct.toFixed(2);
  return GRADES[correct] ?? ["partial", score, `score ${score}`];
}

function badge(correct) {
  if (correct === null) return null;
  const [kind, sign, name] = gradeOf(correct);
  return element("span", { class: `grade ${kind}`, title: name, "aria-label": name }, sign);
}

// A bar with the rollout's KL, as its square root, so that an outlier does not hide all others.
function meter(index, i) {
  const kl = index.kl[i] ?? 0;
  meter.full ??= index.kl.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0) || 1;
  const bar = element("span", { class: kl < 0 ? "under" : "over" });
  bar.style.width = `${100 * Math.sqrt(Math.abs(kl) / meter.full)}%`;
  return element("span", { class: "meter", "aria-hidden": "true" }, bar);
}

function drawRow(index, i) {
  return [
    element("div", { class: "question" }, visible(index.questions[index.question[i]]) || "(empty prompt)"),
    element("div", { class: "preview" }, visible(index.preview[i]) || "(empty response)"),
    element(
      "div",
      { class: "meta" },
      meter(index, i),
      element("span", { class: "kl" }, `KL ${nats(index.kl[i])}`),
      element("span", {}, `${index.tokens[i]} tok`),
      index.cut[i] ? element("span", { class: "cut" }, "truncated") : null,
      element("span", { class: "spring" }),
      element("span", {}, `step ${index.step[i]}`),
      badge(index.correct[i]),
    ),
  ];
}

// Return `ids` in the requested order; equal ones keep the order of sampling.
function sorted(index, ids, how) {
  const last = (value, sign) => (value === null ? Infinity : sign * value);
  const keys = {
    kl: (i) => last(index.kl[i], -1),
    "kl-low": (i) => last(index.kl[i], 1),
    long: (i) => -index.tokens[i],
    short: (i) => index.tokens[i],
    cut: (i) => -index.cut[i],
    wrong: (i) => last(index.correct[i], 1),
    right: (i) => last(index.correct[i], -1),
  };
  const key = keys[how];
  if (!key) return ids;
  const values = new Map(ids.map((i) => [i, key(i)]));
  // Infinity - Infinity is NaN.
  return ids.sort((a, b) => {
    const [x, y] = [values.get(a), values.get(b)];
    return x === y ? a - b : x < y ? -1 : 1;
  });
}
