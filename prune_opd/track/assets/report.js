// The report's only script: charts that open large, and the rollout viewer. Texts become text, never markup.
"use strict";

// ------------------------------------------------------------------------------------------------- charts

const dialog = document.createElement("dialog");
const heading = document.createElement("h3");
const large = document.createElement("img");
dialog.append(heading, large);
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
for (const image of document.querySelectorAll("figure img")) {
  image.addEventListener("click", () => {
    large.src = image.src;
    heading.textContent = large.alt = image.alt;
    dialog.showModal();
  });
}

// ------------------------------------------------------------------------------------------------- viewer

const COLOURS = {
  overlap: { rgb: "217,119,6", low: "0: no token shared", high: "1: all shared", share: (v) => 1 - v, flip: true },
  weight: { rgb: "0,114,178", low: "0: not trained on", high: "", share: (v, top) => (top ? v / top : 0) },
  divergence: { rgb: "178,60,120", low: "0", high: "3 nats or more", share: (v) => Math.min(Math.max(v, 0) / 3, 1) },
};
const ENDINGS = {
  finished: ["✓ ended by itself", "ended by itself"],
  horizon: ["▐ horizon", "cut by the horizon"],
  stopped: ["■ stopped in flight", "stopped in flight"],
};

const ending = (sample) => (sample.stopped ? "stopped" : sample.finished ? "finished" : "horizon");
const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits));
const mean = (values) => {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
};

