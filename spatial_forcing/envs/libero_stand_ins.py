"""Stand-ins for the assets that libero_spatial and libero_object load, made by code instead of a download.

Names, sizes, masses, joints and regions are the originals' (measured on LIBERO's assets, MIT licence), so the
benchmark's goals, predicates and initial states work. Looks are not: shapes are boxes, cylinders and turned
outlines in two colours. Success rates do not compare with published ones; every table says so.
"""

from __future__ import annotations

import json
import tempfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spatial_forcing.envs.libero_shapes import (
    SHOWN,
    UPRIGHT,
    Joint,
    Lathe,
    Part,
    Quat,
    Shape,
    Site,
    Solid,
    Vec,
    box,
    drum,
    foot,
    numbers,
    object_xml,
    ring,
    turned,
)
from spatial_forcing.errors import ConfigError
from spatial_forcing.storage import user_cache_folder, write_json

STAND_INS = "STAND_INS.md"
"""A file of this name in the assets says that some of them are stand-ins for the originals."""
GENERATED = "stand_ins.json"
"""What the stand-ins of this module are made for: {"version": int, "suites": [str, ...]}."""
VERSION = 1
SUITES = ("libero_spatial", "libero_object")
TEXTURE = 64
"""Pixels on a side of an object's texture; floor, wall and table have four times as many."""
Colour = tuple[int, int, int]

LYING: Quat = turned(x=-90)
"""Turns z to y, the long axis of cans, bottles and cartons."""


@dataclass(frozen=True)
class Item:
    """An object that a task names.

    Attributes:
        folder: of the assets it lies in.
        body: what it is made of.
        colours: of its textures by material; the first colour, and a band across the middle.
        markers: heights of the bottom and top site, and the horizontal radius site's x = y, in metres.
    """

    folder: str
    body: Part
    colours: Mapping[str, tuple[Colour, Colour]]
    markers: tuple[float, float, float]


MARKERS = (-0.06, 0.04, 0.025)


def _scanned(
    name: str, shape: Shape, colours: tuple[Colour, Colour], sites: tuple[Site, ...] = ()
) -> tuple[str, Item]:
    body = Part("object", shape, sites=sites)
    return name, Item(f"stable_scanned_objects/{name}", body, {name: colours}, MARKERS)


def _hope(
    name: str,
    shape: Shape,
    colours: tuple[Colour, Colour],
    markers: tuple[float, float, float] = MARKERS,
) -> tuple[str, Item]:
    return name, Item(f"stable_hope_objects/{name}", Part("object", shape), {name: colours}, markers)


def _can(mass: float) -> Shape:
    """7.6 cm of tin along y; the solid is 3.7 mm off the picture's axis, as LIBERO's is."""
    solid = drum(0.0312, 0.0381, (0, -0.0005, -0.0037), LYING)
    return Shape(solid, (Solid("cylinder", (0.0332, 0.0412), turn=LYING),), mass)


def _carton(mass: float) -> Shape:
    """A milk carton along y, with a gabled top."""
    roof = [
        box((0.0263, 0.0022, 0.0138), (0, 0.0478, side * 0.0135), turned(x=side * 50)) for side in (1, -1)
    ]
    return Shape(
        (box((0.0263, 0.0548, 0.0263), (0, -0.015, 0)), *roof, box((0.0265, 0.003, 0.0035), (0, 0.0585, 0))),
        mass=mass,
    )


def _box(half: Vec, mass: float, at: Vec = (0, 0, 0)) -> Shape:
    return Shape((box(half, at),), mass=mass)


BLACK, STEEL, WHITE = (28, 28, 32), (150, 152, 158), (236, 234, 228)
RED, GREEN, BLUE, YELLOW = (178, 38, 34), (52, 122, 58), (40, 78, 150), (226, 182, 60)
BROWN, WOOD, ORANGE = (92, 56, 38), (104, 66, 42), (222, 122, 38)

