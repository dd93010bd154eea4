from __future__ import annotations

from tests.chaos import resume_every_step
from tests.workspace import Workspace


def test_a_job_killed_after_any_step_ends_with_the_same_adapter(workspace: Workspace) -> None:
    resumed = resume_every_step.run(workspace, 6)
    assert resumed.wrong == []
    assert resumed.adapters == {"paged_adamw_32bit": 1, "paged_adamw_8bit": 1}
    assert resumed.resumed == 12
