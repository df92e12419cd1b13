/* The formulas of mvrepro/losses.py for one sample and one other class k.
   MV_LOSSES and MV_MARGINS are that file's tables (docs/build.py copies them);
   tests/book/test_interactive.py compares every loss with the library's. */
"use strict";

const MV = (() => {
  function sine(cos) {
    const square = (1 - cos) * (1 + cos);
    return square > Number.EPSILON ? Math.sqrt(square) : 0;
  }

  /* Eq. 3: f(m, θ_y) */
  function margin(f, cos, m) {
    if (f === "AM") return cos - m;
    if (f === "Arc") return cos * Math.cos(m) - sine(cos) * Math.sin(m);
    if (f === "A" && m !== 1) {
      const angle = m * Math.atan2(sine(cos), cos);
      const k = Math.floor(angle / Math.PI);
      return (k % 2 ? -1 : 1) * Math.cos(angle) - 2 * k;
    }
    return cos;
  }

  /* Eqs. 7 and 8: what a marked cosθ_k becomes, and the cosθ_k that becomes a given value */
  function emphasise(h, cos, t) {
    if (h === "fixed") return cos + t;
    return h === "adaptive" ? (1 + t) * cos + t : cos;
  }
  function aim(h, value, t) {
    if (h === "fixed") return value - t;
    return h === "adaptive" ? (value - t) / (1 + t) : value;
  }

  /* All that a loss says of a sample; o: m, t, s, gamma, easy */
  function sample(name, cosY, cosK, o) {
    const { f: kind, h, g } = MV_LOSSES[name];
    const f = margin(kind, cosY, o.m);
    const marked = cosK > f; // Eq. 5; only losses with an h act on it
    const moved = marked ? emphasise(h, cosK, o.t) : cosK;
    const target = o.easy && cosY <= 0 ? cosY : f;
    const difference = o.s * (moved - target);
    const plain = Math.max(difference, 0) + Math.log1p(Math.exp(-Math.abs(difference))); // −log p_y
    const weight = g === "F" && plain > 0 ? Math.pow(-Math.expm1(-plain), o.gamma) : 1;
    return { f, marked, moved, p: Math.exp(-plain), loss: weight * plain, asked: cosY - cosK - (target - moved) };
  }

  return { margin, emphasise, aim, sample };
})();
