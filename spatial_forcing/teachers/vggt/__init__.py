"""VGGT (arXiv 2503.11651), own implementation: model, checkpoints, frozen teacher, cards of its weights."""

from spatial_forcing.teachers.cards import TEACHERS, TeacherCard, TeacherFacts
from spatial_forcing.teachers.dpt import DPTConfig
from spatial_forcing.teachers.pose import decode_pose, encode_pose
from spatial_forcing.teachers.vggt.config import CameraHeadConfig, DinoV2Config, VGGTConfig
from spatial_forcing.teachers.vggt.loading import find_local, load_vggt, save_vggt
from spatial_forcing.teachers.vggt.model import VGGT
from spatial_forcing.teachers.vggt.teacher import NANO_FOLDER, VGGT_1B, VGGTTeacher, load_vggt_teacher

__all__ = [
    "VGGT",
    "CameraHeadConfig",
    "DPTConfig",
    "DinoV2Config",
    "VGGTConfig",
    "VGGTTeacher",
    "decode_pose",
    "encode_pose",
    "find_local",
    "load_vggt",
    "load_vggt_teacher",
    "save_vggt",
]

TEACHERS.add(
    VGGT_1B,
    TeacherCard(
        name=VGGT_1B,
        loader=load_vggt_teacher,
        licence="CC-BY-NC-4.0",
        note="The paper's teacher. Not for commercial use.",
        commercial_alternative="facebook/VGGT-1B-Commercial",
        facts=TeacherFacts(909.1, 2048, 518, True, 1.0),
    ),
)
TEACHERS.add(
    "facebook/VGGT-1B-Commercial",
    TeacherCard(
        name="facebook/VGGT-1B-Commercial",
        loader=load_vggt_teacher,
        licence="LicenseRef-VGGT-Commercial",
        note="Same architecture as VGGT-1B; gated: accept its licence on the hub first.",
        facts=TeacherFacts(909.1, 2048, 518, True, 1.0),
    ),
)
TEACHERS.add(
    "vggt-nano",
    TeacherCard(
        name="vggt-nano",
        loader=load_vggt_teacher,
        licence="Apache-2.0",
        note="Small VGGT pretrained by this project on rendered multi-view scenes; ships with the package.",
        folder=NANO_FOLDER,
        facts=TeacherFacts(1.7, 256, 128, True, 0.0002),
    ),
)