BOWL = Shape(
    solid=(
        *foot(0.0245, 0.0026, 0.0042),
        *ring((0.0233, 0.0036), (0.0440, 0.0152), 0.0014, 0.0099),
        *ring((0.0424, 0.0155), (0.0519, 0.0518), 0.0026, 0.0093),
    ),
    shown=(
        Lathe(
            ((0, 0), (0.026, 0), (0.045, 0.014), (0.0545, 0.0526), (0.052, 0.0526), (0.0425, 0.0165), (0.024,
            0.006), (0, 0.006)), "akita_black_bowl",
        ),
    ),
    mass=0.063,
)  # fmt: skip
RAMEKIN = Shape(
    solid=(*foot(0.036, 0.0032, 0.0041), *ring((0.0353, 0.0022), (0.0413, 0.0423), 0.0052, 0.0095)),
    shown=(
        Lathe(
            ((0, 0), (0.037, 0), (0.0443, 0.0433), (0.0395, 0.0433), (0.034, 0.0075), (0, 0.0075)),
            "glazed_rim_porcelain_ramekin",
        ),
    ),
    mass=0.038,
)
PLATE = Shape(
    solid=(*foot(0.033, 0.0022, 0.0031), *ring((0.0303, 0.0006), (0.0663, 0.0134), 0.0051, 0.0285, sides=8)),
    shown=(
        Lathe(
            ((0, 0), (0.034, 0), (0.0685, 0.0125), (0.0685, 0.0166), (0.033, 0.0055), (0, 0.0055)), "plate"
        ),
    ),
    mass=0.0305,
)
BASKET = Shape(
    solid=(
        box((0.0766, 0.0724, 0.0085), (0.0025, 0, 0.0131)),
        box((0.0067, 0.0724, 0.0637), (-0.0727, 0, 0.0766), turned(y=-4)),
        box((0.0067, 0.0724, 0.0637), (0.0756, 0, 0.0766), turned(y=3)),
        box((0.0724, 0.0067, 0.0637), (0, -0.0686, 0.0818), turned(x=3)),
        box((0.0724, 0.0067, 0.0637), (0, 0.0691, 0.0818), turned(x=-3)),
    ),
    mass=0.653,
)
BBQ = Shape(
    (
        box((0.0235, 0.0145, 0.0268), (0, 0, -0.0278)),
        box((0.0181, 0.0143, 0.0146), (0, 0, 0.0123)),
        box((0.0143, 0.0146, 0.0134), (0, 0, 0.0391)),
    ),
    mass=0.0241,
)
KETCHUP = Shape(
    (
        box((0.0281, 0.0331, 0.017), (0, -0.0394, 0)),
        box((0.0239, 0.0113, 0.0183), (0, 0.0037, 0)),
        box((0.0187, 0.0113, 0.0183), (0, 0.0251, 0)),
        *drum(0.0168, 0.0185, (0, 0.0547, 0), LYING),
    ),
    mass=0.0493,
)
DRESSING = Shape(
    (
        box((0.0173, 0.0033, 0.0173), (0, -0.0695, 0)),
        box((0.0264, 0.026, 0.0173), (0, -0.0364, 0)),
        box((0.0171, 0.0118, 0.0173), (0, 0.001, 0)),
        box((0.0129, 0.0115, 0.0149), (0, 0.0243, 0)),
        *drum(0.0168, 0.0186, (0, 0.0542, 0), LYING),
    ),
    mass=0.0449,
)


