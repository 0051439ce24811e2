"""From a checkpoint and a corpus to stored gradients: layers, projections, the engine, the build.

Users import from :mod:`ghoststore`; this package is its machinery.
"""
