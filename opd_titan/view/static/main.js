// The state of the page, and the updates when it changes.

async function start() {
  const { run, steps, curves, rollouts: index } = await unpack("index");
  const count = index.step.length;
  const state = { step: steps.at(-1) ?? null, sort: "kl", query: "", at: null };
  let searched = null; // lower-case texts, after the first use of the filter

  document.title = `${run.name}: rollouts`;
  byId("run-name").textContent = run.name;
  const models = run.teacher ? `${run.teacher} \u2192 ${run.student ?? "student"}` : run.student;
  const about = [run.description, models, run.objective].filter(Boolean).join("  \u00b7  ");
  byId("run-about").textContent = about;
  drawLegend(byId("legend"));

  const list = new List(byId("list"), (i) => drawRow(index, i), (place) => choose(place));
  const answer = new Answer(byId("answer"), byId("strip"), (t) =>
    drawToken(byId("token"), answer.data, t),
  );
  const charts = new Curves(byId("curves"), curves, (step) => {
    const near = (a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a);
    setStep(steps.reduce(near));
  });
  const stepBox = byId("step");
  stepBox.append(element("option", { value: "all" }, `all ${steps.length} steps`));
  for (const step of steps) stepBox.append(element("option", { value: step }, `step ${step}`));

  async function fill(keep = null) {
    const { step, sort, query } = state;
    if (query && !searched) {
      const { prompts, responses } = await unpack("texts");
      const lower = prompts.map((text, q) => `${index.sets[q]} ${text}`.toLowerCase());
      const own = responses.map((text) => text.toLowerCase());
      searched = (i, words) =>
        words.every((word) => lower[index.question[i]].includes(word) || own[i].includes(word));
      if (query !== state.query) return; // the filter has changed meanwhile
    }
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    let ids = [];
    for (let i = 0; i < count; i++) {
      if (step !== null && index.step[i] !== step) continue;
      if (!words.length || searched(i, words)) ids.push(i);
    }
    ids = sorted(index, ids, sort);
    list.fill(ids);
    const of = count.toLocaleString("en");
    byId("count").textContent = `${ids.length.toLocaleString("en")} of ${of} rollouts`;
    const place = keep === null ? -1 : ids.indexOf(keep);
    await choose(place >= 0 ? place : ids.length ? 0 : -1);
  }

  async function choose(place) {
    list.choose(place);
    const i = list.items[place] ?? null;
    state.at = i;
    byId("rollout").classList.toggle("nothing", i === null);
    if (i === null) return answer.show({ pieces: [], gaps: [], response: null });
    byId("rollout").setAttribute("aria-busy", "true");
    const data = await rollout(index, i);
    if (state.at !== i) return; // the selection has changed meanwhile
    drawFacts(data, i);
    byId("prompt").textContent = visible(data.prompt);
    answer.show(data);
    drawSame(i);
    charts.mark(index.step[i]);
    byId("rollout").setAttribute("aria-busy", "false");
    try {
      history.replaceState(null, "", `#${index.step[i]}-${index.prompt[i]}-${index.sample[i]}`);
    } catch {
      // Some browsers do not allow this for pages from disk. Then there are only no bookmarks.
    }
  }

  function drawFacts(data, i) {
    const fact = (name, value, kind) =>
      element("span", { class: `fact ${kind ?? ""}` }, element("i", {}, name), value);
    const [kind, sign, name] = index.correct[i] === null ? [] : gradeOf(index.correct[i]);
    const grade = kind === "partial" ? name : `${sign} ${name}`;
    const end = `${index.cut[i] ? "truncated" : visible(data.finish)}, ${index.tokens[i]} tokens`;
    byId("facts").replaceChildren(
      fact("step", String(index.step[i])),
      fact("prompt", String(index.prompt[i])),
      fact("sample", String(index.sample[i])),
      ...(index.sets[index.question[i]] ? [fact("data", index.sets[index.question[i]])] : []),
      fact("KL", nats(index.kl[i])),
      fact("finish", end, index.cut[i] ? "bad" : ""),
      fact(
        "grade",
        kind === undefined ? "not graded" : grade,
        { right: "good", wrong: "bad" }[kind],
      ),
      ...(data.answer === null ? [] : [fact("gold", visible(data.answer))]),
      ...(data.logprobs.student ? [] : [fact("written by", "the data set")]),
    );
  }

  function sameAs(i) {
    const found = [];
    for (let j = 0; j < count; j++) if (index.question[j] === index.question[i]) found.push(j);
    return found;
  }

  function drawSame(i) {
    const found = sameAs(i);
    const button = (j) =>
      element(
        "button",
        {
          type: "button",
          "data-i": j,
          "aria-current": j === i ? "true" : null,
          title: `step ${index.step[j]}, sample ${index.sample[j]}`,
          "aria-label": `step ${index.step[j]}, sample ${index.sample[j]}, KL ${nats(index.kl[j])}`,
        },
        element("span", {}, `${index.step[j]}.${index.sample[j]}`),
        meter(index, j),
        element("span", { class: "kl" }, nats(index.kl[j])),
        badge(index.correct[j]),
      );
    byId("same-list").replaceChildren(...found.map(button));
    byId("same").hidden = found.length < 2;
    byId("same-list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  }

  // Select a rollout. If the list does not contain it, show the list of its step.
  function goTo(i) {
    const place = list.items.indexOf(i);
    if (place >= 0) return choose(place);
    state.query = byId("filter").value = "";
    state.step = index.step[i];
    stepBox.value = String(state.step);
    return fill(i);
  }

  function setStep(step) {
    state.step = step;
    stepBox.value = step === null ? "all" : String(step);
    return fill();
  }

  function moveStep(by) {
    const now = state.step ?? (state.at === null ? steps[0] : index.step[state.at]);
    const place = steps.indexOf(now) + by;
    if (steps[place] !== undefined) setStep(steps[place]);
  }

  function moveSame(by) {
    if (state.at === null) return;
    const found = sameAs(state.at);
    const next = found[found.indexOf(state.at) + by];
    if (next !== undefined) goTo(next);
  }

  const move = (by) => {
    const place = list.chosen + by;
    if (place >= 0 && place < list.items.length) choose(place);
  };
  const keys = {
    j: () => move(1),
    k: () => move(-1),
    ArrowLeft: () => answer.move(-1),
    ArrowRight: () => answer.move(1),
    n: () => answer.leap(1),
    N: () => answer.leap(-1),
    "[": () => moveSame(-1),
    "]": () => moveSame(1),
    ",": () => moveStep(-1),
    ".": () => moveStep(1),
    "/": () => byId("filter").select(),
    "?": () => byId("help").showModal(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const inList = event.target === byId("list");
    const steer = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const act = inList && steer ? () => move(steer) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  byId("step-before").addEventListener("click", () => moveStep(-1));
  byId("step-after").addEventListener("click", () => moveStep(1));
  byId("open-help").addEventListener("click", () => byId("help").showModal());
  byId("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    answer.drawStrip();
  });
  byId("same-list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) goTo(Number(button.dataset.i));
  });
  stepBox.addEventListener("change", () => {
    setStep(stepBox.value === "all" ? null : Number(stepBox.value));
  });
  byId("sort").addEventListener("change", (event) => {
    state.sort = event.target.value;
    fill(state.at);
  });
  byId("filter").addEventListener("input", (event) => {
    state.query = event.target.value.trim();
    fill(state.at);
  });

  const wanted = /^#(\d+)-(\d+)-(\d+)$/.exec(location.hash)?.slice(1).map(Number);
  const found = wanted
    ? index.step.findIndex(
        (step, i) => [step, index.prompt[i], index.sample[i]].join() === wanted.join(),
      )
    : -1;
  if (found >= 0) state.step = index.step[found];
  stepBox.value = String(state.step);
  byId("sort").value = state.sort;
  byId("filter").value = "";
  await fill(found >= 0 ? found : null);
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  byId("run-about").textContent =
    typeof DecompressionStream === "undefined"
      ? "This browser is too old: it has no DecompressionStream."
      : `This page is damaged: ${error.message}`;
  console.error(error);
});