def _cabinet() -> Item:
    """A cabinet of three drawers that slide out along -y."""
    frame = Shape(
        (
            box((0.1191, 0.0023, 0.1058), (0.0021, 0.1094, 0.1143)),
            box((0.1228, 0.0896, 0.002), (0.0041, 0.0164, 0.0069)),
            *(box((0.0052, 0.0954, 0.1058), (x, 0.0163, 0.1143)) for x in (-0.1122, 0.119)),
            *(box((0.1117, 0.0894, 0.0009), (0.0039, 0.0187, z)) for z in (0.0093, 0.0793, 0.1494)),
            box((0.1273, 0.0941, 0.0014), (0.0039, 0.0158, 0.2216)),
        )
    )
    drawers = [
        ("top", 0.1836, 0.1839, 0.1856),
        ("middle", 0.1139, 0.1104, 0.1169),
        ("bottom", 0.0453, 0.0411, 0.047),
    ]
    top = Site("top_side", (0.1253, 0.0944, 0.0015), (0.0035, 0.0157, 0.2215))
    parts = tuple(_drawer(*drawer) for drawer in drawers)
    base = Part("base", frame, sites=(top,), parts=parts)
    return Item(
        "articulated_objects",
        Part("object", parts=(base,)),
        {"wooden_cabinet": (WOOD, (88, 54, 34)), "wooden_cabinet_handle": (STEEL, STEEL)},
        (-0.045, 0.045, 0.045),
    )


def _drawer(name: str, height: float, handle: float, inside: float) -> Part:
    metal = "wooden_cabinet_handle"
    shape = Shape(
        (
            box((0.1093, 0.0027, 0.0343), (0.0033, -0.0752, height)),
            *(box((0.1068, 0.0036, 0.0321), (0.0033, y, height)) for y in (-0.0684, 0.0908)),
            *(box((0.0024, 0.0815, 0.0315), (x, 0.0111, height)) for x in (-0.1019, 0.1089)),
            box((0.107, 0.0809, 0.004), (0.0035, 0.0105, height - 0.0284)),
            box((0.0445, 0.0077, 0.0082), (-0.0028, -0.1016, handle), material=metal),
            *(box((0.0053, 0.0106, 0.0055), (x, -0.0835, handle), material=metal) for x in (-0.0356, 0.0292)),
        )
    )
    region = Site(f"{name}_region", (0.1022, 0.0756, 0.0299), (0.0033, 0.0113, inside))
    slide = Joint(f"{name}_level", "slide", (0, 1, 0), (-0.16, 0.01), 50)
    return Part(f"cabinet_{name}", shape, sites=(region,), joint=slide)


def _stove() -> Item:
    """A hot plate whose knob turns about z."""
    plate = Shape(
        (box((0.095, 0.095, 0.02)), box((0.095, 0.095, 0.0005), (0, 0, 0.025))),
        (box((0.095, 0.095, 0.02)), Solid("cylinder", (0.062, 0.0025), (0, 0, 0.022), material="stove_dark")),
    )
    burner = Part(
        "burner",
        plate,
        at=(0.15, 0, 0),
        sites=(
            Site("cook_region", (0.075, 0.075, 0.0025)),
            Site("burner", (0.0625, 0.0005, 0), (0, 0, 0.022), UPRIGHT, "cylinder", "0.9 0.05 0.05 1"),
        ),
    )
    knob = Shape(
        (
            *drum(0.046, 0.0062, (0.0012, 0.0046, 0.0066)),
            box((0.0121, 0.0345, 0.0122), (0.0013, 0.006, 0.025)),
        ),
        (
            Solid("cylinder", (0.046, 0.0062), (0.0012, 0.0046, 0.0066), material="stove_dark"),
            box((0.0121, 0.0345, 0.0122), (0.0013, 0.006, 0.025), material="stove_dark"),
        ),
    )
    button = Part(
        "button",
        knob,
        turn=turned(z=90),
        joint=Joint("button", "hinge", (0, 0, 1), (-0.005, 2.1), 1),
    )
    return Item(
        "articulated_objects",
        Part("object", parts=(Part("base", parts=(burner, button)),)),
        {"flat_stove": (STEEL, (132, 134, 140)), "stove_dark": (BLACK, (50, 50, 54))},
        (-0.045, 0.045, 0.045),
    )


