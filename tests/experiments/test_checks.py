"""What a comparison says before it trains anything."""

import io
import json

import pytest
from rich.console import Console

from spatial_forcing.data import Dataset
from spatial_forcing.envs import make_env
from spatial_forcing.envs.metaworld_tasks import INSTRUCTIONS
from spatial_forcing.errors import ConfigError
from spatial_forcing.experiments import compare
from spatial_forcing.experiments import run as module
from spatial_forcing.experiments.checks import CONFIG, check_folder, untrained_tasks
from spatial_forcing.storage import write_json
from spatial_forcing.training.run import METRICS, open_run
from tests.analysis.rooms import write_rooms
from tests.experiments.test_compare_run import settings

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_rooms(tmp_path_factory.mktemp("checks") / "data", episodes=4, frames=3).root


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    def stop(*args, **kwargs):
        raise AssertionError("training would start")

    monkeypatch.setattr(module, "train_arms", stop)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tasks": ("libero_spatail-0",)},
            "unknown task 'libero_spatail-0'. Did you mean 'libero_spatial-0'",
        ),
        ({"execute": 3}, "compare.execute is 3; the policy predicts 2 actions at a time. Choose 1 to 2"),
        ({"arms": ("alpha0", "sf forcing.alhpa=2")}, r"arm 'sf(alhpa=2)' with preset 'nano-metaworld': "),
        ({"set": (), "tasks": ()}, "preset 'nano-metaworld' wants the cameras ['corner2', 'gripperPOV']"),
        ({"preset": "nano"}, "unknown preset 'nano'"),
        (
            {"preset": "openvla-oft-tiny-libero", "set": (), "arms": ("alpha0", "fusion")},
            "the arm 'fusion' feeds teacher features to the nano student",
        ),
    ],
)
def test_what_would_fail_later_fails_before_and_leaves_the_folder_free(rooms, tmp_path, changes, said):
    wrong = settings(rooms, tmp_path / "out", **{"arms": ("alpha0", "sf"), "held_out": 0.25, **changes})
    with pytest.raises(ConfigError) as error:
        compare(wrong, QUIET, make_env)
    assert said in str(error.value)
    assert not (tmp_path / "out" / CONFIG).exists()


def test_a_missing_dataset_claims_no_folder(rooms, tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        compare(settings(tmp_path / "nowhere", tmp_path / "out"), QUIET, make_env)
    assert not (tmp_path / "out" / CONFIG).exists()


def started(config):
    """A folder whose comparison has begun."""
    write_json(config.output / CONFIG, config.to_plain())
    return config


def test_the_evaluation_may_change_until_an_episode_was_run(rooms, tmp_path):
    started(settings(rooms, tmp_path, tasks=("libero_spatial-0",)))
    other = settings(rooms, tmp_path, tasks=("libero_spatial-1",), episodes=9)
    check_folder(other)
    run = tmp_path / "runs" / "sf-seed0"
    run.mkdir(parents=True)
    check_folder(other)
    (run / "episodes.jsonl").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"tasks: \['libero_spatial-0'\] there"):
        check_folder(other)


def test_runs_of_another_2d_teacher_are_refused_and_the_folder_keeps_its_settings(
    rooms, tmp_path, monkeypatch
):
    common = {"tasks": (), "held_out": 0.25, "checkpoints": 1, "seeds": (0, 1)}
    flat = ("alpha0", "2d")
    mine = started(settings(rooms, tmp_path, arms=flat, image_teacher="random:vggt-nano", **common))
    for run in module.prepare(mine, Dataset.open(rooms)):
        run.train.output.mkdir(parents=True)
        open_run(run.train)
        # A run that stopped before its first step would give way to the corrected command.
        (run.train.output / METRICS).write_text('{"step": 1}\n')
    narrowed = started(settings(rooms, tmp_path, arms=("alpha0",), **common))
    wrong = settings(rooms, tmp_path, arms=flat, image_teacher="vggt-nano", **common)
    with pytest.raises(ConfigError, match="2d-seed0 holds a run with another configuration"):
        compare(wrong, QUIET, make_env)
    assert json.loads((tmp_path / CONFIG).read_text()) == narrowed.to_plain()
    with pytest.raises(AssertionError, match="training would start"):
        compare(mine, QUIET, make_env)


def test_a_held_out_error_needs_no_chunk_of_executed_actions(rooms, tmp_path):
    config = settings(rooms, tmp_path, arms=("alpha0", "sf"), tasks=(), held_out=0.25, execute=9)
    with pytest.raises(AssertionError, match="training would start"):
        compare(config, QUIET, make_env)


def test_the_teacher_is_the_presets_unless_another_is_named(rooms, tmp_path):
    aloha = settings(rooms, tmp_path, preset="pi0-aloha", set=())
    assert aloha.target == "facebook/VGGT-1B"
    assert aloha.to_plain()["teacher"] == "facebook/VGGT-1B"
    assert settings(rooms, tmp_path).target == "vggt-nano"
    assert settings(rooms, tmp_path, teacher="random:vggt-nano").target == "random:vggt-nano"


def test_tasks_that_nothing_was_trained_for_are_named(rooms, tmp_path):
    dataset = Dataset.open(rooms)
    named = settings(rooms, tmp_path, tasks=("reach-v3", "libero_spatial-0"))
    (said,) = untrained_tasks(named, dataset)
    assert "has no demonstration of reach-v3: no arm was trained for it" in said
    dataset.tasks[7] = INSTRUCTIONS["reach-v3"]
    assert untrained_tasks(named, dataset) == []


def test_a_suite_stands_for_its_tasks(rooms, tmp_path):
    assert len(settings(rooms, tmp_path, tasks=("libero_spatial",)).tasks) == 10
