"use strict";
// The page of a served program: a form made of its fields, its answer, who gave it, and what is known of it.

const at = (id) => document.getElementById(id);
let token = "";
let program = null;

function made(tag, text, attributes) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  return element;
}

function drawn(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

async function asked(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const settings = { headers, method: body === undefined ? "GET" : "POST" };
  if (body !== undefined) settings.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, settings);
  } catch {
    throw { message: "The server can’t be reached.", status: 0 };
  }
  const told = await response.json().catch(() => ({ error: { message: `Status ${response.status}.` } }));
  if (!response.ok) throw { ...told.error, status: response.status };
  return told;
}

function complain(problem) {
  at("problem").textContent = problem ? problem.message : "";
  at("problem").hidden = !problem;
}

async function begin() {
  complain(null);
  try {
    program = await asked("program");
  } catch (problem) {
    at("open").hidden = problem.status !== 401;
    if (problem.status !== 401 || token) complain(problem);
    if (problem.status === 401) at("token").focus();
    return;
  }
  at("open").hidden = true;
  at("program").hidden = false;
  if (token) at("document").removeAttribute("href"); // a link can't carry it
  showFields();
  showProgram();
  showCommand();
}

function showProgram() {
  document.title = program.name;
  at("name").textContent = program.name;
  at("about").textContent = `${program.module} on ${program.lm}, version ${program.digest}`;
  at("base").textContent = new URL("v1", location.href).href;
  at("model").textContent = program.name;
  showInstructions(null);
  showEvidence(program.evidence);
}

// The form.

function resolved(schema) {
  if (!schema.$ref) return schema;
  return program.inputs.$defs[schema.$ref.split("/").pop()];
}

function choices(schema) {
  return schema.enum || ("const" in schema ? [schema.const] : null);
}

function kind(schema) {
  const options = (schema.anyOf || [schema]).map(resolved).filter((each) => each.type !== "null");
  if (options.length !== 1) return { type: "any" };
  return choices(options[0]) ? { type: "choice", of: choices(options[0]) } : { type: options[0].type || "any" };
}

function control(name, schema) {
  const it = kind(schema);
  if (it.type === "choice") {
    const select = made("select");
    select.append(made("option", "", { value: "" }));
    it.of.forEach((each, index) => select.append(made("option", String(each), { value: index })));
    return select;
  }
  if (it.type === "boolean") return made("input", null, { type: "checkbox" });
  if (it.type === "integer" || it.type === "number") {
    return made("input", null, { type: "number", step: it.type === "integer" ? "1" : "any" });
  }
  return made("textarea", null, { rows: "3", spellcheck: it.type === "string" ? "true" : "false" });
}

function showFields() {
  const needed = new Set(program.inputs.required || []);
  at("fields").replaceChildren(
    ...Object.entries(program.inputs.properties).map(([name, schema]) => {
      const id = `field-${name}`;
      const it = kind(schema).type;
      const label = made("label", name, { for: id });
      const hints = [schema.description, needed.has(name) ? "" : "May be left empty.", ["array", "object", "any"].includes(it) ? "As JSON." : ""];
      const hint = hints.filter(Boolean).join(" ");
      const input = control(name, schema);
      input.id = id;
      input.name = name;
      if (needed.has(name) && it !== "boolean") input.setAttribute("aria-required", "true");
      if (hint) {
        label.append(made("span", hint, { class: "hint", id: `${id}-hint` }));
        input.setAttribute("aria-describedby", `${id}-hint`);
      }
      const field = made("div", null, { class: "field" });
      field.append(label, input, made("p", "", { class: "wrong", id: `${id}-wrong`, hidden: "" }));
      input.addEventListener("input", showCommand);
      return field;
    }),
  );
}

function value(name, schema, input) {
  const it = kind(schema);
  if (it.type === "boolean") return input.checked;
  if (input.value === "") return it.type === "string" && (program.inputs.required || []).includes(name) ? "" : undefined;
  if (it.type === "choice") return it.of[Number(input.value)];
  if (it.type === "integer" || it.type === "number") return Number(input.value);
  if (it.type === "string") return input.value;
  try {
    return JSON.parse(input.value);
  } catch {
    return input.value;
  }
}

function given() {
  const row = {};
  for (const [name, schema] of Object.entries(program.inputs.properties)) {
    const found = value(name, schema, at(`field-${name}`));
    if (found !== undefined) row[name] = found;
  }
  return row;
}

