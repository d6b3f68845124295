"""Plain shapes as MuJoCo XML in the form that robosuite loads objects in.

Metres, kilograms; turns are quaternions (w, x, y, z), see `turned`. What is touched ("solid") and what is
seen ("shown") are separate geoms, in groups 0 and 1, as robosuite wants them. The whole mass is spread over
the solid geoms by their volume.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Vec = tuple[float, float, float]
ORIGIN: Vec = (0.0, 0.0, 0.0)
Quat = tuple[float, float, float, float]
UPRIGHT: Quat = (1.0, 0.0, 0.0, 0.0)
CONTACT = {"solref": "0.001 1", "solimp": "0.998 0.998 0.001", "friction": "0.95 0.3 0.1"}
"""How LIBERO's objects touch: stiff, with this sliding, torsional and rolling friction."""
SHOWN = {"contype": "0", "conaffinity": "0", "group": "1"}
"""Of a geom that is only seen."""


@dataclass(frozen=True)
class Solid:
    """A primitive.

    Attributes:
        kind: MuJoCo's geom type, "box" or "cylinder".
        size: half sides of a box; radius and half length of a cylinder (along its z).
        at: centre.
        turn: of its axes.
        material: of the shown geom; None where it is only touched or has no colour of its own.
    """

    kind: str
    size: tuple[float, ...]
    at: Vec = ORIGIN
    turn: Quat = UPRIGHT
    material: str | None = None

    @property
    def volume(self) -> float:
        """Cubic metres."""
        if self.kind == "box":
            return 8 * math.prod(self.size)
        return 2 * math.pi * self.size[0] ** 2 * self.size[1]

    def geom(self, **attributes: str) -> ET.Element:
        """The geom, with further attributes."""
        places = {"pos": numbers(self.at), "quat": numbers(self.turn), "size": numbers(self.size)}
        return ET.Element("geom", {"type": self.kind, **places, **attributes})


def box(half: Vec, at: Vec = ORIGIN, turn: Quat = UPRIGHT, material: str | None = None) -> Solid:
    """A box with these half sides."""
    return Solid("box", half, at, turn, material)


