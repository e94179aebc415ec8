"""Best of group: maximum likelihood on the best rollout of each prompt.

    L = - TOK_best{ log p_t },    best: the rollout with the highest reward of its group

Source: RAFT, arXiv 2304.06767. A group whose rewards are all equal has no best rollout and trains
nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tandem import NLL, Method, Term, policy_row


@dataclass
class BestOfGroup(Method):
    title: ClassVar[str] = "maximum likelihood on the best rollout of each prompt"
    paper: ClassVar[str] = "2304.06767"

    margin: float = 0.0  # by which the best reward must exceed the group's mean

    def rows(self, batch):
        rows = []
        for group in batch.groups:
            if np.max(group.rewards) > np.mean(group.rewards) + self.margin:
                best = group.trajectories[int(np.argmax(group.rewards))]
                rows.append(policy_row(best, 0.0, "best"))
        return rows

    def terms(self, batch):
        return [Term("best", NLL())]
