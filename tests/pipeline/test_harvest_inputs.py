"""What decides the tokens and the mask beside the text: special tokens, templates, dates; and a harvest made again."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.store import Store
from tests.cli import ForkServer
from tests.harvesting import Harvester, T

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
CHAT = [{"role": "user", "content": "what is a sparse code"}, {"role": "assistant", "content": "few active units"}]


@pytest.fixture(scope="module")
def harvester(stages: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Harvester:
    root = tmp_path_factory.mktemp("inputs")
    return Harvester(root, stages.at(root))


def chat_model(harvester: Harvester, name: str, template: str, *, has_bos: bool = True) -> dict[str, int]:
    """A model whose tokenizer has chat marks as special added tokens that no named role holds, as Llama 3 and Qwen."""
    folder = harvester.root / name
    shutil.copytree(harvester.model, folder, dirs_exist_ok=True)
    file = folder / "tokenizer.json"
    # In place of two ordinary tokens: the model's vocabulary stays as it is.
    marks = ["<|im_start|>", "<|im_end|>"]
    spec = json.loads(file.read_text())
    vocabulary = spec["model"]["vocab"]
    rare = sorted(vocabulary, key=vocabulary.get)[-2:]
    ids = {mark: vocabulary.pop(old) for mark, old in zip(marks, rare, strict=True)}
    vocabulary.update(ids)
    spec["model"]["merges"] = [pair for pair in spec["model"].get("merges", []) if "".join(pair) not in rare]
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": number, "content": mark, **fields} for mark, number in ids.items()]
    file.write_text(json.dumps(spec))
    (folder / "chat_template.jinja").write_text(template)
    if not has_bos:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.update(bos_token=None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ids


def chats(harvester: Harvester) -> dict[str, object]:
    """The corpus of one short chat, again and again."""
    (harvester.root / "chat.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 12)
    return {
        "corpus": "jsonl",
        "corpus__files": harvester.root / "chat.jsonl",
        "corpus__separator": None,
        "corpus__field": "messages",
    }


def test_chat_marks_are_not_trained_on(harvester: Harvester) -> None:
    ids = chat_model(harvester, "marked", CHATML)
    store = harvester.harvest("marked-store", model=harvester.root / "marked", **chats(harvester))
    tokens, mask = store.tokens(range(store.num_contexts)), store.mask(range(store.num_contexts))
    is_mark = np.isin(tokens, list(ids.values()))
    assert is_mark.sum() > 20
    assert not (is_mark & mask).any()
    assert mask.any()


def test_the_first_position_of_a_document_without_bos_is_masked(harvester: Harvester) -> None:
    chat_model(harvester, "no-bos", CHATML, has_bos=False)
    store = harvester.harvest("no-bos-store", model=harvester.root / "no-bos", packing__mask_special="false")
    contexts = range(store.num_contexts)
    segments, mask = store.segments(contexts), store.mask(contexts)
    first = np.diff(segments, axis=1, prepend=-2) != 0
    assert (mask == (~first & (segments >= 0))).all()
    assert store.plan.provenance["packing"]["mask_first"] == 1
    with_bos = harvester.harvest("with-bos")
    assert "mask_first" not in with_bos.plan.provenance["packing"]
    assert "chat" not in with_bos.plan.provenance["tokenizer"]


def test_template_and_date_are_in_the_plan_where_chats_are(harvester: Harvester) -> None:
    chat_model(harvester, "dated", DATED)
    changes = {"model": harvester.root / "dated", **chats(harvester)}
    first = harvester.harvest("day-one", **changes, chat__date="2025-01-02")
    assert first.plan.provenance["tokenizer"]["chat"]["date"] == "2025-01-02"
    again = harvester.harvest("day-one-again", **changes, chat__date="2025-01-02")
    assert again.digest() == first.digest()
    other = harvester.harvest("day-two", **changes, chat__date="2025-01-03")
    assert other.plan.hash() != first.plan.hash()
    assert (other.tokens([0]) != first.tokens([0])).any()
    # Continued on another day, a store keeps its own.
    assert harvester.run("day-one", **changes).code == 0
    error = harvester.run("day-one", **changes, chat__date="2025-01-03").error
    assert "provenance.tokenizer.chat.date is 2025-01-02, not 2025-01-03" in error
    # An edited template with the same tokenizer, and other variables, are another harvest.
    (harvester.root / "dated" / "chat_template.jinja").write_text(DATED + " ")
    assert "chat.template_hash is" in harvester.run("day-one", **changes).error
    (harvester.root / "dated" / "chat_template.jinja").write_text(DATED)
    assert "chat.variables" in harvester.run("day-one", **changes, chat__variables="{loud: true}").error


def test_chats_of_a_column_are_those_of_json_lines(harvester: Harvester) -> None:
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    chat_model(harvester, "tools", template)
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "get", "arguments": {"c": "R"}}}],
    }
    rows = [[CHAT[0], call, CHAT[1]], CHAT] * 6
    (harvester.root / "tools.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"messages": pa.array(rows)}), harvester.root / "tools.parquet")
    common = {"model": harvester.root / "tools", "corpus__separator": None}
    lines = harvester.harvest(
        "lines", **common, corpus="jsonl", corpus__files=harvester.root / "tools.jsonl", corpus__field="messages"
    )
    column = harvester.harvest(
        "column", **common, corpus="parquet", corpus__files=harvester.root / "tools.parquet", corpus__column="messages"
    )
    assert (lines.tokens(range(lines.num_contexts)) == column.tokens(range(column.num_contexts))).all()


def test_a_model_without_a_tokenizer_is_harvested_from_ids(harvester: Harvester) -> None:
    folder = harvester.root / "bare"
    shutil.copytree(harvester.model, folder, ignore=shutil.ignore_patterns("*token*"))
    games = np.random.default_rng(0).integers(3, 60, (16, T)).astype(np.int32)
    np.save(harvester.root / "games.npy", games)
    changes = {"corpus": "tokens", "corpus__files": harvester.root / "games.npy", "corpus__separator": None}
    store = harvester.harvest("games", model=folder, packing__bos="none", **changes)
    assert (store.tokens(range(16)) == games).all()
    assert store.plan.provenance["tokenizer"]["hash"] is None
    error = harvester.run("text", model=folder)
    assert error.code == 2
    assert "has no tokenizer: " in error.stderr.splitlines()[-1]


def test_a_comma_list_of_layers_is_one_harvest(harvester: Harvester) -> None:
    store = harvester.harvest("listed", hooks__layers="0,2", hooks__sites="resid_post,attn_in")
    assert sorted(store.hooks) == sorted(f"layers.{n}.{site}" for n in (0, 2) for site in ("resid_post", "attn_in"))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in [folder, *folder.rglob("*")]
    }


def test_a_finished_harvest_made_again_writes_nothing(harvester: Harvester) -> None:
    harvester.harvest("finished")
    before = contents(harvester.root / "finished")
    result = harvester.run("finished")
    assert result.code == 0, result.stderr
    assert "contexts are in the store already" in result.stderr
    assert "next      python -m stage_train" in result.stderr
    assert contents(harvester.root / "finished") == before


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs to mount a folder read-only")
def test_a_finished_harvest_on_a_read_only_mount(harvester: Harvester) -> None:
    harvester.harvest("sealed")
    store = harvester.root / "sealed"
    if os.system(f"unshare -m sh -c 'mount --bind {store} {store} && mount -o remount,ro,bind {store}' 2>/dev/null"):
        pytest.skip("no right to mount")
    command = " ".join([f"{sys.executable} -m stage_harvest", *harvester.arguments("sealed")])
    mount = f"mount --bind {store} {store} && mount -o remount,ro,bind {store}"
    inside = f"{mount} && cd {harvester.root} && {command}"
    assert os.system(f'unshare -m sh -c "{inside}"') == 0
    assert Store.open(store).complete


def test_a_signed_url_leaves_no_signature_and_may_be_signed_anew(harvester: Harvester, tmp_path: Path) -> None:
    first, again = (tmp_path / f"c.txt?X-Amz-Date={day}&X-Amz-Signature=hush{day}" for day in (1, 2))
    first.write_text(harvester.corpus.read_text())
    keys = {"run_dir": tmp_path / "run", "store__url": tmp_path / "store"}
    one = harvester.run(**keys, corpus__files=f"'{first}'")
    assert one.code == 0, one.stderr
    first.rename(again)
    two = harvester.run(**keys, corpus__files=f"'{again}'")
    assert two.code == 0, two.stderr
    assert "harvested" not in two.stderr
    for file in [path for folder in ("run", "store") for path in (tmp_path / folder).rglob("*") if path.is_file()]:
        assert b"hush" not in file.read_bytes(), file
    assert "hush" not in one.stdout + one.stderr
