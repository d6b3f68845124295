"""Students: the vision-language-action policies that are fine-tuned."""

from spatial_forcing.students.base import STUDENTS, StudentConfig, load_student, statistics_names
from spatial_forcing.students.fusion import FusionVLA
from spatial_forcing.students.lora import LoraSettings, LoraStudent, merge
from spatial_forcing.students.nano import NanoConfig, NanoVLA
from spatial_forcing.students.openvla_oft import OpenVLAOFT, OpenVLAOFTConfig
from spatial_forcing.students.pi0 import Pi0, Pi0Config

__all__ = [
    "STUDENTS",
    "FusionVLA",
    "LoraSettings",
    "LoraStudent",
    "NanoConfig",
    "NanoVLA",
    "OpenVLAOFT",
    "OpenVLAOFTConfig",
    "Pi0",
    "Pi0Config",
    "StudentConfig",
    "load_student",
    "merge",
    "statistics_names",
]
