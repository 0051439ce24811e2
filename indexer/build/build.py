"""``ghoststore.build``: make a part of a store from a checkpoint and a corpus."""

from __future__ import annotations

from ghoststore.lazy import importing
from ghoststore.progress import Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.keywords import takes
from indexer.build.like import resolved
from indexer.build.report import BuildReport


@takes(BuildOptions)
def build(options: BuildOptions) -> BuildReport:
    """Compute the projected gradient of every sample of ``data`` at ``checkpoint``, and write it to a part of
    ``store``.

    ``checkpoint`` is a folder in transformers' format or a hub id. ``data`` is any form of corpus, see
    ``docs/corpus.md``. With ``stream`` it is read once, in order; so is, without being told, a
    `datasets.IterableDataset`, or another object without a length that is iterated over anew, see ``docs/streams.md``.
    ``max_length`` is in tokens (default: the model's positions, at most 1024). ``batch_tokens`` is the number of padded
    tokens of a batch (default: 2,048 on a CPU, 16,384 on CUDA). Texts of what cannot be read again, such as standard
    input (``data="-"``), are kept in the store. ``name`` is the name of the part (default: made of the names of
    checkpoint and corpus).

    ``optimizer_state`` names a training checkpoint of ``ghoststore train`` or transformers' Trainer. Adam's second
    moment from it, factored into a row and a column, scales both sides of the projection. The inner product of two
    vectors is then ⟨g, V^-½ g'⟩: the effect of an Adam step on one sample on the loss of the other.

    ``like`` names a part of the store: what is not given (checkpoint, lengths, projection, …) is taken from it, and so
    is what its projection learned. The parts can then be ranked as one. ``skip_samples`` leaves out the first samples.

    If the part exists and is of the same build, it is continued: only spans without a commit record are computed. The
    result is byte-identical to that of an uninterrupted build. Of a corpus that grew at its end meanwhile it has the
    samples that it was begun with; the report has the command for the others.

    ``workers`` processes of this machine build side by side; with ``worker="2/8"`` this process builds the second of
    eight shares beside others, on this machine or others that see the same store; with ``engine="ray"`` actors of a Ray
    cluster build (see ``docs/scale.md``). Whoever comes first plans the part and learns the projection, once; the
    others wait for that.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used, MismatchError if the
    part exists and is of another build, CorruptError (before anything is computed) if a file of what is committed is
    damaged, BusyError if another process builds it, WorkerError if a process of ``workers`` dies again and again,
    StorageError if the disk refuses. Committed spans stay committed.
    """
    progress = options.progress or Silent()
    options = resolved(options)
    # Each way is imported where it is taken: who starts workers needs no torch, and need not wait for it.
    with importing():
        if options.workers is not None and not options.dry_run and options.engine != "ray":
            from indexer.build.workers import build_side_by_side as by
        elif options.engine == "ray" and not options.dry_run:
            from indexer.build.on_ray import build_on_ray as by
        elif options.streams:
            from indexer.build.stream import build_stream as by
        else:
            from indexer.build.alone import build_alone as by
    return by(options, progress)
