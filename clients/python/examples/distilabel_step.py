"""A step of a distilabel pipeline (1.5) that scores pairs.

with Pipeline(name="curate") as pipeline:
    load = LoadDataFromHub(repo_id="org/pairs", split="train")
    score = ScorePairs(target="http://bradley:50051", policy="models/ID", input_batch_size=512)
    load >> score
"""

from collections.abc import Iterator
from typing import Any

from distilabel.steps import Step, StepInput
from pydantic import PrivateAttr

from bradley import Scorer


class ScorePairs(Step):  # type: ignore[misc]
    """Adds the scores of pairs to the rows of a batch."""

    target: str
    policy: str
    _scorer: Scorer = PrivateAttr()

    def load(self) -> None:
        """Makes the scorer, in the process that runs the step."""
        super().load()
        self._scorer = Scorer(self.target, self.policy)

    @property
    def inputs(self) -> list[str]:
        """The columns that the step reads."""
        return ["prompt", "chosen", "rejected"]

    @property
    def outputs(self) -> list[str]:
        """The columns that the step adds."""
        return ["probability", "margin", "chosen_reward", "rejected_reward", "error"]

    def process(self, inputs: StepInput) -> Iterator[list[dict[str, Any]]]:
        """Scores a batch."""
        yield self._scorer.rows(inputs)
