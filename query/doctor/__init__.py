"""Checks of whether a store would be right, one file for each; :mod:`query.doctor.examination` runs them in order."""

from query.doctor.examination import DoctorReport, doctor

__all__ = ["DoctorReport", "doctor"]
