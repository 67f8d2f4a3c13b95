"""``granary explain`` as a process that is killed at any place: nothing paid for is lost, nothing is asked twice."""

import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.latents.folder import Latents
from tests.cli import ForkServer
from tests.distinct_pictures import distinct_run
from tests.endpoint import Body, Reply, Stub, excerpts, stub
from tests.latents import synthetic_latents

CONCURRENCY = 2
SCORES = ("detection", "intruder", "surprisal")
KEY = "sk-hush-hush"


def answer(_: Stub, __: str, body: Body) -> Reply:
    """Explains, or judges by the length of each text; as a model of temperature 0, the same every time."""
    time.sleep(0.01)
    if "[EXPLANATION]" in body["messages"][0]["content"]:
        return f"[EXPLANATION]: {len(body['messages'][1]['content'])} letters"
    return str([len(text) % 2 for text in excerpts(body)])


def content(folder: Path) -> tuple[Any, ...]:
    """What the notes hold, without times."""
    notes = Latents.open(folder).notes
    told = [(one.latent, one.text, one.method, one.author) for one in notes.explanations()]
    scores = [
        (own.latent, one.scorer, one.value, one.low, one.high)
        for own in notes.explanations()
        for one in notes.scores(own.id)
    ]
    return sorted(told), sorted(scores)


@pytest.mark.slow
def test_kill_anywhere(stages: ForkServer, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        synthetic_latents(tmp_path / name, 4, top=20, sample=60, num_windows=1536)
    command = ["--latents", "0:3", "--test", "10", "--train", "10", "--scores", "detection"]
    is_killed_and_goes_on(stages.at(tmp_path), tmp_path, answer, command)


@pytest.mark.slow
def test_kill_anywhere_with_pictures(stages: ForkServer, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    latents = distinct_run(tmp_path / "run")
    for name in ("whole", "killed"):
        shutil.copytree(latents, tmp_path / name)
    command = ["--explainer", "pictures", "--latents", "0:6", "--test", "6"]
    is_killed_and_goes_on(stages.at(tmp_path), tmp_path, answer_of_pictures, command)


def answer_of_pictures(_: Stub, __: str, body: Body) -> Reply:
    time.sleep(0.01)
    text, *others = body["messages"][1]["content"]
    if "examples follow" in text["text"]:
        return f"[EXPLANATION]: {len(others)} parts"
    return str([len(one["image_url"]["url"]) % 2 for one in others if one["type"] == "image_url"])


def is_killed_and_goes_on(here: Any, folder: Path, answers: Any, given: list[str]) -> None:
    """Explain ``whole`` at once and ``killed`` again and again, and compare."""
    rng = random.Random(0)
    with stub(answers) as told:
        command = ["--endpoint", told.url, "--model", "m", "--concurrency", str(CONCURRENCY), *given]
        done = here.run("stage_inspect.explain", "whole", *command)
        assert done.code == 0, done.stderr
        once, told.answered = told.answered, Counter()
        assert set(once.values()) == {1}
        kills = 0
        for _ in range(4):
            child = here.start("stage_inspect.explain", "killed", *command)
            target = len(told.asked) + rng.randint(1, max(2, len(once) // 4))
            while len(told.asked) < target and child.poll() is None:
                time.sleep(0.001)
            child.kill()
            kills += child.wait() == -9
        done = here.run("stage_inspect.explain", "killed", *command)
        assert done.code == 0, done.stderr
        assert kills > 1
        assert set(told.answered) == set(once)
        # What was on its way when the process died is all that is asked again.
        assert sum(told.answered.values()) - len(once) <= kills * CONCURRENCY
        assert content(folder / "killed") == content(folder / "whole")
        before = len(told.asked)
        assert here.run("stage_inspect.explain", "killed", *command).code == 0
        assert len(told.asked) == before
        assert content(folder / "killed") == content(folder / "whole")


def test_the_key_is_in_no_file_and_no_line(stages: ForkServer, tmp_path: Path) -> None:
    synthetic_latents(tmp_path / "latents", 4, top=20, sample=60, num_windows=1536)
    with stub(lambda *_: (403, {}, f"{KEY} may not")) as told:
        child = stages.at(tmp_path).start(
            "stage_inspect.explain",
            "latents",
            "--endpoint",
            told.url,
            "--model",
            "m",
            variables={"GRANARY_API_KEY": KEY},
        )
        done = child.finish()
    assert told.headers[0]["Authorization"].endswith(KEY)
    assert done.code == 2
    assert "HTTP 403" in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_ceiling_is_one_line_and_the_same_command_goes_on(stages: ForkServer, tmp_path: Path) -> None:
    synthetic_latents(tmp_path / "latents", 4, top=20, sample=60, num_windows=1536)
    with stub(answer) as told:
        command = ["latents", "--endpoint", told.url, "--model", "m", "--latents", "0:3", "--scores"]
        done = stages.at(tmp_path).run("stage_inspect.explain", *command, "--max-tokens", "10")
        assert done.code == 2
        assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
            "error: the ceiling of tokens is reached after 0 requests and 0 tokens: all answers are kept, and the same "
            "command goes on from them"
        ]
        assert stages.at(tmp_path).run("stage_inspect.explain", *command).code == 0
        assert len(told.asked) == 3


@pytest.mark.slow
def test_a_real_server_with_a_real_model(stages: ForkServer, tmp_path: Path, realdata: Path) -> None:
    """``transformers serve`` over a small model: the protocol is real, and what the model says is no explanation.

    SERVING_PYTHON names a Python that has transformers with its extra ``serving``.
    """
    python = os.environ.get("SERVING_PYTHON")
    if python is None:
        pytest.skip("SERVING_PYTHON names no Python with transformers[serving]")
    model = tmp_path / "model"
    shutil.copytree(realdata / "stories260K-hf", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m['content'][-300:] }}\n{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "transformers.cli.transformers", "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                with suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                        break
                assert server.poll() is None
                time.sleep(0.5)
            latents = synthetic_latents(tmp_path / "latents", 4, top=20, sample=60, num_windows=1536)
            latents.notes.add_explanation(0, "letters", method="person", author="me")
            base = ["latents", "--endpoint", f"{url}/v1", "--model", str(model), "--latents", "0", "--test", "4"]
            done = stages.at(tmp_path).run("stage_inspect.explain", *base, "--train", "4", "--scores")
            assert done.code == 0, done.stderr
            assert "1 requests" in done.stdout
            done = stages.at(tmp_path).run("stage_inspect.explain", *base, "--of", "person", "--scores", *SCORES)
            assert done.code == 0, done.stderr
        finally:
            server.kill()
    notes = Latents.open(tmp_path / "latents").notes
    found = {one.scorer: one for own in notes.explanations(0) for one in notes.scores(own.id)}
    assert set(found) == set(SCORES)
    assert all(not row["again"] for one in found.values() for row in one.details["unread"])
    assert found["surprisal"].details["why"] == "the endpoint gives no log probabilities"
