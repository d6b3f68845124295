"""Teachers: frozen vision models whose features supervise the student. Importing this registers them all."""

from spatial_forcing.teachers import vggt
from spatial_forcing.teachers.base import TEACHERS, TeacherCard, load_teacher

__all__ = ["TEACHERS", "TeacherCard", "load_teacher", "vggt"]