BASKET_REGION = Site("contain_region", (0.0611, 0.0611, 0.0695), (0, 0, 0.0719))
ITEMS: dict[str, Item] = dict(
    (
        _scanned("akita_black_bowl", BOWL, (BLACK, (52, 50, 54))),
        _scanned("basket", BASKET, ((198, 160, 104), (164, 124, 76)), (BASKET_REGION,)),
        _scanned("glazed_rim_porcelain_ramekin", RAMEKIN, (WHITE, WHITE)),
        _scanned("plate", PLATE, (WHITE, WHITE)),
        _hope("cookies", _box((0.031, 0.0413, 0.0094), 0.0191), (BLUE, YELLOW)),
        _hope("alphabet_soup", _can(0.0537), (RED, YELLOW), (-0.04, 0.04, 0.025)),
        _hope("bbq_sauce", BBQ, (BROWN, RED), (-0.06, 0.06, 0.015)),
        _hope("butter", _box((0.0381, 0.0198, 0.0087), 0.0103), (YELLOW, WHITE), (-0.02, 0.02, 0.02)),
        _hope(
            "chocolate_pudding", _box((0.0401, 0.0232, 0.0137), 0.0216, (-0.0005, 0, 0.0006)), (BROWN, WHITE)
        ),
        _hope("cream_cheese", _box((0.0406, 0.0213, 0.0089), 0.0124), (WHITE, BLUE), (-0.025, 0.025, 0.03)),
        _hope("ketchup", KETCHUP, (RED, WHITE)),
        _hope("milk", _carton(0.0685), (WHITE, BLUE), (-0.06, 0.04, 0.03)),
        _hope("orange_juice", _carton(0.0676), (ORANGE, GREEN)),
        _hope("salad_dressing", DRESSING, (GREEN, YELLOW)),
        _hope("tomato_sauce", _can(0.0545), (GREEN, RED)),
        ("wooden_cabinet", _cabinet()),
        ("flat_stove", _stove()),
    )
)
"""Every object and fixture of the two suites, by the name that their BDDL files use."""

SURFACES: dict[str, tuple[Colour, int]] = {
    "light-gray-floor-tile": ((186, 186, 182), 2),
    "light-gray-plaster": ((206, 206, 204), 0),
    "martin_novak_wood_table": ((168, 122, 80), 8),
}
"""Textures of the scenes: colour, and how many seams run across (tiles or planks)."""


def stand_in_folder() -> Path:
    """Where this version's stand-ins are in the user's cache folder, whether they are there or not."""
    return user_cache_folder() / f"libero-stand-ins-{VERSION}"


def suites_of(assets: Path) -> tuple[str, ...] | None:
    """The suites that generated stand-ins in `assets` are made for; None for assets of another origin."""
    try:
        return tuple(json.loads((assets / GENERATED).read_text(encoding="utf-8"))["suites"])
    except FileNotFoundError:
        return None


def make_stand_ins(folder: Path | None = None) -> Path:
    """Write the stand-ins (0.4 MB) and return their folder; what is complete there is left as it is.

    Args:
        folder: a new or empty one; default `stand_in_folder()`.

    Raises:
        ConfigError: `folder` holds something else.
    """
    folder = stand_in_folder() if folder is None else folder
    if _complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} holds something that is not this version's stand-ins; give a new folder, or remove it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        # A folder of its own has the rights that new folders have; the temporary one is private.
        made = Path(beside) / folder.name
        made.mkdir()
        _write(made)
        try:
            made.rename(folder)
        except OSError:
            if not _complete(folder):  # another process was faster
                raise
    return folder


def _complete(folder: Path) -> bool:
    marker = folder / GENERATED
    return marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["version"] == VERSION


