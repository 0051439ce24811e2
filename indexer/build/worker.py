"""A process that builds spans of a part for another: see :mod:`indexer.build.workers`."""

from ghoststore import lazy
from ghoststore.piped import orders


def main() -> None:
    """Open what the first order names, then build the spans of each that follows, until one is None."""
    lazy.process_is_ours = True
    with orders() as coming:
        with lazy.importing():
            from ghoststore.settings.build import BuildOptions
            from indexer.build.crew import Done, Ready
            from indexer.build.estimate import report_of
            from indexer.build.opened import opened
            from indexer.build.sent import Sent
            from indexer.build.share import device_in_turn
            from indexer.build.spans import KeptEncoder, compute_lists

        sent = Sent(coming.answer)
        number, keywords = coming.next()
        options = BuildOptions(**{**keywords, "device": device_in_turn(keywords["device"], number)})
        # What is committed was checked by the process that started this one.
        with opened(options, sent, lambda spans: []) as (job, part):
            sent.send(Ready(report=report_of(job), learning=job.learning_seconds))
            with KeptEncoder(job) as kept:
                lists = iter(coming.next, None)
                compute_lists(part, job, sent, lists, kept=kept, done=lambda: sent.send(Done()), wake=coming.wake)


if __name__ == "__main__":
    main()
