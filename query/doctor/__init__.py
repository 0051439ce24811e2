"""Would a store be right? One file a check; :mod:`query.doctor.examination` does them in order."""

from query.doctor.examination import DoctorReport, doctor

__all__ = ["DoctorReport", "doctor"]
