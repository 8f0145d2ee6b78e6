"use strict";
// Everything a model wrote goes through visible() and textContent, never through markup.

const NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u007f": "␡"};
const UNSEEN = /[\p{C}\u2028\u2029]/gu;

/** Control, bidi and zero-width characters, each as something to see. */
function visible(text, keep = "") {
  return String(text).replace(UNSEEN, character => {
    const code = character.codePointAt(0);
    if (keep.includes(character)) return character;
    if (character in NAMED) return NAMED[character];
    return code < 32 ? String.fromCodePoint(0x2400 + code) : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
  });
}

const byId = id => document.getElementById(id);
const foreign = member => member.author.some(author => author !== "policy");
const figure = value => String(Number(value.toPrecision(4))).replace("-", "−");
const loaded = new Map();
const words = {gradient_weight: "gradient weight", advantage: "advantage", judged: "judge’s score"};
let runs = [];
let shown;

function element(name, classes, text, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

/** The problems of a run and step, unpacked when first asked for. */
async function load(run, step) {
  const id = `samples-${run}-${step}`;
  if (!loaded.has(id)) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), character => character.charCodeAt(0));
    loaded.set(id, await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json());
  }
  return loaded.get(id);
}

/** Fills a list and keeps what was chosen, if it is still there; else chooses `otherwise`. */
function fill(list, options, otherwise) {
  const before = list.value;
  list.replaceChildren(...options.map(([value, text]) => new Option(visible(text), value)));
  list.value = options.some(([value]) => String(value) === before) ? before : otherwise;
}

/** How the policy's own rollouts ended, and whether the group was given anything else. */
function outcome(problem) {
  const rollouts = problem.members.filter(member => !foreign(member));
  if (!rollouts.length) return "nothing sampled";
  const count = word => rollouts.filter(member => verdict(member) === word).length;
  const unverified = count("unverified") ? `, ${count("unverified")} unverified` : "";
  return `${count("correct")} of ${rollouts.length} rollouts correct${unverified}${rollouts.length < problem.members.length ? ", guided" : ""}`;
}

const learned = problem => problem.members.some(member => member.gradient_weight.length);
/** The last step that anything was learned from: it shows what the policy has come to, and tokens with weights to look at. */
const opening = run => (run.steps.filter(([, signal]) => signal).pop() || run.steps[run.steps.length - 1])[0];

async function choose() {
  const run = runs.find(entry => String(entry.run) === byId("run").value);
  fill(byId("step"), run.steps.map(([step, signal]) => [step, signal ? step : `${step} (no signal)`]), opening(run));
  const step = byId("step").value;
  const problems = await load(run.run, step);
  if (byId("run").value !== String(run.run) || byId("step").value !== step) return;  // another was chosen meanwhile
  const ids = problems.map((problem, place) => `${place} ${problem.id}`);
  fill(byId("problem"), problems.map((problem, place) => [ids[place], `${problem.id}: ${outcome(problem)}`]), ids[Math.max(0, problems.findIndex(learned))]);
  show(problems[ids.indexOf(byId("problem").value)]);
}

function show(problem) {
  const rows = [["Prompt", problem.prompt], ["Answer", problem.answer], ["Plan", problem.plan]].filter(([, text]) => text != null);
  const question = element("div", "question", "", element("dl", "", "", ...rows.flatMap(([name, text]) => [
    element("dt", "", name), element("dd", "", visible(text, "\n"))])));
  const counts = {};
  const cards = problem.members.map(member => {
    const kind = kindOf(member);
    counts[kind] = (counts[kind] || 0) + 1;
    return card(member, `${kind} ${counts[kind]}`);
  });
  byId("shown").replaceChildren(question, ...cards);
  shown = problem;
  shade();
}

function kindOf(member) {
  if (member.role === "imitated") return "Imitated trajectory";
  if (!foreign(member)) return "Rollout";
  if (member.author.includes("policy")) return "Repaired rollout";
  return member.author.includes("replay") ? "Replayed answer" : "Reference in the group";
}

/** All members of the group are sent to the verifier, imitated trajectories by some methods only. */
function verdict(member) {
  if (member.correct == null) return member.role === "imitated" ? "not graded" : "unverified";
  return member.correct ? "correct" : "wrong";
}

