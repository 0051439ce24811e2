"""The whole story on a corpus that is made here."""
