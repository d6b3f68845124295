"""The stand-ins of LIBERO's assets: what LIBERO's own code finds in them, and how they are made and found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_forcing.cli import main
from spatial_forcing.envs import libero_setup, make_env
from spatial_forcing.envs.libero_setup import bddl_file, ensure_assets, find_assets, uses_stand_ins
from spatial_forcing.envs.libero_shapes import Lathe, drum, ring, turned
from spatial_forcing.envs.libero_stand_ins import (
    ITEMS,
    SUITES,
    make_stand_ins,
    stand_in_folder,
    suites_of,
)
from spatial_forcing.envs.libero_tasks import UNSOLVED, task_names
from spatial_forcing.errors import ConfigError, EnvironmentSetupError
from tests.envs.libero_case import needs_libero

MASSES = {  # kilograms, of the originals
    "akita_black_bowl": 0.063, "basket": 0.653, "glazed_rim_porcelain_ramekin": 0.038, "plate": 0.0305,
    "cookies": 0.0191, "alphabet_soup": 0.0537, "bbq_sauce": 0.0241, "butter": 0.0103,
    "chocolate_pudding": 0.0216, "cream_cheese": 0.0124, "ketchup": 0.0493, "milk": 0.0685,
    "orange_juice": 0.0676, "salad_dressing": 0.0449, "tomato_sauce": 0.0545,
}  # fmt: skip
HALF_SIZES = {  # metres, of the originals' collision shapes about their middles
    "akita_black_bowl": (0.0536, 0.0535, 0.0253), "basket": (0.0848, 0.0787, 0.0708),
    "glazed_rim_porcelain_ramekin": (0.0447, 0.0446, 0.021), "plate": (0.0688, 0.0688, 0.0095),
    "cookies": (0.031, 0.0413, 0.0094), "alphabet_soup": (0.0312, 0.0381, 0.0312),
    "bbq_sauce": (0.0235, 0.0146, 0.0536), "butter": (0.0381, 0.0198, 0.0087),
    "chocolate_pudding": (0.0401, 0.0232, 0.0137), "cream_cheese": (0.0406, 0.0213, 0.0089),
    "ketchup": (0.0282, 0.0728, 0.0184), "milk": (0.0265, 0.0656, 0.0263),
    "orange_juice": (0.0265, 0.0656, 0.0263), "salad_dressing": (0.0264, 0.0728, 0.0178),
    "tomato_sauce": (0.0311, 0.0381, 0.0308),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_stand_ins(tmp_path_factory.mktemp("made") / "stand-ins")


def compiled(folder, name):
    model = mujoco.MjModel.from_xml_path(str(folder / ITEMS[name].folder / f"{name}.xml"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def extent(model, data):
    """Lowest and highest corner of what is touched."""
    corners = []
    for geom in np.flatnonzero(model.geom_contype):
        signs = np.array(np.meshgrid((-1, 1), (-1, 1), (-1, 1))).reshape(3, -1).T
        turn = data.geom_xmat[geom].reshape(3, 3)
        corners.append((signs * model.geom_size[geom]) @ turn.T + data.geom_xpos[geom])
    return np.concatenate(corners).min(0), np.concatenate(corners).max(0)


@pytest.mark.parametrize("name", MASSES)
def test_sizes_and_masses_are_the_originals(folder, name):
    model, data = compiled(folder, name)
    assert model.body_mass.sum() == pytest.approx(MASSES[name], rel=1e-3)
    low, high = extent(model, data)
    np.testing.assert_allclose((high - low) / 2, HALF_SIZES[name], atol=0.003)


def test_the_drawers_and_the_knob_move_as_the_originals(folder):
    cabinet, _ = compiled(folder, "wooden_cabinet")
    assert [cabinet.joint(i).name for i in range(cabinet.njnt)] == [
        "top_level", "middle_level", "bottom_level",
    ]  # fmt: skip
    np.testing.assert_allclose(cabinet.jnt_range, [(-0.16, 0.01)] * 3)
    assert {cabinet.site(i).name for i in range(cabinet.nsite)} >= {
        "top_side", "top_region", "middle_region", "bottom_region",
    }  # fmt: skip
    stove, _ = compiled(folder, "flat_stove")
    np.testing.assert_allclose(stove.jnt_range, [(-0.005, 2.1)])
    assert {stove.site(i).name for i in range(stove.nsite)} >= {"burner", "cook_region"}


def test_an_open_bowl_is_open_and_what_is_seen_is_what_is_touched(folder):
    """A ball that falls into the bowl comes to rest inside it, and the picture encloses the solids."""
    source = ET.parse(folder / ITEMS["akita_black_bowl"].folder / "akita_black_bowl.xml").getroot()
    world = source.find("worldbody")
    ball = ET.SubElement(world, "body", {"name": "ball", "pos": "0 0 0.12"})
    ET.SubElement(ball, "freejoint")
    ET.SubElement(ball, "geom", {"type": "sphere", "size": "0.01", "mass": "0.01"})
    model = mujoco.MjModel.from_xml_string(
        re.sub(
            r'file="[^"]*"', 'builtin="flat" width="8" height="8"', ET.tostring(source, encoding="unicode")
        )
    )
    data = mujoco.MjData(model)
    for _ in range(1500):
        mujoco.mj_step(model, data)
    x, y, z = data.body("ball").xpos
    assert np.hypot(x, y) < 0.04
    assert 0.01 < z < 0.03


@needs_libero
def test_every_object_of_both_suites_is_there():
    wanted = set()
    for suite in SUITES:
        for task in task_names(suite):
            text = bddl_file(task).read_text()
            for block in re.findall(r"\(:(?:fixtures|objects)(.*?)\n\s*\)", text, re.DOTALL):
                wanted |= set(re.findall(r"- (\w+)", block))
    assert wanted - {"table", "floor"} == set(ITEMS)


@needs_libero
@pytest.mark.parametrize("task", ["libero_spatial-0", "libero_spatial-3", "libero_object-5"])
def test_the_expert_solves_an_official_start_on_them(folder, task, monkeypatch, tmp_path):
    assert task not in UNSOLVED
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(folder))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    # A process of its own: LIBERO remembers the folder of its assets.
    code = (
        "from spatial_forcing.envs import make_env\n"
        f"env = make_env({task!r}, image_size=32)\n"
        "env.reset(options={'init_state': 1}); expert = env.expert()\n"
        "for step in range(env.horizon):\n"
        "    _, _, terminated, _, info = env.step(expert.action(env))\n"
        "    if terminated: break\n"
        "assert info['success'], step\n"
        "env.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_libero
def test_a_suite_that_they_lack_is_named(folder, monkeypatch):
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(folder))
    assert suites_of(folder) == SUITES
    with pytest.raises(EnvironmentSetupError, match=r"libero_goal-0.*SF_LIBERO_ASSETS"):
        make_env("libero_goal-0")


def test_they_are_made_once_and_nothing_else_is_overwritten(tmp_path):
    made = make_stand_ins(tmp_path / "a")
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert sum(path.stat().st_size for path in made.rglob("*")) < 2**20
    assert make_stand_ins(tmp_path / "a") == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == stamps
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").touch()
    with pytest.raises(ConfigError, match=r"/mine "):
        make_stand_ins(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["work.txt"]
    assert sorted(os.listdir(tmp_path)) == ["a", "mine"]


def test_two_processes_may_make_them_at_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make_stand_ins, [tmp_path / "a"] * 4)) == {tmp_path / "a"}
    assert os.listdir(tmp_path) == ["a"]


def test_two_builds_are_equal(folder, tmp_path):
    again = make_stand_ins(tmp_path / "again")
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)


@pytest.fixture
def no_assets(tmp_path, monkeypatch):
    """A machine with LIBERO's package and no assets."""
    monkeypatch.delenv("SF_LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(libero_setup, "package_folder", lambda: tmp_path / "package")
    monkeypatch.setattr(libero_setup, "DOWNLOADED", tmp_path / "download")


def test_they_are_used_only_after_they_were_asked_for(no_assets, tmp_path, capsys):
    with pytest.raises(EnvironmentSetupError, match="--stand-ins"):
        find_assets()
    main(["libero", "stand-ins"])
    assert str(stand_in_folder()) in capsys.readouterr().out.replace("\n", "")
    assert find_assets() == stand_in_folder() == ensure_assets()
    assert uses_stand_ins()
    (tmp_path / "download" / "scenes").mkdir(parents=True)
    assert find_assets() == tmp_path / "download"  # the real ones are preferred
    assert not uses_stand_ins()


def test_a_command_makes_them_where_the_user_agrees(no_assets, tmp_path):
    arguments = ["evaluate", "--policy", str(tmp_path / "no"), "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert not stand_in_folder().exists()
    with pytest.raises(SystemExit):
        main([*arguments, "--stand-ins"])  # there is no such policy; the assets are made before
    assert find_assets() == stand_in_folder()


def test_a_folder_that_was_named_is_never_replaced(no_assets, tmp_path, monkeypatch):
    monkeypatch.setenv("SF_LIBERO_ASSETS", str(tmp_path / "typo"))
    with pytest.raises(EnvironmentSetupError, match="/typo"):
        ensure_assets()
    assert not stand_in_folder().exists()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(3, 60),
    st.floats(0.01, 1.0),
    st.floats(0.01, 1.0),
)
def test_a_turned_outline_is_closed_and_faces_outwards(sides, radius, height):
    """Its volume is that of a prism over a regular polygon, with the sign of outward normals."""
    vertices, faces = Lathe(((0, 0), (radius, 0), (radius, height), (0, height)), "", sides).mesh()
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    volume = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    assert volume == pytest.approx(sides / 2 * np.sin(2 * np.pi / sides) * radius**2 * height, rel=1e-3)


def test_walls_and_round_bodies_keep_their_radius():
    tilted = ring((0.02, 0.0), (0.03, 0.05), 0.002, 0.01, sides=8)
    assert len(tilted) == 8
    for part in tilted:
        assert np.hypot(*part.at[:2]) == pytest.approx(0.025)
        assert part.at[2] == pytest.approx(0.025)
        assert part.size[0] == pytest.approx(np.hypot(0.01, 0.05) / 2)
    assert [part.size[0] for part in drum(0.03, 0.1)] == [0.03] * 4
    assert turned(z=180) == pytest.approx((0, 0, 0, 1), abs=1e-12)
