// The student's response, token by token.

// The gaps, in nats, at which the shade and the thickness change.
const LEVELS = [0.1, 0.5, 1, 2, 4];

// "p3": more likely under the student, third shade; "n3": under the teacher; "z": about equal.
function shade(gap) {
  if (gap === null || gap === undefined) return "none";
  const level = LEVELS.filter((limit) => Math.abs(gap) >= limit).length;
  return level === 0 ? "z" : `${gap > 0 ? "p" : "n"}${level}`;
}

function drawLegend(box) {
  box.setAttribute(
    "aria-label",
    "Shades: blue with a dotted line, more likely under the teacher; orange with a solid line, more " +
      "likely under the student; stronger and thicker with a larger gap, from 0.1 to 4 nats",
  );
  const swatch = (level, sign) =>
    element("span", { class: `swatch ${sign}${level}` }, `${LEVELS[level - 1]}`);
  const levels = [1, 2, 3, 4, 5];
  box.append(
    element("span", { class: "side" }, "teacher higher"),
    ...levels.toReversed().map((level) => swatch(level, "n")),
    element("span", { class: "swatch z" }, "0"),
    ...levels.map((level) => swatch(level, "p")),
    element("span", { class: "side" }, "student higher"),
    element("span", { class: "unit" }, "nats"),
  );
}

function drawPiece(data, t) {
  const text = data.pieces[t];
  const special = /^<[^<>\s]+>$/.test(text);
  const piece = element("span", {
    role: "option",
    class: `piece ${shade(data.gaps[t])}${special ? " special" : ""}${data.named ? "" : " id"}`,
    "data-t": t,
    tabindex: "-1",
    "aria-selected": "false",
  });
  if (text === "") piece.append(element("span", { class: "ghost" }, "\u00b7"));
  for (const part of visible(text).split(/(\n|\t)/)) {
    if (part === "\n") piece.append(element("span", { class: "ghost" }, "\u21b5"), "\n");
    else if (part === "\t") piece.append(element("span", { class: "ghost" }, "\u21e5"), "\t");
    else if (part) piece.append(part);
  }
  return piece;
}

class Answer {
  // Calls `look(t)` with the token under the pointer, else with the selected one; null for none.
  constructor(box, strip, look) {
    this.box = box;
    this.strip = strip;
    this.look = look;
    this.data = null;
    this.chosen = null;
    const at = (event) => event.target.closest(".piece")?.dataset.t;
    box.addEventListener("pointerover", (event) => {
      const t = at(event);
      if (t !== undefined) look(Number(t));
    });
    box.addEventListener("pointerleave", () => look(this.chosen));
    box.addEventListener("click", (event) => {
      const t = at(event);
      if (t !== undefined) this.choose(Number(t));
    });
    box.addEventListener("focusin", (event) => {
      const t = at(event);
      if (t !== undefined && Number(t) !== this.chosen) this.choose(Number(t), false);
    });
    const place = (event) =>
      Math.min(
        this.data.pieces.length - 1,
        Math.floor((event.offsetX / strip.clientWidth) * this.data.pieces.length),
      );
    strip.addEventListener("pointermove", (event) => this.data && look(place(event)));
    strip.addEventListener("pointerleave", () => look(this.chosen));
    strip.addEventListener("click", (event) => this.data && this.choose(place(event)));
    new ResizeObserver(() => this.drawStrip()).observe(strip);
  }

  show(data) {
    this.data = data;
    this.chosen = null;
    const pieces = data.pieces.map((_, t) => drawPiece(data, t));
    const whole = data.response === null ? [] : [element("p", { class: "whole" }, visible(data.response))];
    this.box.replaceChildren(...whole, ...pieces);
    this.pieces = pieces;
    this.box.scrollTop = 0;
    // Start at the token with the largest gap, because readers look for it first.
    const widest = data.gaps.reduce((best, gap, t) => {
      return Math.abs(gap ?? 0) > Math.abs(data.gaps[best] ?? 0) ? t : best;
    }, 0);
    if (pieces.length) this.choose(widest, false);
    else this.look(null);
  }

  choose(t, focus = true) {
    const before = this.pieces[this.chosen ?? 0];
    before?.setAttribute("aria-selected", "false");
    if (before) before.tabIndex = -1;
    this.chosen = t;
    const piece = this.pieces[t];
    piece.setAttribute("aria-selected", "true");
    piece.tabIndex = 0;
    if (focus) piece.focus();
    this.drawStrip();
    this.look(t);
  }

  move(by) {
    if (!this.pieces?.length) return;
    const t = this.chosen === null ? (by > 0 ? 0 : this.pieces.length - 1) : this.chosen + by;
    if (t >= 0 && t < this.pieces.length) this.choose(t);
  }

  // Move to the next or the previous token with a large gap.
  leap(by) {
    const count = this.pieces?.length ?? 0;
    let t = this.chosen === null ? (by > 0 ? -1 : count) : this.chosen;
    for (t += by; t >= 0 && t < count; t += by) {
      if (Math.abs(this.data.gaps[t] ?? 0) >= 1) return this.choose(t);
    }
  }

  // Draw one bar per token of the whole response; it goes up if the student's log-prob is higher.
  drawStrip() {
    const { strip, data } = this;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [strip.clientWidth, strip.clientHeight];
    if (!data || !width) return;
    strip.width = width * scale;
    strip.height = height * scale;
    const paint = strip.getContext("2d");
    paint.scale(scale, scale);
    const style = getComputedStyle(strip);
    const [up, down, line, focus] = ["--over", "--under", "--line", "--focus"].map((name) =>
      style.getPropertyValue(name),
    );
    const step = width / data.pieces.length;
    const middle = height / 2;
    if (this.chosen !== null) {
      paint.fillStyle = focus;
      paint.globalAlpha = 0.3;
      paint.fillRect(this.chosen * step, 0, Math.max(step, 2), height);
      paint.globalAlpha = 1;
    }
    paint.fillStyle = line;
    paint.fillRect(0, middle - 0.5, width, 1);
    data.gaps.forEach((gap, t) => {
      if (!gap) return;
      const size = Math.sqrt(Math.min(1, Math.abs(gap) / LEVELS.at(-1))) * (middle - 1);
      paint.fillStyle = gap > 0 ? up : down;
      const gapWidth = step > 4 ? step - 1.5 : step;
      paint.fillRect(t * step, gap > 0 ? middle - size : middle, gapWidth, size);
    });
  }
}
