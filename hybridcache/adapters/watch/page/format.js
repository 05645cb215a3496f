// Words, numbers and small elements.
const CAUSES = [
  ["never_seen", "new", "No earlier request of the same key and salt had these tokens in this position."],
  ["kv_evicted", "KV evicted", "The KV of these tokens was cached and then evicted."],
  ["checkpoint_evicted", "checkpoint evicted", "Their KV is cached, but the checkpoint behind them was evicted."],
  ["never_checkpointed", "never checkpointed", "Their KV is cached, but no state was saved behind them."],
  ["below_grid", "below the grid", "They follow the last position at which a checkpoint may be saved (--grid)."],
  ["refused", "refused", "A checkpoint was cached, but there was no memory to resume from it."],
  ["not_fetched", "not fetched", "They are in a lower tier, and loading them costs more than computing them."],
];
const TERMS = {
  "prompt tokens reused": "Share of all prompt tokens that were read from the cache and not computed again.",
  "KV": "Keys and values of the tokens in the attention layers.",
  "state": "Result of the recurrent layers after one exact prefix. It cannot be cut shorter.",
  checkpoint: "A saved state: a request can resume here.",
  "superseded checkpoint": "A deeper checkpoint continues the only branch: this one is evicted first.",
  "evicted checkpoint": "The state was saved here and then evicted; the KV may remain.",
  "KV without a state": "No checkpoint follows: no request can resume from this KV.",
  ghost: "The KV was evicted; the tokens are remembered.",
  locked: "A running request uses it: it cannot be evicted.",
  slab: "Unit of the arena: memory for one state, or for the KV of as many bytes.",
  "live sessions": "Conversations that are expected to send another request.",
  admission: "Policy that chooses the next waiting request, and its latest decision.",
  TTFT: "Time to first token, from arrival. The median is of the last 32 requests.",
  reused: "Read from the cache.",
  ...Object.fromEntries(CAUSES.map(([, label, meaning]) => [label, meaning])),
};
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const brief = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

function count(number, noun) {
  return `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;
}

// The name of a tenant's key, or the beginning of the hash of its salt.
function tenant(namespace) {
  return namespace.includes(":") ? namespace.split(":")[0] : namespace.slice(0, 8);
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) { bytes /= 1024; at += 1; }
  return `${bytes >= 100 || at === 0 ? bytes.toFixed(0) : bytes.toPrecision(3)} ${units[at]}`;
}

function seconds(value) {
  if (value == null) return "–";
  if (value < 0.0995) return `${(1000 * value).toFixed(value < 0.00995 ? 1 : 0)} ms`;
  if (value < 1) return `${(1000 * value).toFixed(0)} ms`;
  const rounded = Math.round(value);
  return value < 60 ? `${value.toPrecision(3)} s` : `${Math.floor(rounded / 60)} min ${rounded % 60} s`;
}

function percent(part, all) {
  if (!all) return "–";
  const share = 100 * part / all;
  return `${share.toFixed(share > 0 && share < 99.95 ? 1 : 0)} %`;
}

// element("p.soft", {title: "…"}, "text", child): names in props that begin with "on" are listeners.
function element(kind, props = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) made.setAttribute(name, value);
    else if (value === false || value == null) continue;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// A swatch, or another mark, with its name; the title tells the meaning.
function key(mark, label, meaning = TERMS[label]) {
  return element("span", { title: meaning }, mark, label);
}

function swatch(colour) {
  return element("i", { style: `background: ${colour}` });
}

function speak(text) {
  document.getElementById("spoken").textContent = text;
}

// What CSS makes of a custom property now, in the theme that is on.
function resolved(names) {
  const probe = element("span", { hidden: true });
  document.body.append(probe);
  const found = {};
  for (const name of names) {
    probe.style.color = `var(--${name})`;
    found[name] = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  }
  probe.remove();
  return found;
}

const rgb = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);

// Relative luminance of WCAG: above 0.179 black text has more contrast than white text.
function luminance(colour) {
  const [r, g, b] = colour.map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Steps from one colour to another through OKLab, where equal steps look equal.
function ramp(from, to, steps) {
  const gamma = (c) => 255 * Math.min(1, Math.max(0, c <= 0.0031308 ? 12.92 * c : 1.055 * c ** (1 / 2.4) - 0.055));
  const lab = (colour) => {
    const [r, g, b] = colour.map(linear);
    const l = Math.cbrt(0.4122 * r + 0.5363 * g + 0.0514 * b);
    const m = Math.cbrt(0.2119 * r + 0.6807 * g + 0.1074 * b);
    const s = Math.cbrt(0.0883 * r + 0.2817 * g + 0.63 * b);
    return [0.2105 * l + 0.7936 * m - 0.0041 * s, 1.978 * l - 2.4286 * m + 0.4506 * s, 0.0259 * l + 0.7828 * m - 0.8087 * s];
  };
  const back = ([L, a, b]) => {
    const l = (L + 0.3963 * a + 0.2158 * b) ** 3;
    const m = (L - 0.1056 * a - 0.0639 * b) ** 3;
    const s = (L - 0.0895 * a - 1.2915 * b) ** 3;
    return [4.0767 * l - 3.3077 * m + 0.231 * s, -1.2684 * l + 2.6098 * m - 0.3413 * s, -0.0042 * l - 0.7034 * m + 1.7076 * s].map(gamma).map(Math.round);
  };
  const [start, end] = [lab(from), lab(to)];
  return Array.from({ length: steps }, (_, at) => back(start.map((value, axis) => value + (end[axis] - value) * at / (steps - 1))));
}
