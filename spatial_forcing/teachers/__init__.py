"""Teachers: frozen vision models whose features supervise the student."""

from spatial_forcing.teachers.cards import TEACHERS, TeacherCard
from spatial_forcing.teachers.load import load_teacher
from spatial_forcing.teachers.own import as_teacher

__all__ = ["TEACHERS", "TeacherCard", "as_teacher", "load_teacher"]
