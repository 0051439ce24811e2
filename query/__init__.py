"""From a val set to ranked samples. Users import from :mod:`ghoststore`; this package is its machinery."""
