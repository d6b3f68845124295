"""The teacher's pretraining set shares no task and no object with what students are studied on."""

import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from spatial_forcing.envs.metaworld_tasks import OBJECT_FAMILIES, object_family
from spatial_forcing.errors import ConfigError
from spatial_forcing.nano_teacher.recipe import PretrainConfig
from spatial_forcing.nano_teacher.tasks import (
    RESERVED_TASKS,
    TRAIN_TASKS,
    VALIDATION_TASKS,
    check_held_out,
    object_meshes,
    scene_file,
)
from spatial_forcing.training.presets import METAWORLD_TASKS

SEEN = (*TRAIN_TASKS, *VALIDATION_TASKS)


def test_every_task_is_in_exactly_one_split():
    assert sorted((*SEEN, *RESERVED_TASKS)) == sorted(ALL_V3_ENVIRONMENTS)


def test_no_mesh_of_a_pretraining_task_is_in_a_reserved_task():
    reserved = frozenset().union(*map(object_meshes, RESERVED_TASKS))
    assert len(reserved) > 50
    for task in SEEN:
        assert object_meshes(task), task
        assert not object_meshes(task) & reserved, task


def test_validation_objects_are_not_trained_on():
    trained = frozenset().union(*map(object_meshes, TRAIN_TASKS))
    for task in VALIDATION_TASKS:
        assert not object_meshes(task) & trained


def test_no_scene_file_and_no_family_is_in_two_splits():
    for kind in (scene_file, object_family):
        splits = [{kind(t) for t in tasks} for tasks in (TRAIN_TASKS, VALIDATION_TASKS, RESERVED_TASKS)]
        assert sum(map(len, splits)) == len(set().union(*splits))
    assert {object_family(t) for t in (*SEEN, *RESERVED_TASKS)} == set(OBJECT_FAMILIES)


def test_quickstart_tasks_are_held_out():
    check_held_out(METAWORLD_TASKS)


def test_the_config_renders_only_its_split():
    config = PretrainConfig()
    assert config.train_spec.tasks == TRAIN_TASKS
    assert config.test_spec.tasks == RESERVED_TASKS
    assert config.train_spec.seed != config.test_spec.seed


@pytest.mark.parametrize("task", SEEN)
def test_a_pretraining_task_is_refused(task):
    with pytest.raises(ConfigError, match=task):
        check_held_out(["reach-v3", task])


def test_no_tasks_and_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="no tasks"):
        check_held_out([])
    with pytest.raises(ConfigError, match="Did you mean 'reach-v3'"):
        check_held_out(["reech-v3"])
