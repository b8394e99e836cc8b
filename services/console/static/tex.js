// LaTeX -> MathML, built as DOM nodes: no text ever becomes HTML, and no attribute comes from the input.
// Reads what models write in answers; what it does not know is shown as it was written.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_CHARS = 4000;
const MAX_DEPTH = 60;

const IDENTIFIERS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η", theta: "θ",
  vartheta: "ϑ", iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", varpi: "ϖ", rho: "ρ",
  varrho: "ϱ", sigma: "σ", varsigma: "ς", tau: "τ", upsilon: "υ", phi: "ϕ", varphi: "φ", chi: "χ", psi: "ψ",
  omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Xi: "Ξ", Pi: "Π", Sigma: "Σ", Upsilon: "Υ", Phi: "Φ",
  Psi: "Ψ", Omega: "Ω", infty: "∞", partial: "∂", nabla: "∇", ell: "ℓ", hbar: "ℏ", emptyset: "∅", varnothing: "∅",
  aleph: "ℵ", Re: "ℜ", Im: "ℑ", imath: "ı", jmath: "ȷ", angle: "∠", triangle: "△", square: "□", degree: "°",
  top: "⊤", bot: "⊥", prime: "′", dots: "…", ldots: "…", cdots: "⋯", vdots: "⋮", ddots: "⋱", checkmark: "✓",
  "%": "%", "$": "$", "#": "#", "&": "&", "_": "_",
};
const OPERATORS = {
  cdot: "⋅", times: "×", div: "÷", pm: "±", mp: "∓", ast: "∗", star: "⋆", circ: "∘", bullet: "∙", oplus: "⊕",
  otimes: "⊗", cup: "∪", cap: "∩", setminus: "∖", wedge: "∧", land: "∧", vee: "∨", lor: "∨", neg: "¬", lnot: "¬",
  leq: "≤", le: "≤", geq: "≥", ge: "≥", leqslant: "⩽", geqslant: "⩾", neq: "≠", ne: "≠", equiv: "≡", approx: "≈",
  sim: "∼", simeq: "≃", cong: "≅", propto: "∝", ll: "≪", gg: "≫", in: "∈", notin: "∉", ni: "∋", subset: "⊂",
  subseteq: "⊆", supset: "⊃", supseteq: "⊇", mid: "∣", nmid: "∤", parallel: "∥", perp: "⊥", to: "→",
  rightarrow: "→", leftarrow: "←", leftrightarrow: "↔", Rightarrow: "⇒", implies: "⟹", Leftarrow: "⇐",
  Leftrightarrow: "⇔", iff: "⟺", mapsto: "↦", longrightarrow: "⟶", uparrow: "↑", downarrow: "↓", forall: "∀",
  exists: "∃", therefore: "∴", because: "∵", colon: ":", lt: "<", gt: ">", backslash: "\\", models: "⊨",
  langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋", lceil: "⌈", rceil: "⌉", lbrace: "{", rbrace: "}", "{": "{",
  "}": "}", vert: "|", lvert: "|", rvert: "|", "|": "‖", Vert: "‖", lVert: "‖", rVert: "‖", lbrack: "[", rbrack: "]",
};
const BIG = {
  sum: "∑", prod: "∏", coprod: "∐", bigcup: "⋃", bigcap: "⋂", bigoplus: "⨁", bigotimes: "⨂", bigvee: "⋁", bigwedge: "⋀",
};
const INTEGRALS = { int: "∫", iint: "∬", iiint: "∭", oint: "∮" };
const FUNCTIONS = new Set(("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp det dim ker deg " +
  "arg hom gcd lcm mod Pr").split(" "));
const LIMITS = new Set("lim max min sup inf limsup liminf argmax argmin".split(" "));
const SPACES = { ",": 0.17, ":": 0.22, ";": 0.28, "!": -0.17, " ": 0.25, quad: 1, qquad: 2, enspace: 0.5, thinspace: 0.17 };
const ACCENTS = {
  bar: "¯", overline: "¯", hat: "^", widehat: "^", vec: "→", overrightarrow: "→", tilde: "~", widetilde: "~", dot: "˙",
  ddot: "¨", overbrace: "⏞", check: "ˇ", breve: "˘", mathring: "˚", overleftarrow: "←",
};
const UNDERS = { underline: "_", underbrace: "⏟" };
const TEXTS = new Set("text textrm textbf textit texttt textsf textup mbox hbox mathrm operatorname emph textnormal".split(" "));
const ALPHABETS = { mathbb: [0x1d538, 0x1d552, 0x1d7d8], mathbf: [0x1d400, 0x1d41a, 0x1d7ce], boldsymbol: [0x1d400, 0x1d41a, 0x1d7ce],
  bm: [0x1d400, 0x1d41a, 0x1d7ce], mathcal: [0x1d49c, 0x1d4b6, 0], mathscr: [0x1d49c, 0x1d4b6, 0], mathfrak: [0x1d504, 0x1d51e, 0],
  mathsf: [0x1d5a0, 0x1d5ba, 0x1d7e2], mathtt: [0x1d670, 0x1d68a, 0x1d7f6], mathit: [0, 0, 0] };
const SINGULAR = { "\u{1d53a}": "ℂ", "\u{1d53f}": "ℍ", "\u{1d545}": "ℕ", "\u{1d547}": "ℙ", "\u{1d548}": "ℚ", "\u{1d549}": "ℝ", "\u{1d551}": "ℤ",
  "\u{1d49d}": "ℬ", "\u{1d4a0}": "ℰ", "\u{1d4a1}": "ℱ", "\u{1d4a3}": "ℋ", "\u{1d4a4}": "ℐ", "\u{1d4a7}": "ℒ", "\u{1d4a8}": "ℳ", "\u{1d4ad}": "ℛ" };
const FENCES = { matrix: "", pmatrix: "()", bmatrix: "[]", Bmatrix: "{}", vmatrix: "||", Vmatrix: "‖‖", smallmatrix: "", array: "",
  cases: "{", aligned: "", align: "", "align*": "", gathered: "", gather: "", "gather*": "", split: "", equation: "", "equation*": "" };
const IGNORED = new Set(("displaystyle textstyle scriptstyle scriptscriptstyle limits nolimits nonumber notag hline big Big bigg Bigg bigl bigr Bigl " +
  "Bigr biggl biggr Biggl Biggr bigm middle hfill smallskip medskip bigskip left right protect allowbreak").split(" "));

function node(tag, ...children) {
  const made = document.createElementNS(MATHML, tag);
  made.append(...children);
  return made;
}

function row(nodes) {
  return nodes.length === 1 ? nodes[0] : node("mrow", ...nodes);
}

class Parser {
  constructor(source) {
    this.tokens = source.match(/\\[a-zA-Z]+\*?|\\[\s\S]|[0-9]+(?:[.,][0-9]+)*|\s+|[\s\S]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
  }

  get next() { return this.tokens[this.at]; }

  skipSpace() { while (this.at < this.tokens.length && /^\s/.test(this.next)) this.at += 1; }

  // Nodes up to one of `ends` (not taken) or the end of the text.
  list(...ends) {
    if ((this.depth += 1) > MAX_DEPTH) throw new RangeError("too deep");
    const nodes = [];
    for (;;) {
      this.skipSpace();
      const token = this.next;
      if (token === undefined || ends.includes(token)) break;
      if (token === "^" || token === "_" || token === "'") {
        nodes.push(this.scripts(nodes.pop() ?? node("mrow")));
        continue;
      }
      const atom = this.atom();
      if (atom) nodes.push(atom);
    }
    this.depth -= 1;
    return nodes;
  }

  scripts(base) {
    let above = null, below = null;
    for (;;) {
      this.skipSpace();
      if (this.next === "'") {
        let primes = "";
        while (this.next === "'") { primes += "′"; this.at += 1; }
        above = above ? node("mrow", above, node("mo", primes)) : node("mo", primes);
      } else if (this.next === "^" && !above) { this.at += 1; above = this.argument(); }
      else if (this.next === "_" && !below) { this.at += 1; below = this.argument(); }
      else break;
    }
    if (!above && !below) { this.at += 1; return base; } // a second script of the same kind: leave the sign out
    const stacked = base.dataset?.limits === "1";
    const [one, two, both] = stacked ? ["mover", "munder", "munderover"] : ["msup", "msub", "msubsup"];
    if (above && below) return node(both, base, below, above);
    return above ? node(one, base, above) : node(two, base, below);
  }

  // What a command takes: a group, or the next thing.
  argument() {
    this.skipSpace();
    if (this.next === undefined) return node("mrow");
    if (this.next === "{") return this.group();
    if (/^[0-9]{2,}/.test(this.next)) { // \frac12: one digit each
      const digits = this.next;
      this.tokens[this.at] = digits.slice(1);
      return node("mn", digits[0]);
    }
    return this.atom() ?? node("mrow");
  }

  group() {
    this.at += 1;
    const nodes = this.list("}");
    this.at += 1;
    return row(nodes);
  }

  // The source text of a group, for \text and names.
  raw() {
    this.skipSpace();
    if (this.next !== "{") return this.tokens[this.at++] ?? "";
    let text = "", open = 0;
    for (; this.at < this.tokens.length; this.at += 1) {
      const token = this.next;
      if (token === "{" && open++ === 0) continue;
      if (token === "}" && --open === 0) { this.at += 1; break; }
      text += token;
    }
    return text;
  }

  optional() {
    this.skipSpace();
    if (this.next !== "[") return null;
    this.at += 1;
    const nodes = this.list("]");
    this.at += 1;
    return row(nodes);
  }

  fence() {
    this.skipSpace();
    const token = this.tokens[this.at++] ?? ".";
    if (token === ".") return "";
    return token.startsWith("\\") ? OPERATORS[token.slice(1)] ?? IDENTIFIERS[token.slice(1)] ?? token : token;
  }

  fenced(open, nodes, close) {
    const wall = (sign) => {
      const made = node("mo", sign);
      made.setAttribute("stretchy", "true");
      made.setAttribute("fence", "true");
      return made;
    };
    return node("mrow", ...(open ? [wall(open)] : []), ...nodes, ...(close ? [wall(close)] : []));
  }

  atom() {
    const token = this.tokens[this.at];
    if (token === "{") return this.group();
    this.at += 1;
    if (token.startsWith("\\") && token.length > 1) return this.command(token.slice(1));
    if (/^[0-9]/.test(token)) return node("mn", token);
    if (/^\p{L}/u.test(token)) return node("mi", token);
    if (token === "}" || token === "&") return null;
    if (token === "~") return this.space(0.25);
    return node("mo", { "-": "−", "*": "∗" }[token] ?? token);
  }

  space(em) {
    const made = node("mspace");
    made.setAttribute("width", `${em}em`);
    return made;
  }

  command(name) {
    if (name in IDENTIFIERS) return node("mi", IDENTIFIERS[name]);
    if (name in OPERATORS) return node("mo", OPERATORS[name]);
    if (name in BIG) return this.limited(node("mo", BIG[name]));
    if (name in INTEGRALS) return node("mo", INTEGRALS[name]);
    if (FUNCTIONS.has(name)) return this.upright(name);
    if (LIMITS.has(name)) return this.limited(this.upright(name));
    if (name in SPACES) return this.space(SPACES[name]);
    if (TEXTS.has(name.replace("*", ""))) return node("mtext", this.raw().replace(/\\(.)/g, "$1").replace(/^\s|\s$/g, "\u00a0"));
    if (name in ALPHABETS) return this.alphabet(ALPHABETS[name]);
    if (name in ACCENTS) {
      const made = node("mover", this.argument(), node("mo", ACCENTS[name]));
      made.setAttribute("accent", "true");
      return made;
    }
    if (name in UNDERS) return node("munder", this.argument(), node("mo", UNDERS[name]));
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": return node("mfrac", this.argument(), this.argument());
      case "binom": case "dbinom": case "tbinom": {
        const stack = node("mfrac", this.argument(), this.argument());
        stack.setAttribute("linethickness", "0");
        return this.fenced("(", [stack], ")");
      }
      case "sqrt": {
        const index = this.optional();
        return index ? node("mroot", this.argument(), index) : node("msqrt", this.argument());
      }
      case "boxed": case "fbox": {
        const made = node("mrow", this.argument());
        made.classList.add("boxed");
        return made;
      }
      case "left": {
        const open = this.fence(), nodes = this.list("\\right");
        this.at += 1;
        return this.fenced(open, nodes, this.at <= this.tokens.length ? this.fence() : "");
      }
      case "begin": return this.environment(this.raw());
      case "overset": case "stackrel": { const above = this.argument(); return node("mover", this.argument(), above); }
      case "underset": { const below = this.argument(); return node("munder", this.argument(), below); }
      case "not": { const what = this.argument(); what.append("\u0338"); return what; }
      case "pmod": return this.fenced("(", [this.upright("mod"), this.space(0.3), this.argument()], ")");
      case "bmod": return node("mo", "mod");
      case "tag": return node("mtext", ` (${this.raw()})`);
      case "href": case "textcolor": this.raw(); return this.argument();
      case "color": case "label": case "end": case "vspace": case "hspace": this.raw(); return null;
      case "phantom": case "cancel": case "bcancel": case "xcancel": case "mathop": case "mathbin": case "mathrel": return this.argument();
      case "\\": case "newline": return this.space(1);
    }
    if (IGNORED.has(name)) return null;
    const unknown = node("mtext", `\\${name}`);
    unknown.classList.add("unknown");
    return unknown;
  }

  upright(name) {
    const made = node("mi", name);
    if (name.length === 1) made.setAttribute("mathvariant", "normal");
    return node("mrow", made, this.space(0.12));
  }

  limited(made) { made.dataset.limits = "1"; return made; }

  alphabet([upper, lower, digit]) {
    const text = [...this.raw()].map((sign) => {
      const code = sign.codePointAt(0);
      const base = /[A-Z]/.test(sign) ? upper - 65 : /[a-z]/.test(sign) ? lower - 97 : /[0-9]/.test(sign) ? digit - 48 : -1;
      if (base < 0) return sign;
      const styled = String.fromCodePoint(base + code);
      return SINGULAR[styled] ?? styled;
    });
    return node("mi", text.join(""));
  }

  environment(name) {
    if (name === "array") this.raw();
    const ends = ["\\\\", "&", "\\end"], lines = [[]];
    const left = name === "cases" || name.startsWith("align") || name === "split";
    for (;;) {
      const cell = node("mtd", ...this.list(...ends));
      if (left) cell.classList.add("left");
      lines.at(-1).push(cell);
      const token = this.tokens[this.at++];
      if (token === "&") continue;
      if (token === "\\\\") { this.optional(); lines.push([]); continue; }
      if (token === "\\end") this.raw();
      break;
    }
    const kept = lines.filter((cells) => cells.some((cell) => cell.childNodes.length));
    const table = node("mtable", ...kept.map((cells) => node("mtr", ...cells)));
    const [open, close] = [...(FENCES[name] ?? "")];
    return this.fenced(open, [table], close);
  }
}

// One formula as <math>, or as code where it is no LaTeX that can be read.
export function formula(source, { display = false } = {}) {
  try {
    if (source.length > MAX_CHARS) throw new RangeError("too long");
    const parser = new Parser(source), nodes = [];
    while (parser.at < parser.tokens.length) {
      nodes.push(...parser.list());
      parser.at += 1; // a stray closing sign
    }
    const math = node("math", row(nodes));
    if (display) math.setAttribute("display", "block");
    return math;
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const code = document.createElement("code");
    code.textContent = source;
    return code;
  }
}

// Where the group that opens at `start` ends, or -1.
function closing(text, start) {
  let open = 0;
  for (let i = start; i < text.length; i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === "{") open += 1;
    else if (text[i] === "}" && --open === 0) return i;
  }
  return -1;
}

const OPENERS = /\$\$|\$(?=\S)|\\\(|\\\[|\\boxed\{|\\begin\{(?:align|equation|gather)\*?\}|<\|[^<>|]{1,40}\|>/g;
const CLOSERS = { "$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]" };

// Running text with its formulas, boxes and special tokens.
export function prose(text) {
  const made = document.createDocumentFragment();
  let from = 0;
  OPENERS.lastIndex = 0;
  for (let match; (match = OPENERS.exec(text)); ) {
    const opener = match[0], start = match.index;
    let end = -1, inner = "", shown = null;
    if (opener.startsWith("<|")) {
      shown = document.createElement("span");
      shown.className = "special";
      shown.textContent = opener;
      end = start + opener.length;
    } else if (opener === "\\boxed{") {
      const last = closing(text, start + 6);
      if (last > 0) { end = last + 1; inner = text.slice(start, end); }
    } else if (opener.startsWith("\\begin")) {
      const last = text.indexOf(opener.replace("begin", "end"), start);
      if (last > 0) { end = last + opener.length - 2; inner = text.slice(start, end); }
    } else {
      const closer = CLOSERS[opener], last = text.indexOf(closer, start + opener.length);
      const isOneLine = opener !== "$" || !text.slice(start, last).includes("\n");
      if (last > start + opener.length - 1 && isOneLine) { end = last + closer.length; inner = text.slice(start + opener.length, last); }
    }
    if (end < 0) continue; // it opens nothing: plain text
    made.append(text.slice(from, start), shown ?? formula(inner, { display: opener === "$$" || opener === "\\[" || opener.startsWith("\\begin") }));
    from = OPENERS.lastIndex = end;
  }
  made.append(text.slice(from));
  return made;
}
