"""The vectors of a question's val sets: computed by the model of a part, or kept from an earlier question."""

from __future__ import annotations

from ghoststore.corpus import Corpus
from ghoststore.progress import Progress, Task
from ghoststore.settings.shared import Checkpoint
from ghoststore.store import Part
from query.ask.encoder import PartEncoder, ValVectors
from query.ask.kept_vectors import KeptVectors, ValSet
from query.ask.question import Question


def val_vectors(
    question: Question,
    part: Part,
    checkpoint: Checkpoint | None,
    val_set: Corpus,
    minus: Corpus | None,
    progress: Progress,
    *,
    encoder: PartEncoder | None = None,
    keep: bool = False,
) -> tuple[ValVectors, ValVectors | None, PartEncoder | None]:
    """(vectors of ``val_set``, those of ``minus``, the encoder that made them: None where none was needed).

    ``encoder`` is one that is open already. With ``keep`` vectors are those of an earlier question where they are kept,
    and new ones are. Raises what :class:`PartEncoder` and its ``encode_val_set`` raise, CorpusError for a row that is
    no sample.
    """
    wanted = [ValSet(val_set, question.grouping, question.max_samples, question.phrase)]
    wanted += [] if minus is None else [ValSet(minus, "mean")]
    kept = KeptVectors.of(part, question, checkpoint) if keep else None
    found = [None if kept is None else kept.read(one) for one in wanted]
    heard = _Heard(progress)
    if encoder is None and not all(found):
        encoder = PartEncoder(
            part,
            checkpoint=checkpoint,
            base=question.base,
            tokenizer=question.tokenizer,
            data=question.data,
            device=question.device,
            progress=progress if kept is None else heard,
        )
    at_opening = list(heard.notes)
    vectors: list[ValVectors] = []
    for one, before in zip(wanted, found, strict=True):
        if before is not None:
            val, notes = before
            for note in notes:
                if note not in heard.notes:
                    heard.note(note)
        else:
            assert encoder is not None
            own = len(heard.notes)
            if kept is None:
                val = one.encoded(encoder)
            else:
                val, content = one.encoded_and_hashed(encoder)
                kept.keep(one, val, content, [*at_opening, *heard.notes[own:]])
        val.note_left_out(progress, "val" if not vectors else "`minus`")
        vectors.append(val)
    return vectors[0], None if minus is None else vectors[1], encoder


class _Heard:
    """A listener that hands everything on, and remembers the notes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return self._progress.task(description, total, done, unit)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self._progress.note(message)