function blame(problem) {
  const names = Object.keys(program.inputs.properties);
  const name = problem && problem.param ? problem.param.split(".")[0] : null;
  for (const each of names) {
    const wrong = at(`field-${each}-wrong`);
    wrong.hidden = each !== name;
    wrong.textContent = each === name ? problem.message : "";
    const input = at(`field-${each}`);
    if (each === name) {
      input.setAttribute("aria-invalid", "true");
      input.setAttribute("aria-errormessage", wrong.id);
      input.focus();
    } else {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-errormessage");
    }
  }
  return names.includes(name);
}

function showCommand() {
  const row = JSON.stringify(given()).replaceAll("'", "'\\''");
  const secret = token ? " \\\n  -H \"Authorization: Bearer $PRECEPTOR_TOKEN\"" : "";
  at("curl").textContent = `curl ${new URL("predict", location.href).href}${secret} \\\n  -H 'Content-Type: application/json' \\\n  -d '${row}'`;
}

// The answer.

function written(found) {
  if (found === null) return "nothing";
  return typeof found === "object" ? JSON.stringify(found, null, 1) : String(found);
}

function showAnswer(told) {
  const list = made("dl");
  for (const [name, found] of Object.entries(told.answer)) {
    const text = written(found);
    list.append(made("dt", name), made("dd", text, text.length > 80 ? { class: "long" } : {}));
  }
  const parts = [list];
  if (told.logprobs) {
    const ranked = Object.entries(told.logprobs).sort((one, other) => other[1] - one[1]);
    parts.push(made("p", `Likelihood: ${ranked.map(([label, log]) => `${label} ${(100 * Math.exp(log)).toFixed(1)} %`).join(", ")}`, { class: "quiet" }));
  }
  if (told.truncated) parts.push(made("p", "Cut off at the most tokens the server allows.", { class: "wrong" }));
  const used = told.usage;
  const price = used.dollars ? `, $${used.dollars.toPrecision(2)}` : "";
  const calls = used.calls === 1 ? "1 call" : `${used.calls} calls`;
  parts.push(made("p", `${told.seconds.toFixed(2)} s, ${calls}, ${used.input_tokens} + ${used.output_tokens} tokens${price}`, { class: "quiet" }));
  at("answer").replaceChildren(...parts);
}

function bar(distance, most, isNear) {
  const width = Math.max(1, (100 * distance) / most);
  const chart = drawn("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true", height: "10" });
  chart.append(drawn("rect", { x: 0, y: 0, height: 6, width, rx: 1, class: isNear ? "near" : "other" }));
  return chart;
}

function showRoute(place) {
  at("routing").hidden = false;
  const who = !place.region
    ? "The input is in no region: default answered."
    : place.expert === place.region
      ? `The input is in ${place.region}, whose own expert answered.`
      : `The input is in ${place.region}, which has no expert of its own: ${place.expert} answered.`;
  const limit = place.distance > place.radius ? "beyond" : "within";
  at("routed").textContent = `${who} Nearest is ${place.nearest}, at distance ${place.distance.toFixed(3)}, ${limit} the radius of ${place.radius.toFixed(3)}.`;
  const most = Math.max(place.radius, ...Object.values(place.distances));
  const rows = Object.entries(place.distances).sort((one, other) => one[1] - other[1]);
  at("distances").tBodies[0].replaceChildren(
    ...rows.map(([name, distance]) => {
      const isNear = name === place.nearest;
      const row = made("tr", null, isNear ? { class: "near" } : {});
      const cell = made("td", null, { class: "wide", "aria-hidden": "true" });
      cell.append(bar(distance, most, isNear));
      row.append(made("th", name, { scope: "row" }), made("td", place.experts[name]), made("td", distance.toFixed(3), { class: "number" }), cell);
      return row;
    }),
  );
}

function showInstructions(expert) {
  const entries = Object.entries(program.instructions);
  const several = entries.length > 1;
  at("instructions").replaceChildren(
    ...entries.map(([name, text]) => {
      const isUsed = expert !== null && name.startsWith(`${expert}: `);
      if (!several) return made("pre", text);
      const part = made("details", null, isUsed ? { class: "used" } : {});
      part.open = expert === null ? entries.length <= 3 : isUsed;
      part.append(made("summary", name), made("pre", text));
      return part;
    }),
  );
}

async function explain(told, row) {
  at("routing").hidden = true;
  try {
    if (told.program !== program.digest) { // another program was put in place since; its fields are the same
      program = await asked("program");
      showProgram();
    }
    if (!told.route) return;
    showInstructions(told.route.expert);
    showRoute(await asked("route", row));
  } catch {
    at("routing").hidden = true; // yet another program, perhaps: the answer is good all the same
  }
}

