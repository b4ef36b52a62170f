"""Exit codes of a training process, so that whatever started it knows what to do next."""

import enum


class ExitCode(enum.IntEnum):
    """How `python -m sparse_attn.train.main` ended.

    FINISHED: all steps are done and `summary.json` is written.
    USAGE: the command line, the config or the data is wrong; starting again will not help.
    CHECKPOINTS: the run folder holds checkpoints and none of them can be restored.
    NON_FINITE: the loss or a weight became NaN or infinite; the last good checkpoint is kept.
    OUT_OF_MEMORY: the device's memory is too small; the message says what to change.
    PREEMPTED: SIGTERM came; the step was finished and saved. Start the same command again.

    An unexpected error ends with 1, as Python does. A second SIGTERM ends at once with 143.

    >>> int(ExitCode.PREEMPTED)
    75
    """

    FINISHED = 0
    USAGE = 2
    CHECKPOINTS = 65
    NON_FINITE = 70
    OUT_OF_MEMORY = 71
    PREEMPTED = 75


# Ends that the same command would come to again.
FINAL = frozenset(set(ExitCode) - {ExitCode.FINISHED, ExitCode.PREEMPTED})
