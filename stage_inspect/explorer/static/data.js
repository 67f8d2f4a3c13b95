// Where the pages get their data: a server, files beside this page on any web host, or the page itself.
// All three hold the same documents under the same paths, so nothing else here knows which it is.

const ARRAYS = { f4: Float32Array, u4: Uint32Array };
const KEPT = 64;

/** The data of this page; raises an Error with a sentence for the reader where there is none. */
export async function open(base = "") {
  const inside = document.getElementById("granary-data");
  const source = new Source(inside ? embedded(JSON.parse(inside.textContent)) : fetched(base), base);
  source.meta = JSON.parse(text(await source.read("meta.json")));
  return source;
}

class Source {
  constructor(read, base) {
    this.read = read;
    this.base = base;
    this.meta = null;
    this.kept = new Map();
  }

  /** Whether latent `index` is one that these pages hold. */
  has(index) {
    const { d_latent, only } = this.meta;
    return Number.isInteger(index) && index >= 0 && index < d_latent && (!only || only.includes(index));
  }

  /** All that is known of one latent. */
  async latent(index) {
    const { chunk } = this.meta;
    if (!chunk) return this.json(`latent/${index}.json`);
    return (await this.json(`latents/${Math.floor(index / chunk)}.json.gz`))[String(index)];
  }

  /** One number for each latent, as a typed array. */
  column(name) {
    const { dtype } = this.meta.columns.find((column) => column.name === name);
    return this.keep(`column/${name}`, async () => {
      const bytes = await this.read(`column/${name}.${dtype}${this.meta.chunk ? ".gz" : ""}`);
      return new ARRAYS[dtype](bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
    });
  }

  /** Name and strongest tokens of the latents of one block of `meta.block` rows. */
  rows(block) {
    return this.json(`rows/${block}.json${this.meta.chunk ? ".gz" : ""}`);
  }

  /** The strongest examples behind those that `latent` gives; a server alone has them. */
  more(index) {
    return this.json(`more/${index}.json`);
  }

  /** A thumbnail, as the address of an image that asks nobody. */
  picture(digest) {
    return this.keep(`picture/${digest}`, async () => {
      const bytes = await this.read(`picture/${digest}.webp`);
      return `data:image/webp;base64,${btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))}`;
    });
  }

  /** Concepts that were searched for, with their latents. */
  async concepts() {
    return JSON.parse(text(await this.read(`concepts.json${this.meta.chunk ? ".gz" : ""}`)));
  }

  /** Latents whose names or explanations have the words of `query`, best first. */
  async search(query) {
    if (!this.meta.chunk) return this.ask(`search?q=${encodeURIComponent(query)}`);
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const names = await this.json("names.json.gz");
    const found = names.filter(([, name]) => words.every((word) => name.toLowerCase().includes(word)));
    return { latents: found.map(([latent]) => latent), total: found.length };
  }

  /** Another dictionary that the same server shows. */
  sibling(number) {
    return this.keep(`sibling ${number}`, () => open(`with/${number}/`));
  }

  json(path) {
    return this.keep(path, async () => JSON.parse(text(await this.read(path))));
  }

  /** What `make` gives for `key`, made once; a failure isn't kept, and of many documents the oldest are dropped. */
  keep(key, make) {
    if (!this.kept.has(key)) {
      const made = make();
      this.kept.set(key, made);
      made.catch(() => this.kept.delete(key));
      const documents = [...this.kept.keys()].filter((one) => one.endsWith(".json"));
      if (documents.length > KEPT) this.kept.delete(documents[0]);
    }
    return this.kept.get(key);
  }

  /** Forget a document that was changed. */
  forget(path) {
    this.kept.delete(path);
  }

  /** The server's live answer; with a body it is a POST. */
  async ask(path, body, signal) {
    const post = body === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    };
    let answer;
    try {
      answer = await fetch(`${this.base}api/${path}`, { signal, ...post });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer: is granary explore still running?");
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(content.error ?? `The server answered ${answer.status}.`);
    return content;
  }
}

/** Reads files below `base`. */
function fetched(base) {
  return async (path) => {
    let answer;
    try {
      answer = await fetch(`${base}data/${path}`);
    } catch {
      throw new Error("The data cannot be read: is the server still running?");
    }
    if (!answer.ok) throw new Error(answer.status === 404 ? "There is no such page."
        : `The data cannot be read (${answer.status}).`);
    return unpacked(new Uint8Array(await answer.arrayBuffer()));
  };
}

/** Reads out of a table of path to base64 of gzip. */
function embedded(files) {
  return async (path) => {
    const packed = files[path] ?? files[`${path}.gz`];
    if (packed === undefined) throw new Error("This page does not hold that.");
    return unpacked(Uint8Array.from(atob(packed), (sign) => sign.charCodeAt(0)));
  };
}

/** The bytes, whether or not the host has undone the gzip on its own account. */
async function unpacked(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function text(bytes) {
  return new TextDecoder().decode(bytes);
}
