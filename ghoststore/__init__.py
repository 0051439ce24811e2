"""ghoststore: a vector store of gradients. Which training samples make the model better at this?

Everything a user needs is an attribute of this package; each is imported when it is first used, so that
``import ghoststore`` loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghoststore.lazy import FACE, load

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ghoststore.corpus import Corpus as Corpus
    from ghoststore.corpus import Fields as Fields
    from ghoststore.corpus.shards import TokenShards as TokenShards
    from ghoststore.store import Part as Part
    from ghoststore.store import Run as Run
    from ghoststore.store import Status as Status
    from ghoststore.store import Store as Store
    from ghoststore.store.info import info as info
    from ghoststore.store.verify import verify as verify
    from indexer.build import BuildReport as BuildReport
    from indexer.build import build as build
    from indexer.callback import GhostStoreCallback as GhostStoreCallback
    from indexer.dotprod import GradDotProdEngine as GradDotProdEngine
    from indexer.dotprod import Scores as Scores
    from indexer.engine import GradProjLoraEngine as GradProjLoraEngine
    from indexer.ghost_config import GhostConfig as GhostConfig
    from indexer.losses import next_token_losses as next_token_losses
    from indexer.manager import GhostEngineManager as GhostEngineManager
    from indexer.projection import ProjectionConfig as ProjectionConfig
    from indexer.tokenize import TokenizeReport as TokenizeReport
    from indexer.tokenize import tokenize as tokenize
    from indexer.training.config import TrainConfig as TrainConfig
    from indexer.training.train import TrainReport as TrainReport
    from indexer.training.train import train as train
    from query.demo import demo as demo
    from query.doctor import DoctorReport as DoctorReport
    from query.doctor import doctor as doctor
    from query.evaluate.evaluate import evaluate as evaluate
    from query.fidelity import FidelityReport as FidelityReport
    from query.fidelity import fidelity as fidelity
    from query.full_gradients import FullGradientsReport as FullGradientsReport
    from query.full_gradients import full_gradients as full_gradients
    from query.index import IndexReport as IndexReport
    from query.index import index as index
    from query.plot_error import ErrorCurve as ErrorCurve
    from query.plot_error import plot_error as plot_error
    from query.query import query as query
    from query.results import QueryResult as QueryResult
    from query.score_results import ScoresResult as ScoresResult
    from query.scores import scores as scores
    from query.select import select as select
    from query.select_report import SelectReport as SelectReport
    from query.self_influence import self_influence as self_influence
    from query.watch import watch as watch

__all__ = [*FACE, "__version__"]


def __getattr__(name: str) -> Any:
    return load(name)


def __dir__() -> list[str]:
    return sorted(__all__)
