"""Corpora: the sources of training and validation samples, in any form of file.

A corpus is streamed (`Corpus.samples`), read at random (`Corpus.fetch`), and scanned once for its fingerprint
(`SampleScan`). Importing this package loads neither torch nor pyarrow nor datasets.
"""

from ghoststore.corpus.content import BESIDE_MESSAGES, Content, Messages, PromptCompletion, Tokenized
from ghoststore.corpus.corpus import Corpus, Position, open_corpus, spool_stdin
from ghoststore.corpus.fields import ResolvedFields, Sample
from ghoststore.corpus.locate import absolute
from ghoststore.corpus.memory import MemoryData, Source, part_word, same_source, source_name, source_of
from ghoststore.corpus.scan import MAX_DOMAINS, SampleScan, Scan
from ghoststore.settings.fields import Fields

__all__ = [
    "BESIDE_MESSAGES",
    "MAX_DOMAINS",
    "Content",
    "Corpus",
    "Fields",
    "MemoryData",
    "Messages",
    "Position",
    "PromptCompletion",
    "ResolvedFields",
    "Sample",
    "SampleScan",
    "Scan",
    "Source",
    "Tokenized",
    "absolute",
    "open_corpus",
    "part_word",
    "same_source",
    "source_name",
    "source_of",
    "spool_stdin",
]
