"""GL choice, fast rendering, and the cameras' geometry."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.envs import gl
from spatial_forcing.envs.camera import backproject, extrinsics, intrinsics, project
from spatial_forcing.envs.gl import ensure_gl
from spatial_forcing.envs.renderer import FastRenderer
from spatial_forcing.errors import ConfigError, EnvironmentSetupError

ensure_gl()
mujoco = pytest.importorskip("mujoco")

HEIGHT, WIDTH = 48, 64
CENTRE, RADIUS = np.array([0.3, 0.0, 0.5]), 0.2
SCENE = """
<mujoco>
  <visual><map znear="0.01" zfar="50"/></visual>
  <worldbody>
    <light pos="0 0 3"/>
    <geom type="plane" size="3 3 .1" rgba=".2 .2 .2 1"/>
    <geom type="sphere" size=".2" pos=".3 0 .5" rgba="1 0 0 1"/>
    <camera name="side" pos="1 -1 1.5" xyaxes="1 1 0 -.5 .5 1" fovy="50"/>
    <camera name="top" pos="0 0 2" fovy="60"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(scope="module")
def scene():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with FastRenderer(model, HEIGHT, WIDTH) as renderer:
        yield model, data, renderer


def red(rgb):
    return (rgb[..., 0] > 100) & (rgb[..., 1] < 60)


def free_camera(azimuth, elevation, distance):
    view = mujoco.MjvCamera()
    view.azimuth, view.elevation, view.distance = azimuth, elevation, distance
    view.lookat[:] = [0.2, 0.1, 0.4]
    return view


def assert_hits_the_sphere(scene, camera):
    model, data, renderer = scene
    rgb, depth = renderer.rgbd(data, camera)
    points = backproject(depth, intrinsics(model, camera, HEIGHT, WIDTH), extrinsics(data, camera))
    assert red(rgb).sum() > 50
    # The tessellated sphere lies up to 1 % inside the exact one.
    np.testing.assert_allclose(np.linalg.norm(points[red(rgb)] - CENTRE, axis=-1), RADIUS, atol=0.006)


@pytest.mark.parametrize("camera", ["side", "top", 0, 1])
def test_backprojected_pixels_lie_on_the_sphere(scene, camera):
    assert_hits_the_sphere(scene, camera)


@settings(max_examples=8, deadline=None)
@given(st.floats(-180, 180), st.floats(-80, -20), st.floats(0.8, 2.0))
def test_free_cameras_have_the_right_pose(scene, azimuth, elevation, distance):
    assert_hits_the_sphere(scene, free_camera(azimuth, elevation, distance))


def test_two_cameras_see_the_same_floor(scene):
    model, data, renderer = scene
    for camera in ("side", "top"):
        depth = renderer.depth(data, camera)
        points = backproject(depth, intrinsics(model, camera, HEIGHT, WIDTH), extrinsics(data, camera))
        outside = np.linalg.norm(points - CENTRE, axis=-1) > RADIUS + 0.01
        floor = outside & (np.abs(points[..., :2]) < 2.5).all(-1)
        assert floor.sum() > 500
        assert np.abs(points[floor][:, 2]).max() < 1e-3


def test_an_image_turned_by_180_degrees_has_its_own_extrinsics(scene):
    model, data, renderer = scene
    K, pose = intrinsics(model, "side", HEIGHT, WIDTH), extrinsics(data, "side")
    turned = extrinsics(data, "side", rotated=True)
    assert np.linalg.det(turned[:3, :3]) == pytest.approx(1)
    depth = renderer.depth(data, "side")
    np.testing.assert_allclose(
        backproject(depth[::-1, ::-1], K, turned), backproject(depth, K, pose)[::-1, ::-1], atol=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 5))
def test_project_undoes_backproject(height, width, distance):
    K = np.array([[31.0, 0, width / 2], [0, 29.0, height / 2], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    pose[:3, 3] = [0.3, -0.2, 0.1]
    pixels, depth = project(backproject(np.full((height, width), distance), K, pose), K, pose)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    np.testing.assert_allclose(pixels, np.stack([x, y], -1), atol=1e-6)
    np.testing.assert_allclose(depth, distance, rtol=1e-9)


def test_rgb_and_depth_alone_equal_the_single_pass(scene):
    _, data, renderer = scene
    rgb, depth = renderer.rgbd(data, "top")
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    assert rgb.dtype == np.uint8
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(renderer.rgb(data, "top"), rgb)
    np.testing.assert_array_equal(renderer.depth(data, "top"), depth)


def test_unknown_cameras_are_refused_with_a_suggestion(scene):
    model, data, renderer = scene
    with pytest.raises(ConfigError, match="Did you mean 'side'"):
        renderer.rgb(data, "sides")
    with pytest.raises(ConfigError, match="has 2 cameras"):
        intrinsics(model, 2, HEIGHT, WIDTH)
    tracking = mujoco.MjvCamera()
    tracking.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    with pytest.raises(ConfigError, match="tracking"):
        extrinsics(data, tracking)


def test_close_can_be_repeated_and_then_drawing_is_refused():
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    renderer = FastRenderer(model, 8, 8)
    renderer.close()
    renderer.close()
    with pytest.raises(ConfigError, match="closed"):
        renderer.rgb(data, "top")
    with pytest.raises(ConfigError, match="0 x 8"):
        FastRenderer(model, 0, 8)


def set_backends(monkeypatch, **works):
    monkeypatch.setattr(gl, "_BACKENDS", {name: lambda w=w: w for name, w in works.items()})
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.delenv("MUJOCO_GL", raising=False)


@pytest.mark.parametrize(("egl", "osmesa", "chosen"), [(True, True, "egl"), (False, True, "osmesa")])
def test_egl_then_osmesa_is_chosen(monkeypatch, egl, osmesa, chosen):
    set_backends(monkeypatch, egl=egl, osmesa=osmesa)
    assert ensure_gl() == chosen
    assert os.environ["MUJOCO_GL"] == chosen


def test_without_a_library_the_apt_line_is_given(monkeypatch):
    set_backends(monkeypatch, egl=False, osmesa=False)
    with pytest.raises(EnvironmentSetupError, match="sudo apt-get install -y libegl1 libgl1"):
        ensure_gl()
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("osmesa", "MUJOCO_GL=osmesa, but that library cannot be used"),
        ("off", "switches rendering off"),
        ("eglx", "Did you mean 'egl'"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(monkeypatch, value, message):
    set_backends(monkeypatch, egl=True, osmesa=False)
    monkeypatch.setenv("MUJOCO_GL", value)
    with pytest.raises((EnvironmentSetupError, ConfigError), match=message):
        ensure_gl()


def test_mujoco_may_have_been_imported_before_the_choice(tmp_path):
    """Without a display mujoco's own default cannot render; ours must, and exit quietly."""
    script = (
        "import mujoco\n"
        "from spatial_forcing.envs.renderer import FastRenderer\n"
        f"m = mujoco.MjModel.from_xml_string({SCENE!r})\n"
        "d = mujoco.MjData(m); mujoco.mj_forward(m, d)\n"
        "r = FastRenderer(m, 16, 16)\n"
        "print(r.rgb(d, 'side').max())\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
    assert "Traceback" not in done.stderr
