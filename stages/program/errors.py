"""Every error Docsmith raises on purpose. Each message is one line: where, what was found, what was expected, what to do."""


class DocsmithError(Exception):
    """Printed as one line with exit code 1; anything else is a bug and keeps its traceback."""

    exit_code = 1


class BadParams(DocsmithError):
    """params.yaml holds a setting that is unknown, missing or out of range."""


class BadRecord(DocsmithError):
    """A line of a .jsonl file is not the record it should be."""


class BadInput(DocsmithError):
    """A file or folder given by the user cannot be used."""


class BadModelFile(DocsmithError):
    """A model file or folder is missing, damaged or of a kind that is refused."""


class ServerFailed(DocsmithError):
    """An LLM server did not start, or stopped answering."""


class OutOfMemory(DocsmithError):
    """What was asked for does not fit into this machine's memory."""


class LimitBroken(DocsmithError):
    """A stage finished its work, and the result breaks a limit set in params.yaml."""


class Busy(DocsmithError):
    """Another run of the same stage is writing the same files."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
