// Numbers and times as people read them.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const whole = (value) => grouped.format(value);
export const percent = (value) => `${(100 * value).toFixed(value > 0.0005 && value < 0.0995 ? 1 : 0)}\u00a0%`;
export const fixed = (digits) => (value) => value.toFixed(digits);

/** 1234 → 1,234; 12345 → 12.3 k; small values keep a digit. */
export function rate(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value > 0 && value < 10 ? value.toFixed(1) : whole(value);
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** The unit in which the largest of some byte counts is easy to read, and its size. */
export function byteUnit(most) {
  const power = most > 0 ? Math.min(UNITS.length - 1, Math.floor(Math.log2(most) / 10)) : 0;
  return { unit: UNITS[power], size: 2 ** (10 * power) };
}

export function bytes(value) {
  const { unit, size } = byteUnit(value);
  return `${(value / size).toFixed(unit === "B" ? 0 : 1)} ${unit}`;
}

export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor(minutes / 60) % 24} h`;
}

/** The unit of a time axis that is so many seconds long. */
export function timeUnit(seconds) {
  if (seconds < 180) return { unit: "seconds", size: 1 };
  if (seconds < 3 * 3600) return { unit: "minutes", size: 60 };
  return { unit: "hours", size: 3600 };
}

export const scientific = (value) => (value === 0 ? "0" : value.toExponential(1).replace("e-", "e−").replace("e+", "e"));

export const superscript = (number) => [...String(number)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻").join("");
