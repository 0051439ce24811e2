"""ghoststore: a vector store of gradients. Which training samples make the model better at this?

Every public name is an attribute of this package. It is imported when it is first used, so that ``import ghoststore``
loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghoststore.lazy import FACE, load

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ghoststore.checkpoint.nanogpt import load_nanogpt as load_nanogpt
    from ghoststore.corpus import Corpus as Corpus
    from ghoststore.server.serve import Explorer as Explorer
    from ghoststore.server.serve import serve as serve
    from ghoststore.settings.fields import Fields as Fields
    from ghoststore.settings.projection import ProjectionConfig as ProjectionConfig
    from ghoststore.settings.train import TrainConfig as TrainConfig
    from ghoststore.store import Part as Part
    from ghoststore.store import Run as Run
    from ghoststore.store import Status as Status
    from ghoststore.store import Store as Store
    from ghoststore.store.info import info as info
    from ghoststore.store.manage.copy import copy as copy
    from ghoststore.store.manage.gc import gc as gc
    from ghoststore.store.manage.remove import remove as remove
    from ghoststore.store.manage.rename import rename as rename
    from ghoststore.store.verify import verify as verify
    from ghoststore.tokens.shards import TokenShards as TokenShards
    from indexer.build.build import build as build
    from indexer.build.repair import repair as repair
    from indexer.build.report import BuildReport as BuildReport
    from indexer.dotprod import GradDotProdEngine as GradDotProdEngine
    from indexer.dotprod import Scores as Scores
    from indexer.dotprod.segments import packed_samples as packed_samples
    from indexer.encode.engine import GradProjLoraEngine as GradProjLoraEngine
    from indexer.encode.losses import next_token_losses as next_token_losses
    from indexer.integrations.callback import GhostStoreCallback as GhostStoreCallback
    from indexer.integrations.config import GhostConfig as GhostConfig
    from indexer.integrations.manager import GhostEngineManager as GhostEngineManager
    from indexer.session.choosing import Choosing as Choosing
    from indexer.session.policies import Candidates as Candidates
    from indexer.tokenize.tokenize import TokenizeReport as TokenizeReport
    from indexer.tokenize.tokenize import tokenize as tokenize
    from indexer.training.train import TrainReport as TrainReport
    from indexer.training.train import train as train
    from query.ann.command import IndexReport as IndexReport
    from query.ann.command import index as index
    from query.answer.query import query as query
    from query.answer.results import QueryResult as QueryResult
    from query.answer.self_influence import self_influence as self_influence
    from query.answer.session import Session as Session
    from query.answer.session import open as open
    from query.demo.demo import demo as demo
    from query.doctor import DoctorReport as DoctorReport
    from query.doctor import doctor as doctor
    from query.evaluate.evaluate import evaluate as evaluate
    from query.exact.full_gradients import FullGradientsReport as FullGradientsReport
    from query.exact.full_gradients import full_gradients as full_gradients
    from query.export.export import export as export
    from query.fidelity.fidelity import FidelityReport as FidelityReport
    from query.fidelity.fidelity import fidelity as fidelity
    from query.fidelity.plot_error import ErrorCurve as ErrorCurve
    from query.fidelity.plot_error import plot_error as plot_error
    from query.select.report import SelectReport as SelectReport
    from query.select.select import select as select
    from query.training_scores.results import ScoresResult as ScoresResult
    from query.training_scores.scores import scores as scores
    from query.training_scores.watch import watch as watch

__all__ = [*FACE, "__version__"]


def __getattr__(name: str) -> Any:
    return load(name)


def __dir__() -> list[str]:
    return sorted(__all__)