def drum(
    radius: float, half: float, at: Vec = ORIGIN, turn: Quat = UPRIGHT, sides: int = 8
) -> tuple[Solid, ...]:
    """A round body along z as boxes through its axis: fingers that close on it touch faces, not one line."""
    chord = radius * math.tan(math.pi / sides)
    return tuple(
        Solid("box", (radius, chord, half), at, _product(turn, turned(z=360 * i / sides)))
        for i in range(sides // 2)
    )


def foot(radius: float, half: float, height: float) -> tuple[Solid, Solid]:
    """A round bottom as two crossed boxes: few contacts with what it stands on."""
    long, short, at = 0.95 * radius, 0.6 * radius, (0.0, 0.0, height)
    return box((long, short, half), at), box((short, long, half), at)


def ring(
    start: tuple[float, float], end: tuple[float, float], thickness: float, width: float, sides: int = 16
) -> tuple[Solid, ...]:
    """A wall around z as boxes of this half width, from (radius, height) to (radius, height)."""
    (r0, z0), (r1, z1) = start, end
    slope = math.degrees(math.atan2(z1 - z0, r1 - r0))
    length = math.hypot(r1 - r0, z1 - z0) / 2
    middle = (r0 + r1) / 2
    turns = [360 * i / sides for i in range(sides)]
    return tuple(
        Solid(
            "box",
            (length, width, thickness / 2),
            (middle * math.cos(math.radians(t)), middle * math.sin(math.radians(t)), (z0 + z1) / 2),
            turned(y=-slope, z=t),
        )
        for t in turns
    )


@dataclass(frozen=True)
class Lathe:
    """A closed outline turned around z into a mesh that is only seen.

    Attributes:
        outline: (radius, height) of its corners, counter-clockwise where the radius points right.
        material: its material.
        sides: facets of the turn.
    """

    outline: Sequence[tuple[float, float]]
    material: str
    sides: int = 48

    def mesh(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Vertices (N, 3) and triangles (M, 3), whose normals point outwards."""
        corners = np.array([(max(r, 1e-5), z) for r, z in self.outline])
        n, angles = len(corners), 2 * np.pi * np.arange(self.sides) / self.sides
        turned = np.stack(
            [
                corners[:, 0] * np.cos(angles)[:, None],
                corners[:, 0] * np.sin(angles)[:, None],
                np.broadcast_to(corners[:, 1], (self.sides, n)),
            ],
            -1,
        )
        side, corner = np.meshgrid(np.arange(self.sides), np.arange(n), indexing="ij")
        here, up = side * n + corner, side * n + (corner + 1) % n
        right = ((side + 1) % self.sides) * n + corner
        diagonal = ((side + 1) % self.sides) * n + (corner + 1) % n
        faces = np.concatenate(
            [np.stack([here, right, diagonal], -1), np.stack([here, diagonal, up], -1)]
        ).reshape(-1, 3)
        return turned.reshape(-1, 3), faces


@dataclass(frozen=True)
class Shape:
    """What a body is made of.

    Attributes:
        solid: what is touched; it has the mass.
        shown: what is seen; the solids themselves where it is empty.
        mass: kilograms; 0 for what stands on the ground.
    """

    solid: Sequence[Solid]
    shown: Sequence[Solid | Lathe] = ()
    mass: float = 0.0

    def fill(self, body: ET.Element, assets: ET.Element, material: str, name: str) -> None:
        """Append the geoms to `body` and their meshes to `assets`.

        Args:
            body: MuJoCo's body.
            assets: MuJoCo's assets.
            material: of what names none.
            name: of this body's meshes.
        """
        volume = sum(each.volume for each in self.solid)
        for each in self.solid:
            share = {"mass": numbers([self.mass * each.volume / volume])} if self.mass else {}
            body.append(each.geom(group="0", rgba="0.8 0.8 0.8 0.3", **CONTACT, **share))
        for i, part in enumerate(self.shown or self.solid):
            if isinstance(part, Solid):
                body.append(part.geom(material=part.material or material, mass="0", **SHOWN))
                continue
            vertices, faces = part.mesh()
            mesh = {"name": f"{name}_{i}", "vertex": numbers(vertices.ravel())}
            ET.SubElement(assets, "mesh", {**mesh, "face": " ".join(map(str, faces.ravel()))})
            shown = {"type": "mesh", "mesh": mesh["name"], "material": part.material, "mass": "0", **SHOWN}
            ET.SubElement(body, "geom", shown)


@dataclass(frozen=True)
class Joint:
    """A hinge or a slide with a range (radians or metres) and damping."""

    name: str
    kind: str
    axis: Vec
    range: tuple[float, float]
    damping: float


@dataclass(frozen=True)
class Site:
    """A region that predicates look at: a box with these half sides."""

    name: str
    half: Vec
    at: Vec = ORIGIN
    turn: Quat = UPRIGHT
    kind: str = "box"
    rgba: str = "0.8 0.8 0.8 0"

    def element(self) -> ET.Element:
        """The site."""
        places = {"pos": numbers(self.at), "quat": numbers(self.turn), "size": numbers(self.half)}
        return ET.Element(
            "site", {"name": self.name, "type": self.kind, "group": "0", "rgba": self.rgba, **places}
        )


@dataclass(frozen=True)
class Part:
    """A body with its own shape, sites, joint, and bodies on it.

    Attributes:
        name: of the body.
        shape: None for a body that only holds others.
        at, turn: in its parent.
        joint: how it moves in its parent; it then weighs 3 kg, as LIBERO's drawers and knobs do.
    """

    name: str
    shape: Shape | None = None
    at: Vec = ORIGIN
    turn: Quat = UPRIGHT
    sites: Sequence[Site] = ()
    joint: Joint | None = None
    parts: Sequence[Part] = field(default=())

    def build(self, parent: ET.Element, assets: ET.Element, material: str) -> None:
        """Append the body to `parent`."""
        places = {"pos": numbers(self.at), "quat": numbers(self.turn)}
        body = ET.SubElement(parent, "body", {"name": self.name, **places})
        if self.joint is not None:
            j = self.joint
            ET.SubElement(body, "inertial", {"pos": "0 0 0", "mass": "3", "diaginertia": "1 1 1"})
            moves = {"axis": numbers(j.axis), "limited": "true", "range": numbers(j.range)}
            ET.SubElement(
                body, "joint", {"name": j.name, "type": j.kind, "damping": numbers([j.damping]), **moves}
            )
        for site in self.sites:
            body.append(site.element())
        if self.shape is not None:
            self.shape.fill(body, assets, material, f"{self.name}_mesh")
        for part in self.parts:
            part.build(body, assets, material)


def object_xml(root: Part, materials: Mapping[str, str], markers: Mapping[str, Vec]) -> ET.Element:
    """An object as robosuite loads it: materials from textures, the body "object", and three marker sites.

    Args:
        root: the body; named "object".
        materials: name -> texture file, relative to the XML; the first is that of parts without one.
        markers: positions of "bottom_site", "top_site" and "horizontal_radius_site".
    """
    model = ET.Element("mujoco", {"model": "stand_in"})
    ET.SubElement(model, "compiler", {"angle": "radian"})
    assets = ET.SubElement(model, "asset")
    for name, file in materials.items():
        ET.SubElement(assets, "texture", {"name": f"tex-{name}", "type": "cube", "file": file})
        look = {"reflectance": "0.1", "specular": "0.2", "texture": f"tex-{name}"}
        ET.SubElement(assets, "material", {"name": name, **look})
    outer = ET.SubElement(ET.SubElement(model, "worldbody"), "body")
    root.build(outer, assets, next(iter(materials)))
    for name, at in markers.items():
        ET.SubElement(outer, "site", {"name": name, "pos": numbers(at), "size": "0.005", "rgba": "0 0 0 0"})
    return model


def numbers(values: Iterable[float]) -> str:
    """Numbers as MuJoCo reads them; micrometres are enough."""
    return " ".join(f"{value:.6g}" for value in values)


def turned(x: float = 0, y: float = 0, z: float = 0) -> Quat:
    """A turn of so many degrees about x, then about y, then about z."""
    return _quat(Rotation.from_euler("xyz", (x, y, z), degrees=True))


def _product(then: Quat, first: Quat) -> Quat:
    """One turn for two."""
    both = [Rotation.from_quat((*each[1:], each[0])) for each in (then, first)]
    return _quat(both[0] * both[1])


def _quat(rotation: Rotation) -> Quat:
    x, y, z, w = (float(value) for value in rotation.as_quat())
    return w, x, y, z
