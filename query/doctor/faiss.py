"""Check: is FAISS installed, and for which device? Only ``ghoststore index`` needs it."""

from __future__ import annotations

from ghoststore.errors import UsageError
from query.ann.engine import check_device, load_faiss
from query.doctor.finding import Check, Finding, right
from query.doctor.subject import Subject


def examine(subject: Subject) -> Finding:
    """Import FAISS. The finding is never wrong, because exact search needs no FAISS."""
    try:
        faiss = load_faiss()
    except UsageError as error:
        return right("no FAISS that can be used", f"{error}.", installed=False)
    details = {"installed": True, "version": faiss.__version__, "gpus": 0}
    if subject.models.device.startswith("cuda"):
        try:
            check_device("cuda")
        except UsageError as error:
            return right(f"FAISS {faiss.__version__}, for the CPU alone", f"{error}.", **details)
    details["gpus"] = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    where = f"{details['gpus']} GPUs" if details["gpus"] else "the CPU"
    return right(f"FAISS {faiss.__version__} on {where}", **details)


CHECK = Check(name="faiss", asks="Is FAISS there, on which device?", run=examine)
