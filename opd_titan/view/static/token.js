// The details of one token.

const ROLES = [
  ["student", "Student"],
  ["teacher", "Teacher"],
  ["reference", "Reference"],
];

function roleRow(data, t, [role, name]) {
  const logprobs = data.logprobs[role];
  const ranks = data.ranks[role];
  if (!logprobs && !ranks) return null;
  const logprob = logprobs ? logprobs[t] : null;
  return element(
    "tr",
    { "data-role": role },
    element("th", { scope: "row" }, name),
    element("td", {}, nats(logprob)),
    element("td", {}, percent(logprob)),
    element("td", {}, ranks && ranks[t] !== null ? `#${ranks[t].toLocaleString("en")}` : "\u2013"),
  );
}

function alternatives(data, t) {
  if (!data.top?.[t]?.length) return [];
  const items = data.top[t].map(([text, logprob]) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${100 * Math.exp(logprob ?? -Infinity)}%`;
    const own = text === data.pieces[t];
    return element(
      "li",
      { class: own ? "own" : null },
      bar,
      element("code", {}, inOneLine(text)),
      element("span", {}, percent(logprob)),
      element("span", {}, nats(logprob, 2)),
    );
  });
  return [element("h3", {}, "The teacher's most likely tokens"), element("ol", {}, ...items)];
}

function gapText(gap) {
  if (gap === null) return "No gap: a log-prob is missing";
  const who = gap > 0 ? "more likely under the student" : "more likely under the teacher";
  const times = Math.exp(Math.abs(gap));
  const factor = times < 10 ? times.toFixed(1) : Math.round(times).toLocaleString("en");
  const often = times < 1e6 ? `${factor}\u00d7` : "over a million times";
  return Math.abs(gap) < LEVELS[0] ? "about as likely under both" : `${often} ${who}`;
}

function drawToken(box, data, t) {
  if (t === null || !data) {
    const hint = "Point at a token, or use \u2190 and \u2192, to see its log-prob and rank under each model.";
    box.replaceChildren(element("p", { class: "hint" }, hint));
    return;
  }
  const text = data.pieces[t];
  const part = text === "" ? "part of a character" : inOneLine(text);
  const gap = data.gaps[t];
  const advantage = data.advantages ? data.advantages[t] : null;
  box.replaceChildren(
    element(
      "h2",
      {},
      element("code", { class: `big ${shade(gap)}` }, data.named ? part : `token id ${text}`),
      element("small", {}, `token ${t + 1} of ${data.pieces.length}`),
    ),
    element(
      "table",
      {},
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          ...["", "log-prob", "prob.", "rank"].map((name) => element("th", { scope: "col" }, name)),
        ),
      ),
      element("tbody", {}, ...ROLES.map((role) => roleRow(data, t, role))),
    ),
    element(
      "p",
      { class: "gap" },
      element("b", {}, gap === null ? "\u2013" : signed(gap)),
      element("span", {}, gapText(gap)),
      element("b", {}, advantage === null ? "\u2013" : signed(advantage)),
      element("span", {}, "advantage"),
    ),
    ...alternatives(data, t),
  );
}
