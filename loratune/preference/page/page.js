// The voting page. It holds no state of its own: every reply of the server says what to show next.
"use strict";

const byId = (id) => document.getElementById(id);
const KEYS = {
  a: "left", 1: "left", ArrowLeft: "left", b: "right", 2: "right", ArrowRight: "right", t: "tie", 3: "tie", n: "neither", 4: "neither",
};
const WORDS = { left: "A is better", right: "B is better", tie: "tie", neither: "both bad" };
let rater = new URLSearchParams(location.search).get("rater") || "";
let question = null;
let busy = false;

async function ask(what, body) {
  // One request at a time, so that a key held down votes once. Returns whether the server did it.
  if (busy) return false;
  busy = true;
  try {
    const reply = await fetch("/api/" + what, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ rater, ...body }),
    });
    const content = await reply.json();
    if (!reply.ok) throw new Error(content.detail);
    byId("alert").hidden = true;
    show(content);
    return true;
  } catch (error) {
    const lost = error instanceof TypeError; // fetch's own: nobody answers
    fail(lost ? "The server does not answer. Please vote again in a moment: nothing is lost, and nothing counts twice." : error.message);
    return false;
  } finally {
    busy = false;
  }
}

function fail(reason) {
  byId("alert").hidden = false;
  byId("alert").textContent = reason;
}

function show(state) {
  rater = state.rater;
  question = state.question;
  history.replaceState(null, "", "/?rater=" + encodeURIComponent(rater));
  byId("rater").textContent = rater;
  byId("count").textContent = `${state.done} of ${state.total} voted`;
  byId("progress").max = state.total;
  byId("progress").value = state.done;
  byId("undo").disabled = state.done === 0;
  byId("begin").hidden = true;
  byId("standing").hidden = byId("tools").hidden = false;
  byId("vote").hidden = byId("ballot").hidden = question === null;
  byId("done").hidden = question !== null;
  if (question === null) {
    byId("summary").textContent = `You voted on all ${state.total} questions.`;
    byId("thanks").focus();
    return;
  }
  byId("heading").textContent = `Question ${state.done + 1} of ${state.total}` + (question.category ? ` · ${question.category}` : "");
  byId("instruction").textContent = question.instruction;
  byId("about").hidden = !question.input;
  byId("input").textContent = question.input;
  for (const side of ["left", "right"]) {
    byId(side).textContent = state[side].text || "(an empty answer)";
    byId(side + "-cut").hidden = !state[side].cut;
  }
  window.scrollTo(0, 0);
  byId("heading").focus({ preventScroll: true });
}

async function vote(choice) {
  if (question !== null && await ask("vote", { question: question.id, choice })) say(`Stored: ${WORDS[choice]}. ${byId("count").textContent}.`);
}

async function undo() {
  if (!byId("undo").disabled && await ask("undo", {})) say(`Your last vote was taken back. ${byId("count").textContent}.`);
}

function say(words) {
  byId("status").textContent = words;
}

for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => vote(button.dataset.choice));
byId("undo").addEventListener("click", undo);

byId("who").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = byId("name").value.trim();
  if (rater) ask("state", {});
  else fail("Please give a name.");
});

byId("keys").checked = localStorage.getItem("keys") !== "off";
byId("keys").addEventListener("change", () => localStorage.setItem("keys", byId("keys").checked ? "on" : "off"));

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox])");
  if (typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey || !byId("keys").checked || !rater) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (KEYS[key] && question !== null) {
    event.preventDefault();
    vote(KEYS[key]);
  } else if (key === "u") {
    undo();
  }
});

if (rater) {
  ask("state", {}).then((known) => { if (!known) byId("begin").hidden = false; });
} else {
  byId("begin").hidden = false;
  byId("name").focus();
}
