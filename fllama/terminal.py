"""Output that nobody may read, and a place for sockets: what a program needs of the process that starts it."""

import os
import sys
import tempfile

LONGEST_TEMPORARY = 60  # characters: multiprocessing's sockets lie in it, and their paths may have 107


def open_missing_streams():
    """Give standard input, output and error that are closed (`>&-`) a file, before another file gets their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)


class Forgiving:
    """An output stream that goes on when nobody reads it any more, as behind `| head`."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.forget()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.forget()

    def forget(self):
        """Send all that follows, and what is still in the buffer, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def forgive_readers():
    """Let the process go on if nobody reads what it says."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Forgiving):
            setattr(sys, name, Forgiving(stream))


def shorten_temporary_folder():
    """Use /tmp if the path of the temporary folder is too long for sockets."""
    if len(tempfile.gettempdir()) > LONGEST_TEMPORARY and os.access("/tmp", os.W_OK):
        tempfile.tempdir = "/tmp"
