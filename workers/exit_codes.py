"""Exit codes of a trainer that wrote no outcome, and their meaning."""

CLAIM_LOST = 75
SUPERVISOR_GONE = 76
HUNG = 77
NO_DATABASE = 78

CAUSES = {
    CLAIM_LOST: "the trainer lost its claim",
    SUPERVISOR_GONE: "the trainer's supervisor had ended",
    HUNG: "the trainer made no progress and exited; the log has its stack traces",
    NO_DATABASE: "the trainer could not renew its claim in time and exited",
}
