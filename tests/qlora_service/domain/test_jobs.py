from qlora_service.domain.jobs import TRANSITIONS, JobStatus


def test_every_status_is_in_the_transition_table() -> None:
    assert set(TRANSITIONS) == set(JobStatus)


def test_terminal_statuses_have_no_transitions() -> None:
    terminal = {status for status in JobStatus if status.terminal}
    assert terminal == {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    assert all(not TRANSITIONS[status] for status in terminal)


def test_only_a_running_job_can_succeed_or_fail() -> None:
    for outcome in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        assert {status for status in JobStatus if outcome in TRANSITIONS[status]} == {JobStatus.RUNNING}
