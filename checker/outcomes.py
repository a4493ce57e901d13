"""The outcomes of a check, as words."""

# Outcomes of a check. Only PASSED passes; FAULT is never charged to the learner.
PASSED, FAILED, ERROR, TIMEOUT, CRASH, LIMIT, TAMPERED, NOT_RUN, FAULT, CANCELLED = (
    "passed", "failed", "error", "timeout", "crash", "limit", "tampered", "not run", "fault", "cancelled",
)  # fmt: skip
