"""The model of a part, and the words of its rows, kept between questions."""

from __future__ import annotations

from threading import Lock

from ghoststore.checkpoint.in_memory import LoadedCheckpoint
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import in_memory
from ghoststore.store import Part
from query.ask.encoder import PartEncoder
from query.ask.lexical import PartWords


class OpenedModel:
    """Loads the model, tokenizer and projection of a part when they are first needed, and keeps them."""

    def __init__(self, options: RebuiltOptions) -> None:
        self.lock = Lock()
        """Hold it while an encoder works: its model takes one batch at a time."""
        self._options = options
        self._loaded = LoadedCheckpoint.of(options.checkpoint) if in_memory(options.checkpoint) else None
        self._encoder: PartEncoder | None = None
        self._words: tuple[str, PartWords] | None = None
        self._versions = self._versions_now()

    def encoder(self, part: Part, progress: Progress) -> PartEncoder:
        """The encoder of ``part``, which must be the part that it was first asked for, with the same rows or more.

        MismatchError if it is another part, or if the weights of a loaded model have changed since; and what
        :class:`PartEncoder` raises.
        """
        if self._loaded is not None and self._versions != self._versions_now():
            raise MismatchError(
                f"the weights of {self._loaded.where} have changed since the session was opened: they are no longer "
                f"those that part {part.name!r} was built from. Open a session of a part of these weights"
            )
        if self._encoder is None:
            self._encoder = PartEncoder(
                part,
                checkpoint=self._options.checkpoint,
                base=self._options.base,
                tokenizer=self._options.tokenizer,
                data=self._options.data,
                device=self._options.device,
                progress=progress,
            )
        elif self._encoder.part.identity != part.identity:
            raise MismatchError(
                f"part {part.name!r} is another one than when the session was opened: it was removed, and built anew. "
                "Open a session of it"
            )
        return self._encoder.at(part, progress)

    def words(self, part: Part, progress: Progress) -> PartWords:
        """The words of the rows of ``part``, read once for the rows that are committed."""
        covers = f"{part.name} {part.fingerprint()}"
        if self._words is None or self._words[0] != covers:
            self._words = covers, PartWords(part, self._options.data, progress)
        return self._words[1]

    @property
    def device(self) -> str | None:
        """The device of the model; None before it is loaded."""
        return None if self._encoder is None else str(self._encoder.model.device)

    def _versions_now(self) -> tuple[int, ...]:
        return () if self._loaded is None else self._loaded.versions()