def _write(folder: Path) -> None:
    for name, item in ITEMS.items():
        place = folder / item.folder
        place.mkdir(parents=True, exist_ok=True)
        files = {material: f"{material}.png" for material in item.colours}
        for material, colours in item.colours.items():
            _save(place / files[material], _banded(material, *colours))
        bottom, top, radius = item.markers
        markers: dict[str, Vec] = {
            "bottom_site": (0, 0, bottom),
            "top_site": (0, 0, top),
            "horizontal_radius_site": (radius, radius, 0),
        }
        _save_xml(place / f"{name}.xml", object_xml(item.body, files, markers))
    (folder / "textures").mkdir()
    for name, (colour, seams) in SURFACES.items():
        _save(folder / "textures" / f"{name}.png", _surface(name, colour, seams))
    (folder / "scenes").mkdir()
    for name, floor in (("tabletop", _table()), ("floor", _bare_floor())):
        _save_xml(folder / "scenes" / f"libero_{name}_base_style.xml", _scene(*floor))
    (folder / STAND_INS).write_text(
        "Stand-ins for LIBERO's assets, made by spatial-forcing. Names, sizes, masses, joints and regions "
        "are "
        "LIBERO's; looks are not, so success rates do not compare with published ones.\n",
        encoding="utf-8",
    )
    write_json(folder / GENERATED, {"version": VERSION, "suites": SUITES})


def _grain(name: str, side: int) -> NDArray[np.float64]:
    """Smooth noise of one unit's spread, the same for the same name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = rng.normal(size=(side // 4, side // 4)).repeat(4, 0).repeat(4, 1)
    return (0.7 * coarse + 0.7 * rng.normal(size=(side, side)))[..., None]


def _banded(name: str, base: Colour, band: Colour) -> NDArray[np.float64]:
    picture = np.full((TEXTURE, TEXTURE, 3), base, np.float64)
    picture[TEXTURE * 3 // 8 : TEXTURE * 5 // 8] = band
    return picture + 5 * _grain(name, TEXTURE)


def _surface(name: str, colour: Colour, seams: int) -> NDArray[np.float64]:
    side = 4 * TEXTURE
    picture = np.full((side, side, 3), colour, np.float64) + 6 * _grain(name, side)
    for i in range(seams):
        picture[i * side // seams : i * side // seams + 2] -= 40
        if seams < 8:  # tiles have seams both ways, planks one way
            picture[:, i * side // seams : i * side // seams + 2] -= 40
    return picture


def _save(path: Path, picture: NDArray[np.float64]) -> None:
    Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(path)


def _save_xml(path: Path, root: ET.Element) -> None:
    ET.indent(root)
    path.write_text(ET.tostring(root, encoding="unicode") + "\n", encoding="utf-8")


# ---- scenes


def _scene(floor: ET.Element, further: ET.Element | None) -> ET.Element:
    """A room with LIBERO's walls, lights and cameras; its code exchanges two textures by their names."""
    model = ET.Element("mujoco", {"model": "stand_in_arena"})
    assets = ET.SubElement(model, "asset")
    sky = {"type": "skybox", "builtin": "gradient", "width": "256", "height": "256"}
    ET.SubElement(assets, "texture", {**sky, "rgb1": "0.9 0.9 1", "rgb2": "0.2 0.3 0.4"})
    for name, kind, file in (
        ("texplane", "2d", "light-gray-floor-tile"),
        ("tex-wall", "2d", "light-gray-plaster"),
        ("tex-table", "cube", "martin_novak_wood_table"),
    ):
        ET.SubElement(assets, "texture", {"name": name, "type": kind, "file": f"../textures/{file}.png"})
    for name, texture, repeat in (
        ("floorplane", "texplane", "3 3"),
        ("walls_mat", "tex-wall", "3 3"),
        ("table_texture", "tex-table", "1 1"),
    ):
        look = {"texture": texture, "texrepeat": repeat, "reflectance": "0", "shininess": "0"}
        uniform = "false" if texture == "tex-table" else "true"
        ET.SubElement(assets, "material", {"name": name, "texuniform": uniform, **look})
    world = ET.SubElement(model, "worldbody")
    world.append(floor)
    half, steep, flat = 0.5**0.5, 0.65328, 0.2706
    walls: tuple[tuple[str, Vec, Quat, Vec], ...] = (
        ("leftcorner", (-1.25, 2.25, 1.5), (steep, steep, flat, flat), (1.06, 1.5, 0.01)),
        ("rightcorner", (-1.25, -2.25, 1.5), (steep, steep, -flat, -flat), (1.06, 1.5, 0.01)),
        ("left", (1.25, 3, 1.5), (half, half, 0, 0), (1.75, 1.5, 0.01)),
        ("right", (1.25, -3, 1.5), (half, -half, 0, 0), (1.75, 1.5, 0.01)),
        ("rear", (-2, 0, 1.5), (0.5, 0.5, 0.5, 0.5), (1.5, 1.5, 0.01)),
        ("front", (3, 0, 1.5), (0.5, 0.5, -0.5, -0.5), (3, 1.5, 0.01)),
    )
    for name, place, quat, size in walls:
        wall = {"name": f"wall_{name}_visual", "type": "box", "pos": numbers(place), "quat": numbers(quat)}
        untouched = {**SHOWN, "material": "walls_mat"}
        ET.SubElement(world, "geom", {**wall, "size": numbers(size), **untouched})
    if further is not None:
        world.append(further)
    for name, spot in (("light1", "1 1 4"), ("light2", "-3 -3 4")):
        light = {"name": name, "pos": spot, "dir": "0 -0.15 -1", "diffuse": "0.8 0.8 0.8"}
        further_ones = {"specular": "0.3 0.3 0.3", "directional": "false", "castshadow": "false"}
        ET.SubElement(world, "light", {**light, **further_ones})
    cameras: tuple[tuple[str, Vec, Quat], ...] = (
        ("frontview", (1, 0, 1.45), (0.56, 0.43, 0.43, 0.56)),
        ("birdview", (-0.2, 0, 3), (half, 0, 0, half)),
        ("agentview", (0.5, 0, 1.35), (0.653, 0.271, 0.271, 0.653)),
        ("sideview", (-0.0565, 1.2761, 1.488), (0.00991, 0.00688, 0.59122, 0.80642)),
    )
    for name, place, quat in cameras:
        camera = {"name": name, "mode": "fixed", "pos": numbers(place), "quat": numbers(quat)}
        ET.SubElement(world, "camera", camera)
    return model


