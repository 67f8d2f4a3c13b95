// A latent by chance, and the one after another.

/** One of those that fired, each as likely as any other. */
export async function randomLatent(source) {
  const fired = await source.column("fired");
  const { only } = source.meta;
  const alive = (only ?? [...fired.keys()]).filter((index) => fired[index] > 0);
  return (alive.length ? alive : only ?? [0])[Math.floor(Math.random() * Math.max(1, alive.length))];
}

/** The latent before (-1) or after (+1) `index` among those that these pages hold; null at the end. */
export function beside(source, index, step) {
  const { only, d_latent } = source.meta;
  if (only) return only[only.indexOf(index) + step] ?? null;
  const next = index + step;
  return next >= 0 && next < d_latent ? next : null;
}