async function answer(event) {
  event.preventDefault();
  const row = given();
  at("ask").disabled = true;
  complain(null);
  try {
    const told = await asked("predict", row);
    blame(null);
    showAnswer(told);
    await explain(told, row);
  } catch (problem) {
    at("answer").replaceChildren();
    at("routing").hidden = true;
    if (!blame(problem)) complain(problem);
  } finally {
    at("ask").disabled = false;
  }
}

// What was measured.

function interval(found) {
  return Array.isArray(found) ? `${found[0].toFixed(3)} to ${found[1].toFixed(3)}` : "";
}

function table(header, rows) {
  const isNumber = (index) => index > 0 && rows.every((cells) => /^[\d.]*$/.test(cells[index]));
  const style = (index) => (isNumber(index) ? { class: "number" } : {});
  const whole = made("table");
  if (header) {
    const head = made("tr");
    head.append(...header.map((name, index) => made("th", name, { scope: "col", ...style(index) })));
    const top = made("thead");
    top.append(head);
    whole.append(top);
  }
  const body = made("tbody");
  body.append(
    ...rows.map((cells) => {
      const row = made("tr");
      row.append(...cells.map((cell, index) => (index ? made("td", cell, style(index)) : made("th", cell, { scope: "row" }))));
      return row;
    }),
  );
  whole.append(body);
  return whole;
}

function plot(evidence) {
  const rows = [["your instructions", evidence.baseline, evidence.baseline_ci]];
  if (evidence.replaced) rows.push(["compiled program", evidence.compiled, evidence.compiled_ci]);
  if (!rows.every(([, score, ci]) => typeof score === "number" && Array.isArray(ci))) return null;
  const left = 8;
  const right = 492;
  const x = (score) => left + score * (right - left);
  const step = 48;
  const height = step * rows.length + 30;
  const told = rows.map(([name, score, ci]) => `${name} ${score.toFixed(3)}, interval ${interval(ci)}`).join("; ");
  const chart = drawn("svg", { viewBox: `0 0 500 ${height}`, role: "img", "aria-label": told });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(drawn("line", { x1: x(tick), x2: x(tick), y1: 4, y2: height - 26, class: "axis" }));
    const anchor = tick === 0 ? "start" : tick === 1 ? "end" : "middle";
    chart.append(drawn("text", { x: x(tick), y: height - 6, "text-anchor": anchor, class: "axis-text" }, String(tick)));
  }
  rows.forEach(([name, score, ci], index) => {
    const y = 36 + step * index;
    chart.append(drawn("text", { x: left + 6, y: y - 16 }, `${name}: ${score.toFixed(3)}`));
    chart.append(drawn("line", { x1: x(ci[0]), x2: x(ci[1]), y1: y, y2: y, class: "interval" }));
    chart.append(drawn("circle", { cx: x(score), cy: y, r: 6, class: "score" }));
  });
  return chart;
}

function points(gain) {
  return typeof gain === "number" ? `${gain >= 0 ? "+" : "−"}${Math.abs(100 * gain).toFixed(1)} points` : "";
}

function showEvidence(evidence) {
  at("evidence").hidden = !evidence || !evidence.metric;
  if (at("evidence").hidden) return;
  at("verdict").textContent = evidence.verdict || (evidence.replaced ? "The instructions were replaced." : "The user’s instructions were kept.");
  const chart = plot(evidence);
  at("plot").hidden = !chart;
  at("plot").querySelector("svg")?.remove();
  if (chart) at("plot").prepend(chart);
  const rows = [
    ["Method", evidence.method],
    ["Metric", evidence.metric],
    ["Gain claimed", evidence.replaced ? points(evidence.gain) : "none"],
    ["95 % interval of the difference", Array.isArray(evidence.ci) ? evidence.ci.map(points).join(" to ") : ""],
    ["p-value", typeof evidence.p_value === "number" ? evidence.p_value.toPrecision(2) : ""],
    ["Rows no search step has seen", evidence.rows],
    ["Calls of the compile", evidence.calls],
  ].filter(([, found]) => found !== undefined && found !== "");
  const parts = [table(null, rows.map(([name, found]) => [name, String(found)]))];
  if (Array.isArray(evidence.regions) && evidence.regions.length) {
    const score = (found) => (typeof found === "number" ? found.toFixed(3) : "");
    parts.push(made("h3", "Regions"), table(["Region", "Rows", "Yours", "Compiled", "Expert"], evidence.regions.map((each) => [each.region, String(each.measuring_rows ?? ""), score(each.seed), score(each.compiled), each.expert || ""])));
  }
  at("measured").replaceChildren(...parts);
}

at("try").addEventListener("submit", answer);
at("try").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !at("ask").disabled) at("try").requestSubmit();
});
at("open").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  begin();
});
begin();
