// Sorting and filtering a quarter of a million rows between two frames: radix sort of typed arrays, one pass to filter.

const FLIP = new Uint32Array(1);
const AS_FLOAT = new Float32Array(FLIP.buffer);

/** Keys whose order as unsigned integers is that of the values; what is no number comes last in both directions. */
function keys(column, descending) {
  const found = new Uint32Array(column.length);
  if (column instanceof Uint32Array) {
    for (let row = 0; row < column.length; row += 1) found[row] = descending ? ~column[row] : column[row];
    return found;
  }
  for (let row = 0; row < column.length; row += 1) {
    AS_FLOAT[0] = column[row] + 0; // minus zero is zero
    if (Number.isNaN(column[row])) {
      found[row] = 0xffffffff;
      continue;
    }
    const bits = FLIP[0];
    const key = bits & 0x80000000 ? ~bits >>> 0 : (bits | 0x80000000) >>> 0;
    found[row] = descending ? ~key : key;
  }
  return found;
}

/** Rows in the order of a column, as row numbers; rows that are equal stay in the order of their numbers. */
export function order(column, descending) {
  const sorted = keys(column, descending);
  let rows = Uint32Array.from(sorted, (_, row) => row);
  let other = new Uint32Array(rows.length);
  for (const shift of [0, 16]) {
    const starts = new Uint32Array(65537);
    for (let row = 0; row < sorted.length; row += 1) starts[((sorted[row] >>> shift) & 0xffff) + 1] += 1;
    for (let digit = 0; digit < 65536; digit += 1) starts[digit + 1] += starts[digit];
    for (let place = 0; place < rows.length; place += 1) {
      const digit = (sorted[rows[place]] >>> shift) & 0xffff;
      other[starts[digit]] = rows[place];
      starts[digit] += 1;
    }
    [rows, other] = [other, rows];
  }
  return rows;
}

/** Those of `rows` whose value in every column lies within its bounds (both included) and that `wanted`, a set, has. */
export function filter(rows, bounds, wanted) {
  const kept = new Uint32Array(rows.length);
  let count = 0;
  for (let place = 0; place < rows.length; place += 1) {
    const row = rows[place];
    let within = !wanted || wanted.has(row);
    for (let index = 0; within && index < bounds.length; index += 1) {
      const { column, low, high } = bounds[index];
      within = column[row] >= low && column[row] <= high;
    }
    if (within) kept[count++] = row;
  }
  return kept.subarray(0, count);
}

/** A bound's text as numbers: "3..5", "3..", "..5", or "4" alone. */
export function bounds(text) {
  const [low, high] = text.includes("..") ? text.split("..") : [text, text];
  const number = (part, otherwise) => (part.trim() === "" || Number.isNaN(Number(part)) ? otherwise : Number(part));
  return [number(low, -Infinity), number(high, Infinity)];
}