function card(member, name) {
  const reward = member.correct == null ? "" : `reward ${figure(member.reward)}`;
  const facts = [verdict(member), reward, member.finished ? "" : "cut off", `${member.tokens.length} tokens`];
  if (new Set(member.advantage).size === 1 && member.advantage[0]) facts.push(`advantage ${figure(member.advantage[0])}`);
  if (!member.gradient_weight.length) facts.push("no signal");
  const spans = member.tokens.map((text, place) => element("span", `token ${member.author[place]}`, visible(text).replace(/^ +$/, "␣")));
  const tokens = element("div", "tokens", "", ...spans.flatMap((span, place) => member.tokens[place].endsWith("\n") ? [span, element("br")] : [span]));
  const readout = element("p", "readout");
  tokens.tabIndex = 0;
  tokens.setAttribute("role", "group");
  tokens.setAttribute("aria-label", `Tokens of ${name}; the arrow keys move from one to the next`);
  readout.setAttribute("aria-live", "polite");
  let current = -1;
  const select = place => {
    spans[current]?.classList.remove("current");
    current = place;
    spans[current].classList.add("current");
    readout.textContent = describe(member, place);
  };
  tokens.addEventListener("keydown", event => {
    const last = spans.length - 1;
    const moves = {ArrowRight: current + 1, ArrowLeft: current - 1, ArrowDown: current + 10, ArrowUp: current - 10, Home: 0, End: last};
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    select(Math.max(0, Math.min(last, moves[event.key])));
  });
  tokens.addEventListener("pointerover", event => {
    if (spans.includes(event.target)) select(spans.indexOf(event.target));
  });
  const heading = element("h3", "", name, element("span", "", facts.filter(Boolean).join(" · ")));
  const hint = member.hint ? [element("p", "hint", `Sampled with this hint in the prompt, trained without it: ${visible(member.hint, "\n")}`)] : [];
  return element("article", "trajectory", "", heading, ...hint, tokens, readout);
}

function describe(member, place) {
  const values = ["gradient_weight", "advantage", "judged"].filter(name => member[name]?.[place] != null).map(name => `${name.replace("_", " ")} ${figure(member[name][place])}`);
  const taught = member.targets ? [`trained to predict “${visible(member.targets[place])}”`] : [];
  return [`Token ${place + 1} of ${member.tokens.length}: “${visible(member.tokens[place])}”`, member.author[place], ...taught, ...values].join(" · ");
}

/** Colors the tokens of the problem that is shown: strength from 0 to 1, and a sign. */
function shade() {
  const name = document.querySelector("[name=shade]:checked").value;
  const all = shown.members.flatMap(member => member[name] || []).filter(value => value != null);
  const most = all.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  document.querySelectorAll(".tokens").forEach((tokens, index) => {
    const values = shown.members[index][name] || [];
    tokens.querySelectorAll(".token").forEach((token, place) => {
      const value = values[place];
      const strength = value == null ? 0 : name === "judged" ? 2 * value - 1 : value / (most || 1);
      token.classList.toggle("positive", strength > 0);
      token.classList.toggle("negative", strength < 0);
      token.style.setProperty("--value", Math.abs(strength));
    });
  });
  byId("scale").replaceChildren(...name === "none" ? [] : legend(name, all, most));
}

/** What the shades mean: a ramp between the least and the greatest value. */
function legend(name, all, most) {
  if (!all.length) return [`No token shown has a ${words[name]}.`];
  if (name === "judged") return [`${words[name]}: 0 (wrong) `, element("span", "ramp"), " 1 (right)"];
  if (!most) return [`Every ${words[name]} shown is 0.`];
  const signed = all.some(value => value < 0);
  return [`${words[name]}: ${signed ? figure(-most) : 0} `, element("span", signed ? "ramp" : "ramp unsigned"), ` ${figure(most)}`];
}

document.addEventListener("DOMContentLoaded", () => {
  runs = JSON.parse(byId("index").textContent);
  if (!runs.length) return;
  fill(byId("run"), runs.map(entry => [entry.run, entry.label]), (runs.find(entry => entry.steps.some(([, signal]) => signal)) || runs[0]).run);
  for (const id of ["run", "step", "problem"]) byId(id).addEventListener("change", choose);
  for (const radio of document.querySelectorAll("[name=shade]")) radio.addEventListener("change", shade);
  choose();
});
