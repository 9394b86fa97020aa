// Numbers with their units, as people read them.
const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const DIGITS = [0, 1, 2, 3].map((digits) => new Intl.NumberFormat("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

export const NONE = "–";

export const whole = (value) => (value === null || value === undefined ? NONE : WHOLE.format(value));

export const fixed = (value, digits) => (value === null || value === undefined ? NONE : DIGITS[digits].format(value));

/** A number with about three digits: 0.04, 3.51, 27.4, 1,312. */
export function short(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.005) return value.toExponential(1);
  return fixed(value, size < 10 ? 2 : size < 100 ? 1 : 0);
}

/** A count in a small space: 950, 12.4 k, 3.1 M. */
export function compact(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (size >= unit) return `${short(value / unit)}\u00a0${name}`;
  return Number.isInteger(value) ? whole(value) : short(value);
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  for (const [unit, name] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (value >= unit) return `${short(value / unit)}\u00a0${name}`;
  return `${whole(value)}\u00a0B`;
}

/** A duration: 340 µs, 12.3 ms, 4.5 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return NONE;
  if (seconds === 0) return "0\u00a0s";
  if (seconds < 1e-3) return `${short(seconds * 1e6)}\u00a0µs`;
  if (seconds < 1) return `${short(seconds * 1e3)}\u00a0ms`;
  if (seconds < 60) return `${fixed(seconds, seconds < 10 ? 1 : 0)}\u00a0s`;
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([unit]) => seconds >= unit);
  const [[unit, name], [nextUnit, nextName]] = [parts[first], parts[first + 1]];
  const rest = Math.floor((seconds % unit) / nextUnit);
  return `${Math.floor(seconds / unit)} ${name}${rest ? `\u00a0${rest}\u00a0${nextName}` : ""}`;
}

/** A duration in one unit, for an axis. */
export function span(seconds) {
  const [unit, name] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([size]) => seconds >= size) ?? [1, "s"];
  return `${Number((seconds / unit).toFixed(1))}\u00a0${name}`;
}

export const ago = (seconds) => (seconds === null || seconds === undefined || seconds < 0 ? NONE : seconds < 1 ? "now" : `${seconds < 60 ? `${Math.floor(seconds)}\u00a0s` : duration(seconds)} ago`);

export const clock = (unixS) => CLOCK.format(new Date(unixS * 1000));

export const percent = (share) => (share === null || share === undefined ? NONE : `${fixed(100 * share, share && share < 0.1 ? 1 : 0)}%`);

export const tableName = (name) => name || "default";
