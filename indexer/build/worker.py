"""A process that builds spans of a part for another: see :mod:`indexer.build.workers`."""

from ghoststore.piped import orders
from ghoststore.settings.build import BuildOptions
from indexer.build.build import opened
from indexer.build.crew import Done, Ready
from indexer.build.report import BuildReport
from indexer.build.sent import Sent
from indexer.build.spans import KeptEncoder, compute_lists


def main() -> None:
    """Open what the first order names, then build the spans of each that follows, until one is None."""
    with orders() as coming:
        sent = Sent(coming.answer)
        # What is committed was checked by the process that started this one.
        with opened(BuildOptions(**coming.next()), sent, lambda spans: []) as (job, part):
            sent.send(Ready(report=BuildReport.of(job), learning=job.learning_seconds))
            with KeptEncoder(job) as kept:
                lists = iter(coming.next, None)
                compute_lists(part, job, sent, lists, kept=kept, done=lambda: sent.send(Done()), wake=coming.wake)


if __name__ == "__main__":
    main()
