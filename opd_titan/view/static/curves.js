// The run's curves: small charts in plain SVG, with the selected step marked.

const WIDTH = 300;
const HEIGHT = 46;
const EDGE = { left: 4, right: 6, top: 6, bottom: 6 };

const share = (value) => `${minus((100 * value).toFixed(1))}%`;
const CHARTS = [
  ["kl", "KL to the teacher", (value) => nats(value)],
  ["gap", "Gap recovered", share],
  ["length", "Response tokens", (value) => value.toFixed(1)],
  ["cut", "Truncated", share],
  ["accuracy", "Accuracy", share],
];

class Curves {
  // Calls `pick(step)` with the step at the position of a click.
  constructor(box, curves, pick) {
    const steps = Object.values(curves).flatMap((points) => points.map(([step]) => step));
    const last = steps.reduce((a, b) => Math.max(a, b), 1);
    this.x = (step) => EDGE.left + (step / last) * (WIDTH - EDGE.left - EDGE.right);
    const stepAt = (x) => ((x - EDGE.left) / (WIDTH - EDGE.left - EDGE.right)) * last;
    this.charts = [];
    for (const [key, name, text] of CHARTS) {
      if (curves[key]?.length) this.charts.push(this.chart(key, name, text, curves));
    }
    box.append(element("h2", {}, "The run"));
    if (!this.charts.length) {
      box.append(element("p", { class: "hint" }, "No TensorBoard events in this dump folder."));
    }
    for (const { figure, svg } of this.charts) {
      box.append(figure);
      svg.addEventListener("click", (event) => {
        const frame = svg.getBoundingClientRect();
        pick(stepAt(((event.clientX - frame.left) / frame.width) * WIDTH));
      });
    }
    if (this.charts.length) {
      box.append(
        element("p", { class: "axis" }, element("span", {}, "step 0"), element("span", {}, `${last}`)),
      );
    }
  }

  chart(key, name, text, curves) {
    const points = curves[key];
    const goal = key === "accuracy" ? curves.teacher?.at(-1)?.[1] : key === "gap" ? 1 : undefined;
    const values = points.map(([, value]) => value);
    const all = goal === undefined ? values : [...values, goal];
    const [low, high] = [Math.min(...all, 0), Math.max(...all)];
    const span = high - low || 1;
    const y = (v) => EDGE.top + (1 - (v - low) / span) * (HEIGHT - EDGE.top - EDGE.bottom);
    const path = points.map(([s, v], i) => `${i ? "L" : "M"}${this.x(s).toFixed(1)} ${y(v).toFixed(1)}`);
    const mark = drawing("line", { class: "mark", y1: 0, y2: HEIGHT });
    const dot = drawing("circle", { class: "dot", r: 3 });
    const ends = `from ${text(values[0])} to ${text(values.at(-1))}`;
    const svg = drawing(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
        "aria-label": `${name} over steps ${points[0][0]} to ${points.at(-1)[0]}, ${ends}`,
      },
      drawing("line", { class: "base", x1: 0, x2: WIDTH, y1: y(0), y2: y(0) }),
    );
    if (goal !== undefined) {
      svg.append(drawing("line", { class: "goal", x1: 0, x2: WIDTH, y1: y(goal), y2: y(goal) }));
    }
    svg.append(mark, drawing("path", { class: "curve", d: path.join("") }));
    if (points.length < 30) {
      for (const [s, v] of points) {
        svg.append(drawing("circle", { class: "point", r: 1.7, cx: this.x(s), cy: y(v) }));
      }
    }
    svg.append(dot);
    const value = element("b", {});
    const teacher = key === "accuracy" && goal !== undefined;
    const range = teacher ? `teacher ${share(goal)}` : `up to ${text(Math.max(...values))}`;
    const head = [element("span", {}, name), element("i", {}, range), value];
    const figure = element("figure", {}, element("figcaption", {}, ...head), svg);
    return { figure, svg, mark, dot, value, points, text, y };
  }

  // Return the value at the step, or at the last earlier step that has one.
  mark(step) {
    for (const { mark, dot, value, points, text, y } of this.charts) {
      const before = points.filter(([s]) => s <= step).at(-1);
      mark.setAttribute("x1", this.x(step));
      mark.setAttribute("x2", this.x(step));
      dot.toggleAttribute("hidden", !before);
      if (before) {
        dot.setAttribute("cx", this.x(before[0]));
        dot.setAttribute("cy", y(before[1]));
      }
      const late = before && before[0] !== step ? ` at ${before[0]}` : "";
      value.textContent = before ? text(before[1]) + late : "\u2013";
    }
  }
}
