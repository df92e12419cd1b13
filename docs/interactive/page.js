/* Draws the interactive page: reads the controls, asks MV (losses.js), and redraws all of it. */
"use strict";

(() => {
  const $ = (id) => document.getElementById("mv-" + id);
  const RANGES = { cos: [0, 1, 0.01], A: [1, 4, 0.05], AM: [0, 1, 0.01], Arc: [0, 1.5, 0.01] }; // of the slider m
  const UNITS = { A: " × θ", AM: "", Arc: " rad" };
  const LEVELS = [0.1, 1, 10, 30]; // values of the loss at which the plane gets a shade darker
  const COSINES = Array.from({ length: 361 }, (_, i) => Math.cos((i * Math.PI) / 360)); // even steps of the angle
  const AXES = {
    cosine: { name: "cosθ", unit: "", ends: [-1, 1], ticks: [-1, -0.5, 0, 0.5, 1], of: (cos) => cos, back: (v) => v },
    angle: {
      name: "θ", unit: " (°)", ends: [0, 180], ticks: [0, 45, 90, 135, 180],
      of: (cos) => (Math.acos(cos) * 180) / Math.PI, back: (v) => Math.cos((v * Math.PI) / 180),
    },
  };
  let margins = { ...MV_MARGINS }; // each kind of margin keeps its own m

  const clamp = (v) => Math.min(1, Math.max(-1, v));
  const number = (v, digits = 2) => (Math.abs(v) < 0.5 * 10 ** -digits ? 0 : v).toFixed(digits).replace("-", "−");
  const small = (v) => (v && v < 0.001 ? v.toExponential(1).replace("-", "−") : number(v, 3));
  const kind = (name) => MV_LOSSES[name].f;
  const options = (name) => ({
    m: margins[kind(name)], t: +$("t").value, s: +$("s").value, gamma: +$("gamma").value, easy: $("easy").checked,
  });

  /* The smallest cosθ_k at which the loss reaches a level, 1 where none does: it never falls as cosθ_k grows. */
  function reaches(name, cosY, level, o) {
    let [low, high] = [-1, 1];
    if (MV.sample(name, cosY, low, o).loss >= level) return low;
    for (let i = 0; i < 24; i++) {
      const middle = (low + high) / 2;
      if (MV.sample(name, cosY, middle, o).loss >= level) high = middle;
      else low = middle;
    }
    return high;
  }

  /* A plot as SVG: areas and lines in the coordinates of the axes x and y. */
  class Plot {
    constructor(id, x, y) {
      Object.assign(this, { svg: $(id), x, y, body: "" });
      this.height = this.svg.viewBox.baseVal.height;
      this.box = { left: 50, right: 352, top: 8, bottom: this.height - 40 };
    }
    place([a, b]) {
      const { box, x, y } = this;
      const share = (v, [low, high]) => (v - low) / (high - low);
      return [
        box.left + share(a, x.ends) * (box.right - box.left), box.bottom - share(b, y.ends) * (box.bottom - box.top),
      ].map((v) => v.toFixed(1));
    }
    path(points, attributes, end = "") {
      if (points.length) this.body += `<path d="M${points.map((p) => this.place(p).join(" ")).join("L")}${end}" ${attributes}/>`;
    }
    dot(point) {
      const [cx, cy] = this.place(point);
      this.body += `<circle class="mv-dot" cx="${cx}" cy="${cy}" r="5"/>`;
    }
    text(x, y, words, attributes = 'text-anchor="middle"') {
      this.body += `<text transform="translate(${x} ${y})" ${attributes}>${words}</text>`;
    }
    show(label) {
      const { left, right, top, bottom } = this.box;
      this.body += `<path class="mv-frame" d="M${left} ${top}V${bottom}H${right}"/>`;
      for (const v of this.x.ticks) {
        const last = v === this.x.ends[1]; // it ends at the frame, or the picture would cut it
        this.text(+this.place([v, 0])[0] + (last ? 8 : 0), bottom + 15, number(v, v % 1 ? 1 : 0), `text-anchor="${last ? "end" : "middle"}"`);
      }
      for (const v of this.y.ticks) this.text(left - 5, +this.place([0, v])[1] + 4, number(v, v % 1 ? 1 : 0), 'text-anchor="end"');
      this.text((left + right) / 2, this.height - 6, this.x.title);
      this.body += `<text transform="translate(13 ${(top + bottom) / 2}) rotate(-90)" text-anchor="middle">${this.y.title}</text>`;
      this.svg.innerHTML = this.body;
      this.svg.setAttribute("aria-label", label);
    }
  }

  const axis = (k) => {
    const chosen = AXES[$("form").elements.axes.value];
    return { ...chosen, title: `${chosen.name}<tspan dy="3" font-size="80%">${k}</tspan><tspan dy="-3">${chosen.unit}</tspan>` };
  };

  function drawPlane(a, b, cosY, cosK) {
    const plot = new Plot("plane", axis("y"), axis("k"));
    const point = (y, k) => [plot.x.of(y), plot.y.of(clamp(k))];
    const inside = (curve) => COSINES.filter((y) => Math.abs(curve(y)) <= 1).map((y) => point(y, curve(y)));
    const above = (curve, attributes) =>
      plot.path([...COSINES.map((y) => point(y, curve(y))), point(-1, 1), point(1, 1)], attributes, "Z");
    const f = (name) => (y) => MV.margin(kind(name), y, options(name).m);
    plot.body = '<defs><pattern id="mv-hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path class="mv-frame" d="M0 0V7"/></pattern></defs>';
    for (const level of LEVELS) above((y) => reaches(a, y, level, options(a)), 'class="mv-band"');
    above(f(a), 'fill="url(#mv-hatch)"');
    plot.path(inside(f(a)), 'class="mv-a" id="mv-boundary"');
    const { h } = MV_LOSSES[a];
    if (h) plot.path(inside((y) => MV.aim(h, f(a)(y), options(a).t)), 'class="mv-a mv-moved" id="mv-moved"');
    plot.path(inside(f(b)), 'class="mv-b" id="mv-boundary-other"'); // on top, so that both show where they agree
    plot.dot(point(cosY, cosK));
    plot.show(
      `The plane of the sample's two cosines. At cosθ_y = ${number(cosY)} the boundary of ${a} lies at cosθ_k = ` +
        `${number(f(a)(cosY))}, that of ${b} at ${number(f(b)(cosY))}; the sample has cosθ_k = ${number(cosK)}.`,
    );
  }

  function drawCurve(id, k, a, b, cosines, current) {
    const curves = [a, b].map((name) => COSINES.map((cos) => [cos, MV.sample(name, ...cosines(cos), options(name)).loss]));
    const highest = Math.max(1, ...curves.flat().map(([, loss]) => loss));
    const step = [0.5, 1, 2, 5, 10, 20, 25, 50, 100].find((each) => highest / each <= 5) || 200;
    const ticks = Array.from({ length: Math.floor(highest / step) + 1 }, (_, i) => i * step);
    const plot = new Plot(id, axis(k), { ends: [0, highest * 1.02], ticks, title: "loss (nats)" });
    const line = (curve) => curve.map(([cos, loss]) => [plot.x.of(cos), loss]);
    plot.path(line(curves[0]), 'class="mv-a"');
    plot.path(line(curves[1]), 'class="mv-b"');
    const loss = MV.sample(a, ...cosines(current), options(a)).loss;
    plot.dot([plot.x.of(current), loss]);
    const ends = curves.map((curve, i) => `${[a, b][i]} from ${small(curve.at(-1)[1])} at −1 to ${small(curve[0][1])} at 1`);
    plot.show(`The loss against cosθ_${k}: ${ends.join("; ")}; ${small(loss)} at the sample's ${number(current)}.`);
  }

  function showValues(a, b, cosY, cosK) {
    const [here, there] = [a, b].map((name) => ({ name, ...MV_LOSSES[name], ...MV.sample(name, cosY, cosK, options(name)) }));
    const marked = (v) => (v.marked ? "yes" : "no") + (v.h || !v.marked ? "" : " (no effect)");
    const rows = {
      "f(m, θ<sub>y</sub>)": (v) => number(v.f, 3), "marked, I<sub>k</sub> = 1": marked,
      "cosθ<sub>k</sub> counts as": (v) => number(v.moved, 3), "effective margin": (v) => number(v.asked, 3),
      "p<sub>y</sub>": (v) => small(v.p), loss: (v) => small(v.loss),
    };
    $("name-a").textContent = a;
    $("name-b").textContent = b;
    $("rows").innerHTML = Object.entries(rows)
      .map(([name, text]) => `<tr><th scope="row">${name}</th><td>${text(here)}</td><td>${text(there)}</td></tr>`).join("");
    const words = (v) => `${v.name}: marked: ${marked(v)}, effective margin ${number(v.asked)}, loss ${small(v.loss)}`;
    $("text").textContent = `${words(here)}. ${words(there)}.`;
  }

  /* The slider m serves the kind of margin that the chosen loss has; what the loss does not use is disabled. */
  function setControls(a) {
    const { f, h, g } = MV_LOSSES[a];
    [$("m").min, $("m").max, $("m").step] = RANGES[f];
    $("m").value = margins[f];
    const used = { m: f !== "cos", t: !!h, s: true, gamma: g === "F", y: true, k: true };
    for (const [id, on] of Object.entries(used)) {
      const value = +$(id).value;
      const text = id === "m" ? number(value) + UNITS[f] : number(value, id === "s" ? 0 : id === "gamma" ? 1 : 2);
      $(id).disabled = !on;
      $(id).parentElement.querySelector("output").value = on ? text : "not used";
    }
    $("easy").disabled = f === "cos";
    const parts = [`f-${f}`, `h-${h || "none"}`, `g-${g || "none"}`, f !== "cos" && $("easy").checked ? "mv-easy" : ""];
    for (const part of document.querySelectorAll(".mv-part")) {
      part.hidden = !parts.some((c) => part.classList.contains(c.toLowerCase()));
    }
    $("moved-key").hidden = !h;
  }

  function update() {
    const [a, b, cosY, cosK] = [$("loss").value, $("other").value, +$("y").value, +$("k").value];
    setControls(a);
    drawPlane(a, b, cosY, cosK);
    drawCurve("over-y", "y", a, b, (cos) => [cos, cosK], cosY);
    drawCurve("over-k", "k", a, b, (cos) => [cosY, cos], cosK);
    showValues(a, b, cosY, cosK);
  }

  /* A click on the plane, or a drag with the mouse, moves the sample. */
  function move(event) {
    if (event.type === "pointermove" && (!event.buttons || event.pointerType === "touch")) return;
    const { svg, box, x, y } = new Plot("plane", axis("y"), axis("k"));
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    const at = (share, { ends, back }) => clamp(back(ends[0] + Math.min(1, Math.max(0, share)) * (ends[1] - ends[0])));
    $("y").value = at(((event.clientX - frame.left) * scale - box.left) / (box.right - box.left), x);
    $("k").value = at((box.bottom - (event.clientY - frame.top) * scale) / (box.bottom - box.top), y);
    update();
  }

  function start() {
    for (const [id, chosen] of [["loss", "MV-AM-Softmax-a"], ["other", "AM-Softmax"]]) {
      $(id).innerHTML = Object.keys(MV_LOSSES).map((name) => `<option${name === chosen ? " selected" : ""}>${name}</option>`).join("");
    }
    $("form").addEventListener("input", (event) => {
      if (event.target === $("m")) margins[kind($("loss").value)] = +$("m").value;
      update();
    });
    $("form").addEventListener("reset", () => {
      margins = { ...MV_MARGINS };
      setTimeout(update); // after the browser has put the first values back
    });
    for (const type of ["pointerdown", "pointermove"]) $("plane").addEventListener(type, move);
    update();
  }

  // MathJax can't measure what is hidden, so the equations that don't apply are hidden after it.
  const typeset = window.MathJax && MathJax.startup && MathJax.startup.promise;
  (typeset || Promise.resolve()).then(start);
})();
