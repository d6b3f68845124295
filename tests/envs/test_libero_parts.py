"""What of LIBERO needs no simulator: names, conventions, perturbations, set-up errors."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_forcing.envs import libero_setup
from spatial_forcing.envs.base import SUITES, expand_tasks, list_tasks, suite_of
from spatial_forcing.envs.libero_conventions import (
    check_conventions,
    oriented,
    oriented_intrinsics,
    quat_to_axis_angle,
)
from spatial_forcing.envs.libero_plus import Perturbation
from spatial_forcing.envs.libero_setup import (
    find_assets,
    init_states,
    instruction_of,
    task_entry,
    uses_stand_ins,
)
from spatial_forcing.envs.libero_tasks import HORIZONS, parse_task
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from tests.envs.libero_case import needs_libero
from tests.golden import golden


@pytest.mark.golden
def test_axis_angles_are_the_original_s():
    vectors = golden("oft_tiny").tensors
    ours = [quat_to_axis_angle(q) for q in vectors["quat_xyzw"].numpy()]
    np.testing.assert_allclose(ours, vectors["axisangle"].numpy(), atol=1e-12)


def test_canonical_angles_do_not_depend_on_the_quaternion_s_sign():
    q = np.array([0.6, 0.0, 0.0, -0.8])
    np.testing.assert_allclose(quat_to_axis_angle(q, "canonical"), quat_to_axis_angle(-q, "canonical"))
    assert np.linalg.norm(quat_to_axis_angle(q)) > np.pi > np.linalg.norm(quat_to_axis_angle(q, "canonical"))


def test_openvla_s_images_are_mirrored_and_their_camera_matrix_follows():
    image = np.arange(12).reshape(2, 6, 1)
    assert oriented(image, "upright") is image
    assert oriented(image, "openvla")[0, :, 0].tolist() == [5, 4, 3, 2, 1, 0]
    K = np.array([[50.0, 0, 3], [0, 50, 1], [0, 0, 1]])
    point = np.array([0.2, 0.1, 2.0])
    x, y, _ = K @ point / 2
    mirrored = oriented_intrinsics(K, 6, "openvla") @ point / 2
    np.testing.assert_allclose(mirrored[:2], [6 - x, y])


def test_conventions_are_checked():
    with pytest.raises(ConfigError, match="orientation is 'sideways'"):
        check_conventions("sideways", "openvla")
    with pytest.raises(ConfigError, match="rotation is 'euler'"):
        check_conventions("upright", "euler")


def test_tasks_have_names_and_suites():
    assert parse_task("libero_90-89") == ("libero_90", 89)
    assert expand_tasks(["libero_goal", "reach-v3"])[-2:] == ("libero_goal-9", "reach-v3")
    assert suite_of("libero_10-3").horizon == 520
    assert len(set(list_tasks())) == len(list_tasks()) == 50 + 130 + 2 + 5
    assert HORIZONS["openvla"]["libero_spatial"] == 220
    assert SUITES["libero_spatial"].fresh
    with pytest.raises(ConfigError, match="libero_spatial-10"):
        parse_task("libero_spatial-10")
    with pytest.raises(ConfigError, match="Did you mean 'libero_spatial'"):
        suite_of("libero_spatail")


def test_instructions_come_from_names():
    assert instruction_of("open_the_drawer") == "open the drawer"
    assert instruction_of("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"
    assert instruction_of("LIVING_ROOM_SCENE2_put_both") == "put both"


def test_missing_assets_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(EnvironmentSetupError, match=r"libero-assets.*set SF_LIBERO_ASSETS"):
        find_assets()


def test_stand_ins_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(tmp_path))
    (tmp_path / "scenes").mkdir()
    assert not uses_stand_ins()
    assert libero_setup.marks() == {}
    (tmp_path / "STAND_INS.md").touch()
    assert libero_setup.marks() == {"assets": "stand-ins"}


def test_a_missing_package_says_what_to_do(monkeypatch):
    monkeypatch.setattr(libero_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentSetupError, match="--no-deps hf-libero"):
        libero_setup.package_folder()


@needs_libero
@pytest.mark.parametrize(
    "task", ["libero_spatial-0", "libero_object-3", "libero_goal-9", "libero_10-0", "libero_90-5"]
)
def test_fifty_initial_states_are_read_safely(task):
    states = init_states(task)
    assert states.shape[0] == 50
    assert np.isfinite(states).all()
    assert len(np.unique(states, axis=0)) > 40


@needs_libero
def test_initial_states_with_code_in_them_are_refused(tmp_path, monkeypatch):
    import pickle

    class Harmful:
        def __reduce__(self):
            return (print, ("code ran",))

    folder = tmp_path / "init_files" / "libero_goal"
    folder.mkdir(parents=True)
    (folder / f"{task_entry('libero_goal-7')}.pruned_init").write_bytes(pickle.dumps(Harmful()))
    entry = task_entry("libero_goal-7")
    monkeypatch.setattr(libero_setup, "package_folder", lambda: tmp_path)
    monkeypatch.setattr(libero_setup, "task_entry", lambda task: entry)
    with pytest.raises(ConfigError, match=r"turn_on_the_stove\.pruned_init"):
        init_states("libero_goal-7")


def test_perturbations_are_parsed():
    found = Perturbation.parse("camera=0.5, noise, seed=3")
    assert (found.camera, found.light, found.noise_level, found.seed) == (0.5, 0.0, 1.0, 3)
    assert Perturbation.parse("") == Perturbation()
    for bad in ("colour=1", "camera=-1", "light=bright"):
        with pytest.raises(ConfigError, match="perturbation"):
            Perturbation.parse(bad)


def test_noise_depends_on_episode_step_and_camera():
    image = np.full((8, 8, 3), 128, np.uint8)
    perturbation = Perturbation(noise_level=1.0)
    perturbation.begin(5)
    first = perturbation.noise(image, 0, "a")
    assert np.array_equal(first, perturbation.noise(image, 0, "a"))
    assert not np.array_equal(first, perturbation.noise(image, 1, "a"))
    assert not np.array_equal(first, perturbation.noise(image, 0, "b"))
    assert 15 < (first.astype(float) - 128).std() < 35
    assert Perturbation().noise(image, 0, "a") is image


def test_cameras_and_lights_move_but_wrist_cameras_stay():
    mujoco = pytest.importorskip("mujoco")
    xml = """<mujoco><worldbody><light pos="0 0 2" diffuse="0.5 0.5 0.5"/>
    <camera name="agentview" pos="1 0 1"/>
    <camera name="robot0_eye_in_hand" pos="0 0 1"/></worldbody></mujoco>"""
    plain, moved = (mujoco.MjModel.from_xml_string(xml) for _ in range(2))
    Perturbation(camera=1.0, light=1.0).apply(moved, ["agentview", "robot0_eye_in_hand"])
    assert np.linalg.norm(moved.cam_pos[0] - plain.cam_pos[0]) == pytest.approx(0.08)
    angle = 2 * np.arccos(abs(float(moved.cam_quat[0] @ plain.cam_quat[0])))
    assert np.rad2deg(angle) == pytest.approx(6, abs=1e-3)
    assert np.array_equal(moved.cam_pos[1], plain.cam_pos[1])
    assert not np.array_equal(moved.light_diffuse, plain.light_diffuse)
