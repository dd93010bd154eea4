"""How a trainer ends that writes no outcome, and what that means."""

CLAIM_LOST = 75
SUPERVISOR_GONE = 76
HUNG = 77
NO_DATABASE = 78

CAUSES = {
    CLAIM_LOST: "the trainer lost its claim",
    SUPERVISOR_GONE: "the trainer's supervisor was gone",
    HUNG: "the trainer made no progress and ended itself; the log has where it stood",
    NO_DATABASE: "the trainer could not renew its claim in time and ended itself",
}