const most = (values, least = 0) => values.reduce((top, value) => (value !== null && value > top ? value : top), least);

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function startViewer(viewer, runs) {
  const part = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const [runBox, stepBox, colourBox, endingBox, search] = ["run", "step", "colour", "ending", "search"].map(part);
  // Of the response that is drawn: its drift events as a set, and its largest weight.
  const state = { samples: [], chosen: 0, token: null, events: new Set(), heaviest: 0 };

  const matches = (sample) => {
    const wanted = search.value.toLowerCase();
    if (endingBox.value === "events" && !sample.events.length) return false;
    if (!["any", "events"].includes(endingBox.value) && ending(sample) !== endingBox.value) return false;
    return !wanted || (sample.prompt + "\n" + sample.tokens.join("")).toLowerCase().includes(wanted);
  };
  const ofRun = () => runs[Number(runBox.value)].samples.filter(matches);

  // The filters decide which steps there are; the step which responses; a response what is drawn.
  function fillSteps() {
    const before = stepBox.value;
    const steps = [...new Set(ofRun().map((sample) => sample.step))];
    stepBox.replaceChildren(...steps.map((step) => new Option(String(step), String(step))));
    if (steps.map(String).includes(before)) stepBox.value = before;
    fillResponses();
  }

  function fillResponses() {
    state.samples = ofRun().filter((sample) => String(sample.step) === stepBox.value);
    choose(0);
  }

  function choose(index) {
    state.chosen = Math.max(0, Math.min(index, state.samples.length - 1));
    state.token = null;
    state.events = new Set(state.samples[state.chosen]?.events);
    state.heaviest = most(state.samples[state.chosen]?.weight ?? []);
    part("responses").replaceChildren(
      ...state.samples.map((sample, i) => {
        const button = element("button", `row ${sample.row} · ${sample.source} #${sample.problem}`);
        const told = [`${sample.tokens.length} tokens`, `overlap ${number(mean(sample.overlap))}`];
        told.push(`${sample.events.length} events`, ENDINGS[ending(sample)][1]);
        button.append(element("small", told.join(", ")));
        button.setAttribute("role", "tab");
        button.setAttribute("aria-selected", String(i === state.chosen));
        button.addEventListener("click", () => {
          choose(i); // makes new buttons, and the keys must still arrive
          viewer.focus({ preventScroll: true });
        });
        return button;
      }),
    );
    draw();
  }

  function draw() {
    const sample = state.samples[state.chosen];
    const text = part("text");
    text.replaceChildren();
    part("detail").textContent = sample ? "Click a token, or a bar, for its numbers." : "No sampled response matches.";
    drawLegend();
    drawStrip(sample);
    if (!sample) return;
    text.append(element("span", sample.prompt + "\n", "prompt"));
    if (sample.teacher_prompt)
      text.append(element("span", "The teacher reads: " + sample.teacher_prompt + "\n", "prompt"));
    const found = foundTokens(sample);
    sample.tokens.forEach((token, i) => {
      if (i === sample.reliable_length) text.append(element("span", `✂ reliability 0 after ${i} tokens`, "cut"));
      const span = element("span", token, "token");
      span.style.backgroundColor = colourOf(sample, i);
      span.title = describe(sample, i);
      span.dataset.index = String(i);
      if (state.events.has(i)) span.classList.add("event");
      if (sample.reliable_length !== null && i >= sample.reliable_length) span.classList.add("after");
      if (found.has(i)) span.classList.add("found");
      span.addEventListener("click", () => look(i));
      text.append(span);
    });
    const more = { stopped: `, ${sample.dropped} tokens dropped`, horizon: ` of ${sample.horizon} tokens` };
    text.append(element("span", ENDINGS[ending(sample)][0] + (more[ending(sample)] ?? ""), "cut"));
    text.querySelector(".found")?.scrollIntoView({ block: "nearest" });
  }

  function foundTokens(sample) {
    const wanted = search.value.toLowerCase();
    const found = new Set();
    if (!wanted) return found;
    const whole = sample.tokens.join("").toLowerCase();
    const owner = sample.tokens.flatMap((token, i) => Array(token.length).fill(i));
    for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + 1)) {
      for (let i = at; i < at + wanted.length; i++) found.add(owner[i]);
    }
    return found;
  }

  function colourOf(sample, i) {
    const { rgb, share } = COLOURS[colourBox.value];
    const value = sample[colourBox.value][i];
    return value === null ? "transparent" : `rgba(${rgb},${(0.85 * share(value, state.heaviest)).toFixed(3)})`;
  }

  function describe(sample, i) {
    const parts = [`token ${i + 1} of ${sample.tokens.length}`, `overlap ${number(sample.overlap[i])}`];
    parts.push(`weight ${number(sample.weight[i])}`, `divergence ${number(sample.divergence[i], 3)} nats`);
    if (state.events.has(i)) parts.push("drift event");
    if (sample.reliable_length !== null && i >= sample.reliable_length) parts.push("after the cut");
    return parts.join(" · ");
  }

  function look(i) {
    const sample = state.samples[state.chosen];
    if (!sample || i < 0 || i >= sample.tokens.length) return;
    state.token = i;
    viewer.querySelector(".chosen")?.classList.remove("chosen");
    const span = viewer.querySelector(`.token[data-index="${i}"]`);
    span.classList.add("chosen");
    const box = part("text");
    box.scrollTop = span.offsetTop - box.offsetTop - box.clientHeight / 2;
    part("detail").textContent = `“${sample.tokens[i]}” · ${describe(sample, i)}`;
  }

  function drawLegend() {
    const { rgb, low, high, flip } = COLOURS[colourBox.value];
    const [from, to] = flip ? [0.85, 0] : [0, 0.85];
    part("scale").style.background = `linear-gradient(90deg, rgba(${rgb},${from}), rgba(${rgb},${to}))`;
    part("low").textContent = low;
    part("high").textContent = colourBox.value === "weight" ? number(state.heaviest) : high;
  }

  // One bar a token, as high as what colours the text; events below; the cut as a line.
  function drawStrip(sample) {
    const canvas = part("strip");
    const [width, height] = [(canvas.width = 2 * canvas.clientWidth), (canvas.height = 2 * canvas.clientHeight)];
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!sample) return;
    const style = getComputedStyle(viewer);
    const [ink, event, muted] = ["--ink", "--event", "--muted"].map((name) => style.getPropertyValue(name));
    const values = sample[colourBox.value];
    const top = most(values, 1);
    const each = width / Math.max(sample.tokens.length, sample.horizon);
    const floor = height - 14;
    values.forEach((value, i) => {
      if (value === null) return;
      context.fillStyle = muted;
      context.globalAlpha = 0.55;
      const bar = Math.max(2, (floor * Math.max(value, 0)) / top);
      context.fillRect(i * each, floor - bar, Math.max(1, each - (each > 4 ? 1 : 0)), bar);
    });
    context.globalAlpha = 1;
    context.fillStyle = event;
    for (const i of sample.events) context.fillRect(i * each, floor + 3, Math.max(2, each - 1), 11);
    context.fillStyle = ink;
    if (sample.reliable_length !== null && sample.reliable_length < sample.tokens.length) {
      context.fillRect(sample.reliable_length * each - 2, 0, 4, height);
    }
    context.globalAlpha = 0.35;
    context.fillRect(0, floor, width, 1);
  }

  function move(box, by) {
    box.selectedIndex = Math.max(0, Math.min(box.options.length - 1, box.selectedIndex + by));
    fillResponses();
  }

  function nextEvent() {
    const sample = state.samples[state.chosen];
    const after = sample?.events.filter((i) => i > (state.token ?? -1)) ?? [];
    if (after.length) look(after[0]);
    else if (sample?.events.length) look(sample.events[0]);
  }

  const keys = {
    ArrowLeft: () => move(stepBox, -1),
    ArrowRight: () => move(stepBox, 1),
    ArrowUp: () => choose(state.chosen - 1),
    ArrowDown: () => choose(state.chosen + 1),
    e: nextEvent,
  };
  viewer.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
    viewer.focus({ preventScroll: true });
  });
  part("previous").addEventListener("click", () => move(stepBox, -1));
  part("next").addEventListener("click", () => move(stepBox, 1));
  part("event").addEventListener("click", nextEvent);
  part("strip").addEventListener("click", (event) => {
    const sample = state.samples[state.chosen];
    const longest = sample ? Math.max(sample.tokens.length, sample.horizon) : 0;
    look(Math.floor((event.offsetX / event.target.clientWidth) * longest));
  });
  runBox.replaceChildren(...runs.map((run, i) => new Option(run.name, String(i))));
  runBox.parentElement.hidden = runs.length < 2;
  runBox.addEventListener("change", fillSteps);
  stepBox.addEventListener("change", fillResponses);
  colourBox.addEventListener("change", () => choose(state.chosen));
  endingBox.addEventListener("change", fillSteps);
  search.addEventListener("input", fillSteps);
  window.addEventListener("resize", () => drawStrip(state.samples[state.chosen]));
  fillSteps();
}

const data = document.getElementById("rollouts");
if (data) startViewer(document.querySelector(".viewer"), JSON.parse(data.textContent));
