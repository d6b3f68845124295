"""A run from folders: dataset, nano student, cached teacher."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spatial_forcing.commands.train import ExportOptions, export
from spatial_forcing.data import Dataset, DatasetWriter
from spatial_forcing.data.augment import Augment
from spatial_forcing.errors import ConfigError, DataError
from spatial_forcing.forcing import ForcingConfig
from spatial_forcing.serving.policy import describe
from spatial_forcing.students import LoraSettings, NanoConfig, Pi0Config, load_student
from spatial_forcing.students.parity import example_observations
from spatial_forcing.teachers.cache import CachedTeacher
from spatial_forcing.teachers.cache.build import build_cache
from spatial_forcing.teachers.cache.source import dataset_source
from spatial_forcing.training import OptimConfig, TrainConfig, build_parts, train
from spatial_forcing.training.parts import hold_out, select_episodes, share_of
from tests.fakes import CAMERAS, FakeTeacher
from tests.students.openvla_oft.small import small_config as oft_config
from tests.students.pi0_fixtures import small_config as pi0_config
from tests.training.fake_run import curve, weights


class OtherTeacher(FakeTeacher):
    name, licence, fingerprint = "other", "MIT", "1" * 64


STUDENT = NanoConfig(
    cameras=CAMERAS, image_size=16, patch_size=8, width=32, depth=2, heads=2, chunk=2, dropout=0.1
)
LENGTHS = (5, 7, 6, 5, 8)


def record(root, seed=0, size=20, width=None):
    rng = np.random.default_rng(seed)
    writer = DatasetWriter.create(
        root, fps=20, cameras=dict.fromkeys(CAMERAS, (size, width or size)), state_dim=4, action_dim=4
    )
    for episode, length in enumerate(LENGTHS):
        for _ in range(length):
            images = {
                camera: rng.integers(0, 255, (size, width or size, 3), dtype=np.uint8) for camera in CAMERAS
            }
            numbers = rng.normal(size=(2, 4)).astype(np.float32)
            writer.add_frame(
                {"images": images, "state": numbers[0], "action": numbers[1]}, task=f"task {episode % 2}"
            )
        writer.save_episode()
    writer.finalize()
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    dataset = Dataset.open(record(root / "data"))
    build_cache(FakeTeacher(), dataset_source(dataset, CAMERAS), root / "cache", progress=False)
    return root


def make_config(folders, output, alpha=0.5, **settings):
    defaults = {"dataset": folders / "data", "cache": folders / "cache", "teacher": "fake", "steps": 4}
    defaults |= {"student": STUDENT, "forcing": ForcingConfig(alpha=alpha)}
    return TrainConfig(
        output=output,
        batch_size=4,
        save_every=2,
        log_every=1,
        optim=OptimConfig(warmup_steps=1),
        trackers=(),
        progress=False,
        cpu=True,
        **{**defaults, **settings},
    )


def test_matched_arms_have_the_same_start_and_batches(folders, tmp_path):
    control, forced = (build_parts(make_config(folders, tmp_path, alpha)) for alpha in (0.0, 0.5))
    assert control.teacher is None
    assert forced.teacher.name == "fake"
    a, b = control.student.state_dict(), forced.student.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    for one, two in zip(control.batches.iterate(0, 3), forced.batches.iterate(0, 3), strict=True):
        assert all(torch.equal(one[k], two[k]) if torch.is_tensor(one[k]) else one[k] == two[k] for k in one)


def test_a_run_from_folders_resumes_exactly(folders, tmp_path):
    whole = train(make_config(folders, tmp_path / "whole"))

    def kill(saved):
        if saved.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(folders, tmp_path / "killed"), on_checkpoint=kill)
    resumed = train(make_config(folders, tmp_path / "killed"))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    a, b = weights(whole.policy), weights(resumed.policy)
    assert all(torch.equal(a[key], b[key]) for key in a)
    observation = {
        "images": {camera: np.zeros((20, 30, 3), np.uint8) for camera in CAMERAS},
        "state": np.zeros(4, np.float32),
        "task": "task 0",
    }
    assert load_student(whole.policy).act([observation]).shape == (1, 2, 4)


@pytest.mark.parametrize(("alpha", "teacher"), [(0.5, "fake"), (0.0, "none")])
def test_a_policy_says_which_teacher_trained_it(folders, tmp_path, alpha, teacher):
    result = train(make_config(folders, tmp_path / "run", alpha=alpha))
    found = describe(load_student(result.policy), result.policy)
    assert (found["teacher"], found["licence"]) == (teacher, "not stated in the checkpoint's README.md")
    assert ("Apache-2.0" in found["teacher_licence"]) == (teacher == "fake")
    export(ExportOptions(tmp_path / "run", tmp_path / "exported"))
    assert describe(load_student(tmp_path / "exported"), tmp_path / "exported")["teacher"] == teacher
    assert (tmp_path / "exported" / "README.md").read_text().endswith("\n")


@pytest.fixture(scope="module")
def two_caches(folders):
    source = dataset_source(Dataset.open(folders / "data"), CAMERAS)
    build_cache(OtherTeacher(dim=12, depth=2), source, folders / "other", progress=False)
    named = {"geometry": folders / "cache", "semantics": folders / "other"}
    return {"teacher": None, "cache": None, "caches": named}


def test_a_run_with_two_cached_teachers_resumes_exactly_and_names_both(folders, two_caches, tmp_path):
    method = ForcingConfig(weights=(1.0, 0.25))
    whole = train(make_config(folders, tmp_path / "whole", forcing=method, **two_caches))

    def kill(saved):
        if saved.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(folders, tmp_path / "killed", forcing=method, **two_caches), on_checkpoint=kill)
    train(make_config(folders, tmp_path / "killed", forcing=method, **two_caches))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    found = describe(load_student(whole.policy), whole.policy)
    assert (found["teacher"], found["teacher_licence"]) == ("fake + other", "Apache-2.0 + MIT")
    with pytest.raises(ConfigError, match=r"whole.*caches\.geometry"):
        train(make_config(folders, tmp_path / "whole"))


def test_caches_by_label_are_checked_like_one(folders, two_caches, tmp_path):
    named = make_config(folders, tmp_path, **two_caches, teachers={"geometry": "vggt-nano"})
    with pytest.raises(ConfigError, match="features of 'fake', and teacher is 'vggt-nano'"):
        build_parts(named)
    parts = build_parts(make_config(folders, tmp_path, **{**two_caches, "future": 2}))
    assert {label: t.donors(np.array([0])).tolist() for label, t in parts.teacher.items()} == {
        "geometry": [2],
        "semantics": [2],
    }
    missing = make_config(folders, tmp_path, **{**two_caches, "caches": {"geometry": tmp_path / "none"}})
    with pytest.raises(ConfigError, match=r"caches\.geometry.*none.*does not exist"):
        missing.check_paths()


def test_a_later_frame_is_the_target_only_where_asked(folders, tmp_path):
    same, later = (build_parts(make_config(folders, tmp_path, future=future)).teacher for future in (0, 2))
    keys = np.array([0, 4])
    assert isinstance(same, CachedTeacher)
    assert later.donors(keys).tolist() == [2, 4]  # the first episode has five frames
    with pytest.raises(ConfigError, match=r"future is 2 frames.*cache build"):
        build_parts(make_config(folders, tmp_path, future=2, cache=None))
    with pytest.raises(ConfigError, match="future is -1"):
        make_config(folders, tmp_path, future=-1)


def test_a_saved_policy_can_be_fine_tuned(folders, tmp_path):
    first = train(make_config(folders, tmp_path / "first", alpha=0.0))
    config = make_config(folders, tmp_path / "second", init_from=first.policy)
    start = build_parts(config).student.state_dict()
    assert all(torch.equal(start[key], value) for key, value in weights(first.policy).items())


def adapters_config(folders, output, base, **settings):
    lora = LoraSettings(rank=2, dropout=0.1)
    return make_config(folders, output, init_from=base, lora=lora, **settings)


def test_a_run_with_lora_resumes_exactly_and_exports_both_forms(folders, tmp_path):
    base = train(make_config(folders, tmp_path / "base", alpha=0.0)).policy
    whole = train(adapters_config(folders, tmp_path / "whole", base))

    def kill(saved):
        if saved.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(adapters_config(folders, tmp_path / "killed", base), on_checkpoint=kill)
    resumed = train(adapters_config(folders, tmp_path / "killed", base))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for name in ("adapter_model", "trained"):
        a, b = (load_file(run.policy / f"{name}.safetensors") for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a)
    export(ExportOptions(whole.folder, tmp_path / "merged"))
    export(ExportOptions(whole.folder, tmp_path / "adapter", form="adapter"))
    merged, adapter = load_student(tmp_path / "merged"), load_student(tmp_path / "adapter")
    assert sorted(weights(base)) == sorted(weights(tmp_path / "merged"))
    seen = example_observations(STUDENT)
    torch.testing.assert_close(merged.act(seen), adapter.act(seen), atol=1e-5, rtol=1e-4)
    assert not torch.equal(merged.act(seen), load_student(base).act(seen))


def test_lora_needs_a_base(folders, tmp_path):
    with pytest.raises(ConfigError, match="Name the student to fine-tune"):
        adapters_config(folders, tmp_path, None)


def test_accumulation_divides_the_samples_of_a_step(folders, tmp_path):
    whole = build_parts(make_config(folders, tmp_path, 0.0)).batches
    halves = build_parts(make_config(folders, tmp_path, 0.0, gradient_accumulation=2)).batches
    for step in range(3):
        parts = [halves.batch(2 * step + i)["index"] for i in range(2)]
        assert torch.equal(whole.batch(step)["index"], torch.cat(parts))


def test_the_cache_of_another_dataset_is_refused(folders, tmp_path):
    record(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="cache"):
        build_parts(make_config(folders, tmp_path / "run", dataset=tmp_path / "other"))


def test_the_cache_of_another_teacher_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="features of 'fake', and teacher is 'vggt-nano'"):
        build_parts(make_config(folders, tmp_path, teacher="vggt-nano"))


def test_fractions_are_nested_and_take_the_same_part_of_each_task(folders, tmp_path):
    dataset = Dataset.open(folders / "data")
    chosen = [
        select_episodes(dataset, make_config(folders, tmp_path, fraction=fraction, seed=seed))
        for fraction, seed in [(0.3, 0), (0.5, 1), (1.0, 2)]
    ]
    assert set(chosen[0]) <= set(chosen[1]) <= set(chosen[2]) == set(range(len(LENGTHS)))
    tasks = [sorted(dataset.episodes[number].task for number in numbers) for numbers in chosen]
    assert tasks[0] == ["task 0", "task 1"]
    assert tasks[1] == ["task 0", "task 0", "task 1"]
    batches = build_parts(make_config(folders, tmp_path, 0.0, fraction=0.3)).batches
    seen = {int(e) for step in range(6) for e in batches.batch(step)["episode_index"]}
    assert seen == set(chosen[0])


def test_a_share_is_exact_where_floating_point_is_not():
    assert [share_of(f, n) for f, n in [(0.28, 50), (0.07, 100), (0.05, 24), (1e-9, 9), (1.0, 7)]] == [
        14, 7, 2, 1, 7
    ]  # fmt: skip
    for percent in range(1, 101):
        for count in range(1, 300):
            assert share_of(percent / 100, count) == -(-percent * count // 100)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_held_out_episodes_are_a_part_of_each_task_and_nothing_trains_on_them(folders, tmp_path, share):
    dataset = Dataset.open(folders / "data")
    kept, held = hold_out(dataset, share)
    assert sorted(kept + held) == list(range(len(LENGTHS)))
    assert {dataset.episodes[n].task for n in held} == {dataset.episodes[n].task for n in kept}
    batches = build_parts(make_config(folders, tmp_path, 0.0, episodes=tuple(kept))).batches
    seen = {int(e) for step in range(6) for e in batches.batch(step)["episode_index"]}
    assert seen <= set(kept)
    with pytest.raises(ConfigError, match="leaves none to train on"):
        hold_out(dataset, 0.9)


def test_missing_episodes_and_folders_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"episodes \[7\] are not in"):
        build_parts(make_config(folders, tmp_path, episodes=(1, 7)))
    with pytest.raises(ConfigError, match=r"dataset: .*nowhere"):
        train(make_config(folders, tmp_path, dataset=tmp_path / "nowhere"))


def test_pi0_trains_on_wide_frames_from_a_cache(tmp_path):
    """Frames go to it unletterboxed; cached features and its tokens are brought together by its own map."""
    from tests.students.pi0_fixtures import SIZE

    dataset = Dataset.open(record(tmp_path / "data", width=30))
    build_cache(FakeTeacher(), dataset_source(dataset, CAMERAS), tmp_path / "cache", progress=False)
    student = Pi0Config(CAMERAS, state_dim=4, action_dim=4, chunk=2, tokenizer="hashed", size=SIZE)
    config = make_config(tmp_path, tmp_path / "run", student=student, steps=2, augment=Augment())
    batch = build_parts(config).batches.batch(0)
    assert batch["observation.images.front"].shape[-2:] == (20, 30)
    assert batch["frame.front"].shape[-2:] == (20, 30)
    train(config)
    actions = load_student(tmp_path / "run" / "policy").act(
        [
            {
                "images": {c: np.zeros((20, 30, 3), np.uint8) for c in CAMERAS},
                "state": np.zeros(4),
                "task": "go",
            }
        ]
    )
    assert torch.isfinite(actions).all()


def test_cameras_of_several_sizes_train_from_a_cache(tmp_path):
    """A cache of them used to be refused, though a live teacher takes them."""
    rng = np.random.default_rng(0)
    writer = DatasetWriter.create(
        tmp_path / "data", fps=20, cameras={"front": (24, 32), "wrist": (16, 16)}, state_dim=4, action_dim=4
    )
    for _ in range(12):
        images = {
            "front": rng.integers(0, 255, (24, 32, 3), np.uint8),
            "wrist": rng.integers(0, 255, (16, 16, 3), np.uint8),
        }
        numbers = rng.normal(size=(2, 4)).astype(np.float32)
        writer.add_frame({"images": images, "state": numbers[0], "action": numbers[1]}, task="a")
    writer.save_episode()
    writer.finalize()
    dataset = Dataset.open(tmp_path / "data")
    build_cache(FakeTeacher(), dataset_source(dataset, CAMERAS), tmp_path / "cache", progress=False)
    settings = {"dataset": tmp_path / "data", "cache": tmp_path / "cache"}
    run = train(make_config(tmp_path, tmp_path / "run", **settings))
    assert 0 < run.metrics["align_loss"] < 2
    parts = build_parts(make_config(tmp_path, tmp_path / "other", **settings))
    batch = parts.batches.batch(0)
    views = parts.student.alignment(batch).views
    live = FakeTeacher().features(views)[0]
    torch.testing.assert_close(parts.teacher.features(views)[0], live, atol=0.02, rtol=0.02)


def test_a_cache_must_hold_what_the_run_is_trained_on(folders, tmp_path):
    dataset = Dataset.open(folders / "data")
    source = dataset_source(dataset, CAMERAS, episodes=[0, 2])
    build_cache(FakeTeacher(), source, tmp_path / "cache", progress=False)
    settings = {"cache": tmp_path / "cache"}
    train(make_config(folders, tmp_path / "run", episodes=(0, 2), **settings))
    for episodes in (None, (0, 1)):
        with pytest.raises(ConfigError, match=r"frames of .* that the run is trained on"):
            build_parts(make_config(folders, tmp_path / "other", episodes=episodes, **settings))
    # What is there stays when more is added, and when less is asked for again.
    for episodes in (None, [0, 2]):
        build_cache(
            FakeTeacher(),
            dataset_source(dataset, CAMERAS, episodes=episodes),
            tmp_path / "cache",
            progress=False,
        )
        assert len(CachedTeacher(tmp_path / "cache")) == sum(LENGTHS)
    train(make_config(folders, tmp_path / "whole", **settings))


def test_a_start_that_failed_leaves_nothing_in_the_way_of_the_corrected_command(folders, tmp_path):
    with pytest.raises(ConfigError, match="'actoin'"):
        train(make_config(folders, tmp_path / "run", alpha=0.0, keys=("action=actoin",)))
    train(make_config(folders, tmp_path / "run", alpha=0.0))
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        train(make_config(folders, tmp_path / "run", alpha=0.0, seed=4))


STUDENTS = {
    "nano": STUDENT,
    "pi0": pi0_config(cameras=CAMERAS, state_dim=4, action_dim=4),
    "oft": oft_config(cameras=CAMERAS, state_dim=4, action_dim=4, chunk=2, gripper="raw"),
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_is_read_once_and_a_cached_run_makes_no_pixels_for_the_teacher(
    folders, tmp_path, monkeypatch, name, accumulate
):
    config = make_config(
        folders, tmp_path, student=STUDENTS[name], forcing=ForcingConfig(pairs=((2, -1),)),
        gradient_accumulation=accumulate, augment=Augment(crop_area=(0.8, 0.9)),
    )  # fmt: skip
    parts = build_parts(config)
    asked = []
    original = type(parts.student).alignment

    def alignment(self, batch):
        found = original(self, batch)
        asked.append(batch["index"].tolist())

        def make():
            raise AssertionError("a cached teacher asked for pixels")

        return replace(found, views=replace(found.views, make=make))

    monkeypatch.setattr(type(parts.student), "alignment", alignment)
    read = []
    for module in ("nano", "pi0.model", "openvla_oft.model"):
        place = importlib.import_module(f"spatial_forcing.students.{module}")
        monkeypatch.setattr(place, "camera_images", counted(place.camera_images, read))
    train(config, parts=parts)
    assert len(asked) == 4 * accumulate
    assert len(read) == 4 * accumulate


def counted(function, calls):
    def call(batch, cameras):
        calls.append(batch)
        return function(batch, cameras)

    return call
