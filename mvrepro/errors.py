"""Errors that a user can act on: one message, no traceback."""

import errno

LONGEST = 160  # characters of others' words within a message of ours


class UserError(Exception):
    """What was wrong, where, and what would be right. The command line prints it and exits with 1."""


def first_words(error: BaseException) -> str:
    """The first sentence of what a library says, which may go on for a page; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentence = lines[0].split(". ")[0] if lines else type(error).__name__
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST].rstrip()} …"


def explain_os_error(error: OSError, doing: str, *, clean: bool = False) -> UserError:
    """A full disk, an unwritable folder and the like, as one message that says what to do. clean: whether what was
    begun is gone again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "the disk is full: free some space and run the same command again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cure = "no permission to write there: make the folder writable and run the same command again"
    else:
        cure = f"{error.strerror or error}"
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"could not {doing}{where}: {cure}{'; nothing half-written was kept' if clean else ''}")
