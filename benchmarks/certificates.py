"""Whether graphs predict ablations, over twelve prompts: `python benchmarks/certificates.py RUN [--model PATH]`.

For each prompt the ten most influential features are set to zero one by one, and what the graph's edges predict for the
first logit is ranked against what the model does: with attention patterns and norm factors held, with norm factors
held, and with everything free. The ceiling ranks the model's response with norms held against its free one. A hundred
are set to zero with everything free, and their influence is ranked against the divergence of the next token's
distribution. Prompts are of code, or with `--stories` of children's stories. With `--least 0.7` the command fails
unless the mean with both held, the figure that a graph's page leads with, is above that.
"""

import argparse
from statistics import mean, median

from shared.lm import load_causal_lm, load_tokenizer
from stage_trace.certificate import MEASURED
from stage_trace.trace import trace

CODE = (
    "def read(self, path):\n    with open(path) as",
    "class Foo(Base):\n    def __init__(self, name):\n        self.name =",
    "try:\n    import json\nexcept",
    "for i in range(10):\n    print(",
    "def add(a, b):\n    return a +",
    "if x is None:\n    raise ValueError(",
    "import os\n\ndef main():\n    path = os.path.",
    "while True:\n    try:\n        line = f.readline()\n        if not line:\n            ",
    "def test_equal(self):\n    self.assertEqual(a,",
    "from collections import",
    "x = [1, 2, 3]\nfor item in",
    "    def __repr__(self):\n        return '<%s>' % self.",
)
STORIES = (
    "Once upon a time, there was a little",
    "Lily went to the park with her",
    "The dog was very happy. He wanted to play with the",
    "Tom and his mom went to the",
    "She saw a big red",
    "One day, a little girl named Lily found a",
    "The cat sat on the",
    '"I am sorry," said the',
    "They played together and had a lot of",
    "He was sad because he lost his",
    "The bird flew up into the",
    'Mom said, "Do not touch the',
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="dictionaries, as granary trace takes them")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--stories", action="store_true")
    parser.add_argument("--prompts", type=int, default=12, help="only so many, from the first")
    parser.add_argument("--least", type=float, help="fail unless the mean rank correlation with both held is above")
    options = parser.parse_args()
    model, tokenizer = load_causal_lm(options.model), load_tokenizer(options.model)
    rows = []
    for text in (STORIES if options.stories else CODE)[: options.prompts]:
        graph = trace(model, options.run, text, tokenizer=tokenizer)
        certificate, strict = graph.certify(10, 100), graph.scores["strict"]
        found = [certificate.rank_correlation(mode) or 0.0 for mode in MEASURED]
        found += [certificate.ceiling() or 0.0, certificate.influence_correlation() or 0.0]
        rows.append([*found, strict.replacement, strict.completeness])
        told = "  ".join(f"{value:5.2f}" for value in rows[-1])
        print(f"{told}  gap {graph.worst_gap:.0e}  {text[-40:]!r} -> {graph.logits[0].text!r}", flush=True)
    print("both held, norms held, all free; ceiling; influence and KL, all free; strict replacement, completeness")
    for name, of in (("mean", mean), ("median", median)):
        print("  ".join(f"{of(column):5.2f}" for column in zip(*rows, strict=True)), name)
    held = mean(row[0] for row in rows)
    if options.least is not None and not held > options.least:
        raise SystemExit(f"{held:.2f} with both held is not above {options.least}")


if __name__ == "__main__":
    main()
