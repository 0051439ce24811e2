"""Corpora in every form."""

from tests.support.corpora import write as write
