"""What an evaluation works on: the corpus of a part, a val set, and the scores of each method.

Legend: V val samples, G val groups, N samples of the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint.find import find_folder
from ghoststore.checkpoint.in_memory import tokenizer_source
from ghoststore.corpus import Corpus, Fields, Source, open_corpus
from ghoststore.corpus.fields import READING
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.build import TokenizeOptions
from ghoststore.settings.fields import ROLES
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import METRICS, StepWeight, WeightOption
from ghoststore.store import Part, Run
from ghoststore.store.base.own import source_path
from indexer.encode.tokens import Row
from indexer.tokenize.tokenize import tokenize_as_of
from indexer.training.inputs import is_shards
from indexer.training.retrain import Recipe, Retrainer, Retraining
from query.ask.blend import values_of_rows
from query.ask.encoder import PartEncoder, ValVectors, tokenizer_folder
from query.ask.lexical import WordIndex
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.common.texts import corpus_behind
from query.common.unchanged import read_unchanged
from query.evaluate.exact import ExactScores
from query.evaluate.predictors import (
    BASELINES,
    EXACT,
    GRADIENTS,
    WITH_WORDS,
    by_sample,
    grouped,
    random_scores,
    refuse_other_val,
    tf_idf_scores,
)
from query.evaluate.trainings import Plan

WHOLE = "all"
"""Name of the group that is the whole val set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """The scores of every sample of the corpus by one method."""

    whole_N: NDArray[np.float64]
    """(N,): scores for the whole val set."""
    groups: dict[str, NDArray[np.float64]]
    """(N,) for each val group; or only for ``WHOLE``, if there are no scores for the groups of this val set."""
    samples_VN: NDArray[np.float64] | None
    """(V, N): scores for each val sample; None if there are none."""
    by_group: bool = True
    """Whether ``groups`` are the groups of the val set; if not, its only entry is for the whole val set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The corpus, the val set and the trainings of an evaluation. :meth:`of` makes it."""

    encoder: PartEncoder
    """The encoder of the part, with the model of its checkpoint."""
    corpus: Corpus
    """The corpus of the part."""
    retrainer: Retrainer
    groups: dict[str, list[int]]
    """Places of the val samples of each domain."""
    out: Path
    progress: Progress

    @classmethod
    def of(
        cls,
        part: Part,
        val_set: Source,
        out: Path,
        *,
        fields: Fields,
        max_val_samples: int | None,
        recipe: Recipe,
        behind: RebuiltOptions,
        device: str,
        progress: Progress,
    ) -> Task:
        """Check the model and the corpus of ``part``, tokenize the corpus into ``out``, and read the val set.

        ``behind`` says where checkpoint, tokenizer and corpus are, if not where the user's own build read them.
        MismatchError if one of them is no longer the one that the part was built from.
        """
        if part.manifest["checkpoint"].get("adapter") is not None:
            raise UsageError(
                f"part {part.name!r} is of an adapter, and an evaluation trains whole models anew: build a part of the "
                "merged model (`model.merge_and_unload().save_pretrained(folder)`) and evaluate that"
            )
        corpus = corpus_behind(part, behind.data)
        # The encoder checks the folders; the trainings below read configuration, weights and tokenizer from them.
        encoder = PartEncoder(
            part,
            checkpoint=behind.checkpoint,
            base=behind.base,
            tokenizer=behind.tokenizer,
            device=device,
            corpus=corpus,
            progress=progress,
        )
        if encoder.exceeds:
            with open_corpus(val_set, fields) as val_corpus:  # refused before the corpus is read, which takes longer
                val_corpus.cut_stream(encoder.max_length)
                encoder.refuse_beyond(islice(val_corpus.samples(), max_val_samples))
        deque(read_unchanged(corpus, part, progress, grown=False), maxlen=0)
        scanned = part.manifest["corpus"]
        path = source_path(part.manifest, "checkpoint", f"part {part.name!r}", "checkpoint", behind.checkpoint)
        assert path is not None
        checkpoint = find_folder(path, beside_adapter=True, progress=progress)
        model, tokenizer = checkpoint.folder, tokenizer_folder(part, behind.tokenizer, checkpoint)
        shards = Path(corpus.source)
        if not is_shards(corpus.origin):
            shards = out / "tokens"
            names = (*ROLES, *READING) if scanned["fields"]["kind"] != "tokens" else READING
            options = TokenizeOptions(
                data=corpus.origin,
                tokenizer=tokenizer_source(tokenizer),
                out=shards,
                max_samples=scanned["max_samples"],
                fields=Fields(**{name: scanned["fields"].get(name) for name in names}),
                progress=progress,
            )
            tokenize_as_of(options, part.manifest["tokens"]["template_date"])
        retrainer = Retrainer(
            Retraining(
                model_folder=str(model),
                tokenizer_folder=str(tokenizer),
                shards=str(shards),
                val_set=val_set,
                fields=fields,
                max_val_samples=max_val_samples,
                max_length=part.manifest["tokens"]["max_length"],
                recipe=recipe,
                device=device,
            )
        )
        groups: dict[str, list[int]] = {}
        for place in range(len(retrainer.val.rows)):
            groups.setdefault(retrainer.val.domain_of(place), []).append(place)
        return cls(
            encoder=encoder,
            corpus=corpus,
            retrainer=retrainer,
            groups=dict(sorted(groups.items())),
            out=out,
            progress=progress,
        )

    @property
    def part(self) -> Part:
        """The part whose scores are evaluated."""
        return self.encoder.part

    @property
    def samples(self) -> int:
        """N, the number of samples of the corpus."""
        return len(self.retrainer.shards.length)

    @property
    def ids(self) -> list[str]:
        """The ids of the val samples."""
        return [row.sample.id for row in self.retrainer.val.rows]

    @property
    def places_in_val(self) -> list[int]:
        """The places of the val samples in the val set, counted from 0."""
        return [row.sample.source_row for row in self.retrainer.val.rows]

    def plan(self, kept: Mapping[str, NDArray[np.bool_]]) -> Plan:
        """The trainings on the samples ``kept``, by name, with the identity of their results."""
        manifest, job = self.part.manifest, self.retrainer.job
        identity = {
            "corpus": manifest["corpus"]["fingerprint"],
            "tokenizer": manifest["tokenizer"]["fingerprint"],
            "val": self.retrainer.val.fingerprint,
            "architecture": (Path(job.model_folder) / "config.json").read_text(),
        }
        return Plan(job=job, identity=identity, kept=kept)

    def methods(
        self,
        base: Question,
        parts: Sequence[Part],
        weights: Sequence[float],
        methods: Sequence[str],
        damping: float | None,
        run: Run | None,
        with_words: Collection[str] = (),
        step_weight: StepWeight = WeightOption.weight,
    ) -> dict[str, Callable[[], Scored]]:
        """For each method a function that computes its scores.

        The first of ``parts`` is the part of this task. The methods ``checkpoints-…`` sum over all ``parts`` with
        ``weights``; the values of ``run`` count a step with ``step_weight``. ``base`` is the question that the methods
        vary; its val set is encoded here, once. Those of ``with_words`` come once more, blended by its ``lexical``.

        UsageError for a method that is impossible for the part, and if the usable val samples are not those of the
        trainings.
        """
        exact = [method for method in methods if method in EXACT]
        gradients = [method for method in methods if method in GRADIENTS]
        several = len(parts) > 1
        vals: list[ValVectors] = []
        rows: list[Row] = []
        if gradients or several or exact:
            with base.opened_val_set(self.progress) as val_set:
                if gradients or several:
                    vals = [self._encode(part, base, val_set) for part in parts]
                if exact:
                    samples = islice(val_set.samples(), base.max_samples)
                    rows = [row for row in self.encoder.rows(samples) if row.status.usable]
                    refuse_other_val([row.sample.source_row for row in rows], self.places_in_val)
        score_of: dict[str, Callable[[], Scored]] = {}
        bm25 = cache(self._bm25)
        for method in gradients:
            question = replace(base, **GRADIENTS[method])
            if question.precondition != "none":
                question = replace(question, damping=damping)
            of_gradients = partial(self._of_gradients, question, parts[:1], [1.0], vals[:1])
            score_of[method] = of_gradients
            if method in with_words:
                score_of[method + WITH_WORDS] = partial(of_gradients, bm25)
        if several:
            for metric in METRICS:
                score_of[f"checkpoints-{metric}"] = partial(
                    self._of_gradients, replace(base, metric=metric), parts, weights, vals
                )
        scores = ExactScores(
            encoder=self.encoder,
            vals=rows,
            val_fingerprint=self.retrainer.val.fingerprint,
            samples=self.samples,
            folder=self.out / "exact",
            progress=self.progress,
        )
        for method in exact:
            scores.refuse(method)
            score_of[method] = partial(self._of_exact, scores, method)
        baselines = {
            "bm25": lambda: self._of_samples(bm25()),
            "tf-idf": self._of_tf_idf,
            "random": self._of_random,
        }
        score_of |= {method: baselines[method] for method in BASELINES if method in methods}
        if run is not None:
            score_of[f"training-time ({run.name})"] = partial(self._of_run, run, step_weight)
        return score_of

    def _encode(self, part: Part, base: Question, val_set: Corpus) -> ValVectors:
        """The vectors of the val samples, as in a query of ``part``. UsageError if they are not those of
        the trainings.
        """
        encoder = self.encoder
        if part is not self.part:
            encoder = PartEncoder(part, device=base.device, progress=self.progress)
        val = encoder.encode_val_set(val_set, "each", base.max_samples)
        val.note_left_out(self.progress)
        refuse_other_val(val.places, self.places_in_val)
        return val

    def _of_gradients(
        self,
        question: Question,
        parts: Sequence[Part],
        weights: Sequence[float],
        vals: Sequence[ValVectors],
        bm25: Callable[[], NDArray[np.float64]] | None = None,
    ) -> Scored:
        """Of rows by their vectors; with ``bm25``, which gives (V, N), blended by the ``lexical`` of ``question``."""
        lexical_VR = None
        if bm25 is not None:
            lexical_VR = np.full((len(vals[0].vectors), self.part.layout.rows), np.nan)
            lexical_VR[:, self.part.row_numbers] = bm25()[:, self.part.column("source_row")]
        scorer = Scorer.of(question, parts, weights, vals, self.progress, lexical_QN=lexical_VR)
        return self._of_samples(by_sample(scorer.scores(self.progress), self.part, self.samples))

    def _of_exact(self, scores: ExactScores, method: str) -> Scored:
        return self._of_samples(scores.of(method))

    def _bm25(self) -> NDArray[np.float64]:
        """(V, N): BM25 of each sample of the corpus for each val sample."""
        index = WordIndex(sample.preview() for sample in islice(self.corpus.samples(), self.samples))
        return np.stack([index.scores(row.sample.preview()) for row in self.retrainer.val.rows])

    def _of_tf_idf(self) -> Scored:
        texts = [row.sample.preview() for row in self.retrainer.val.rows]
        return self._of_samples(tf_idf_scores(self.corpus, texts, self.samples))

    def _of_random(self) -> Scored:
        return self._of_samples(
            random_scores(len(self.retrainer.val.rows), self.samples, self.retrainer.job.recipe.seed)
        )

    def _of_samples(self, scores_VN: NDArray[np.float64]) -> Scored:
        by_group = grouped(scores_VN, self.groups)
        return Scored(
            whole_N=scores_VN.mean(0), groups=dict(zip(self.groups, by_group, strict=True)), samples_VN=scores_VN
        )

    def _of_run(self, run: Run, weight: StepWeight) -> Scored:
        """Σ weight·score of a training run: for each val group if the run has scores for these groups, else for the
        whole val set.

        Groups with equal names are the same groups only if the run has the same val set. If it has another, its scores
        for the whole val set are taken, and a note says so.
        """

        def values(group: str | None) -> NDArray[np.float64]:
            values_N = values_of_rows(self.part, run, weight, self.progress, group, self.corpus.source).value
            return np.asarray(by_sample(values_N[None], self.part, self.samples)[0])

        whole_N = values(None)
        same_val = run.manifest["val"].get("fingerprint") == self.retrainer.val.fingerprint
        if not same_val:
            self.progress.note(
                f"run {run.name!r} was scored against another val set than the one that is evaluated: its values are "
                "taken for the whole of it"
            )
        if same_val and set(self.groups) <= set(run.layout.groups):
            return Scored(whole_N=whole_N, groups={name: values(name) for name in self.groups}, samples_VN=None)
        return Scored(whole_N=whole_N, groups={WHOLE: whole_N}, samples_VN=None, by_group=False)

    def places(self, scored: Scored) -> dict[str, list[int]]:
        """The val samples of each group of ``scored``."""
        if scored.by_group:
            return self.groups
        (name,) = scored.groups  # its name may be that of a group, too
        return {name: list(range(len(self.retrainer.val.rows)))}
