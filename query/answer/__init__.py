"""The results of a query, and the files and pages that they are written to."""