def _plane() -> ET.Element:
    look = {"name": "floor", "type": "plane", "size": "3 3 0.125", "material": "floorplane"}
    return ET.Element("geom", {**look, "condim": "3", "group": "1"})


def _bare_floor() -> tuple[ET.Element, None]:
    body = ET.Element("body", {"name": "floor"})
    body.append(_plane())
    return body, None


def _table() -> tuple[ET.Element, ET.Element]:
    """The table; LIBERO's code sets its size and the places of its legs."""
    table = ET.Element("body", {"name": "table", "pos": "0 0 0.4"})
    top = {"type": "box", "size": "0.4 0.4 0.4"}
    ET.SubElement(
        table, "geom", {"name": "table_collision", **top, "group": "0", "friction": "1 0.005 0.0001"}
    )
    untouched = {**SHOWN, "material": "table_texture"}
    ET.SubElement(table, "geom", {"name": "table_visual", **top, **untouched})
    ET.SubElement(table, "site", {"name": "table_top", "pos": "0 0 0.4", "size": "0.001", "rgba": "0 0 0 0"})
    for i in range(1, 5):
        leg = {"name": f"table_leg{i}_visual", "type": "cylinder", "size": "0.05 0.1"}
        ET.SubElement(table, "geom", {**leg, **untouched})
    return _plane(), table
