import os, sys, tempfile, time
import nbformat
from nbformat.v4 import new_notebook, new_markdown_cell as md, new_code_cell as code
cells=[md("""# Shapes in pictures

A small vision-language model learns to say what coloured shapes a picture shows. We draw the pictures, so we know which cells each shape
covers: do latents of an SAE find them, do those of a random one, and what does the model say when a latent is set inside a box? Needs
pillow (the extra `vision`) and a checkout of the repository, whose `examples` draw and score."""),
code("""import sys

import matplotlib.pyplot as plt

import granary
from granary import Edit, SplicedModel, VisionReader, Where

sys.path.insert(0, "..")  # the repository, where the notebook was started in its folder
from examples import shape_latents, shapes"""),
md("""## A model that says what it sees

Two shapes on noisy grey, one in each half, and a caption that names pattern and colour of both, the left one first."""),
code("""shapes.main(["shapes", "--pictures", "PICTURES", "--steps", "STEPS", "--heldout", "256"])"""),
md("""## Harvest, train

A cell of a picture is a token of the text stack, and the store says which. Held-out pictures have a store of their own."""),
code("""keys = {
    "model": "shapes/model", "corpus": "parquet", "corpus.column": "messages", "corpus.images": "images",
    "packing": "separate", "packing.seq_len": 48, "hooks.layers": LAYER, "hooks.sites": ["resid_pre"], "store.dtype": "float32",
}
store = granary.harvest(name="shapes", **keys, **{"corpus.files": "shapes/rows.parquet", "corpus.contexts": 1024})
held = granary.harvest(name="shapes_heldout", **keys, **{"corpus.files": "shapes/heldout.parquet"})
recipe = {"stream.kinds": ["image"], "sae.k": TOPK, "sae.d_latent": LATENTS, "schedule.tokens": TOKENS}
sae = granary.train(name="shapes", **recipe)"""),
md("""## Which latent is which shape?

For each pattern of a colour, the latent and threshold whose firing cells overlap best with the shapes of that name on training pictures;
printed is the intersection over union on the held-out ones. An SAE of random directions is searched by the same rule."""),
code("""(numbers, x), (held_numbers, x_held) = shape_latents.read(store, 1024), shape_latents.read(held, 256)
covers, held_covers = shape_latents.covered(numbers), shape_latents.covered(held_numbers)
scores = {}
for name, one in (("learnt", sae), ("random", shape_latents.random_like(sae, seed=0))):
    found = shape_latents.chosen(shape_latents.heat(one, x), covers)
    scores[name] = shape_latents.scored(found, shape_latents.heat(one, x_held), held_covers)
for name, found in scores.items():
    ious = sorted(one.iou for one in found.values())
    print(f"{name} SAE: IoU {ious[0]:.2f} to {ious[-1]:.2f}, half of them above {ious[len(ious) // 2]:.2f}")"""),
code("""heat = shape_latents.heat(sae, x_held)
figure, axes = plt.subplots(2, 6, figsize=(9, 3.2))
for place, (above, below) in enumerate(axes.T):
    name = shapes.scene(held_numbers[place])[0].name
    latent = scores["learnt"][name].latent
    above.imshow(shapes.drawn(held_numbers[place]))
    below.imshow(heat[place, :, latent].reshape(shapes.GRID, shapes.GRID), vmin=0, vmax=float(heat[..., latent].max()))
    below.set_title(f"latent of {name}", fontsize=7)
for one in axes.flat:
    one.axis("off")
plt.show()"""),
md("""## Set it in a box

In the box around the left shape its own latent is set to 0 and another's to its usual value; nowhere else is anything changed. The model
calls the left shape something else, and of the right one it says what it said."""),
code("""(site,) = store.hooks
model, reader, tokenizer = shape_latents.opened("shapes/model")
found = {name: one for name, one in scores["learnt"].items() if one.iou >= 0.5}
shown = [number for number in held_numbers if shapes.scene(number)[0].name in found][:5]
for number in shown:
    thing, image = shapes.scene(number)[0], shapes.drawn(number)
    own, other = found[thing.name], next(one for name, one in found.items() if name != thing.name)
    where = Where(image=0, box=shape_latents.around(thing))
    edit = Edit([own.latent, other.latent], "set", [0.0, other.value], where=where)
    steered = SplicedModel(model, sae, site, edits=[edit], pictures=reader.shown([[image]]))
    pixels = reader.processor(images=[image], return_tensors="pt").pixel_values
    print(*shapes.said_of(model, tokenizer, pixels), "->", *shapes.said_of(steered, tokenizer, pixels))"""),
md("""`python examples/shape_latents.py` does this for many pictures, against other latents ([docs/shapes.md](../docs/shapes.md))."""),
]
values=dict(one.split("=") for one in sys.argv[1].split(","))
nb=new_notebook(cells=cells)
for i,c in enumerate(nb.cells):
    c["id"]=f"cell-{i}"
    for k,v in values.items(): c["source"]=c["source"].replace(k,v)
nb.metadata={"kernelspec":{"display_name":"Python 3","language":"python","name":"python3"},"language_info":{"name":"python"}}
from nbclient import NotebookClient
os.environ["PYTHONPATH"]="/tmp/wt/shapes2"; os.environ["HF_HUB_OFFLINE"]="1"
s=time.time(); d=tempfile.mkdtemp(prefix="shapes2-nb")
NotebookClient(nb,timeout=900,resources={"metadata":{"path":d}}).execute(); print("seconds",time.time()-s)
for c in nb.cells:
    if c.cell_type!="code": continue
    c.metadata={}
    c["outputs"]=[o for o in c["outputs"] if o.get("name")!="stderr"]
    for o in c["outputs"]: print(o.get("text","")[:1500])
nbformat.write(nb,"/tmp/wt/shapes2/notebooks/shapes_in_pictures.ipynb")
import shutil; shutil.rmtree(d)
