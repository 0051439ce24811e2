"""Process groups of two ranks, one after another in the same processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.support.trainings import in_two

if TYPE_CHECKING:
    from tests.conftest import Lab

GROUPS = """
from datetime import timedelta
import torch
from indexer.session import ranks
ranks.LONGEST_START = timedelta(seconds=20)
for group in range(6):
    with ranks.joined("cpu") as (here, _):
        print(int(here.sum(torch.tensor(here.rank + group))))
"""


@pytest.mark.thin(1)
@pytest.mark.ddp
@pytest.mark.parametrize("served", ["by torchrun", "by the first rank"])
def test_one_group_after_another(lab: Lab, served: str) -> None:
    """The addresses of the groups before are still in torchrun's store: a group that read them hung, or talked to
    nobody.
    """
    store, variables = None, {}
    if served == "by torchrun":
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": store.port}
    for outcome in in_two(lab, GROUPS, **variables):
        assert outcome.code == 0, outcome.err
        assert outcome.out.split() == [str(2 * group + 1) for group in range(6)]
