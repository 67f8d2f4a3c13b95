"""What is marked beside a key: part of a run's identity, shared by the runs of a job, part of a sweep folder's name."""

from dataclasses import dataclass, field

from hydra import compose

from shared.basics.config import Marks, key, marks
from stage_train.config import TrainSchema, unnamed_keys
from stage_train.state.identity import FREE, SHARED, identity, shared_keys


@dataclass(kw_only=True)
class Inner:
    plain: int = 1
    free: int = key(identity=False)
    shared: int = key(shared=True)


@dataclass(kw_only=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    whole: Inner = key(Inner, identity=False, named=False)


def test_a_group_marks_all_its_keys() -> None:
    assert dict(marks(Outer)) == {
        "inner.plain": Marks(),
        "inner.free": Marks(identity=False),
        "inner.shared": Marks(shared=True),
        "whole.plain": Marks(identity=False, named=False),
        "whole.free": Marks(identity=False, named=False),
        "whole.shared": Marks(identity=False, shared=True, named=False),
    }


def of(*starts: str) -> set[str]:
    """Keys of the schema that are one of these, or in a group of that name."""
    return {name for name, _ in marks(TrainSchema) for start in starts if f"{name}.".startswith(f"{start}.")}


def test_what_may_change_between_the_parts_of_a_run() -> None:
    free = of(
        "name", "run_dir", "sae_name", "out_dir", "nproc", "packed", "at_layer", "store.url", "store.others",
        "store.beside", "checkpoint", "logger", "device", "compute.kernels", "parallel", "optim.micro_batch",
        "stream.prefetch_gib", "stream.io_threads", "stream.buffer", "stream.on_damage",
    )  # fmt: skip
    assert free == FREE


def test_what_the_runs_of_a_job_share() -> None:
    assert of("nproc", "store", "stream", "parallel", "device") == SHARED
    assert shared_keys({"nproc": 2, "sae": {"k": 3}, "stream": {"lanes": 64}}) == {"nproc": 2, "stream.lanes": 64}


def test_what_the_folders_of_a_sweep_do_not_name() -> None:
    assert sorted(unnamed_keys()) == sorted(
        [
            "name",
            "run_dir",
            "sae_name",
            "nproc",
            "packed",
            "store.url",
            "device.threads",
            "device.name",
            "logger.progress",
        ]
    )


def test_a_key_that_begins_like_a_free_one_is_not_free() -> None:
    assert identity({"name": "a", "name_of_method": "b", "checkpoints": 3, "checkpoint": {"keep": 1}}) == {
        "name_of_method": "b",
        "checkpoints": 3,
    }


def test_hydra_leaves_them_out_of_the_name(train_configs: None) -> None:
    overrides = ["name=mine", "sae.k=8", "device.threads=1", "store.url=s3://a/b", "optim.lr=0.01"]
    cfg = compose("train", overrides=overrides, return_hydra_config=True)
    assert cfg.hydra.job.override_dirname == "optim.lr=0.01,sae.k=8"


def test_a_younger_key_at_its_old_meaning_leaves_a_run_the_id_it_had() -> None:
    config = {"seed": 1, "reads": None, "writes": None, "variant": {"kind": "sae"}}
    assert identity(config) == {"seed": 1}
    other = {"seed": 1, "reads": ["a"], "writes": "b", "variant": {"kind": "transcoder"}}
    assert identity(other) == {"seed": 1, "reads": ["a"], "writes": "b", "variant.kind": "transcoder"}
