"""Files that are mapped into memory, which are checked before each use.

The system ends a program that reads a lost page of a mapped file (SIGBUS). A file that is replaced under its name keeps
its pages; only a file that is cut short or overwritten in place loses them.

So each file has a lease: another program that opens the file for writing, or cuts it short, waits until the lease is
given up, at most 45 seconds (/proc/sys/fs/lease-break-time). A use takes milliseconds, and the next check refuses the
file. Without a lease, a file that is cut short during a use ends the program; see `fcntl(2)` for who may have one.
"""

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

from specchat.closing import Closeable
from specchat.errors import CorruptCheckpointError
from specchat.models.checkpoint.json_file import fail_to_read
from specchat.models.checkpoint.safetensors import fail_truncated


class MappedFile(Closeable):
    """An open file that holds mapped bytes.

    Args:
        path: path of the file.
        end: bytes that the file must have, up to the end of the mapped ones.

    Raises:
        ModelError: the file cannot be opened.
    """

    def __init__(self, path: Path, end: int) -> None:
        self._path = path
        self._end = end
        try:
            self._file = path.open("rb", buffering=0)  # closes itself when it is dropped after an error
        except OSError as error:
            fail_to_read(path, error)
        self._is_leased = self._is_wanted = False
        with suppress(OSError):  # somebody else's file, one that is written to now, or a network file system
            # Without another signal, the system would end the program. This one is ignored unless somebody handles it.
            fcntl.fcntl(self.descriptor, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            self._is_leased = True

    @property
    def descriptor(self) -> int:
        """Descriptor of the open file."""
        return self._file.fileno()

    def check(self) -> None:
        """Check that the mapped bytes are still in the file, and stay there during a use; takes a microsecond.

        Raises:
            CorruptCheckpointError: the file was cut short, or another program is about to write to it.
        """
        if self._is_leased and fcntl.fcntl(self.descriptor, fcntl.F_GETLEASE) != fcntl.F_RDLCK:
            self._is_leased, self._is_wanted = False, True
            with suppress(OSError):  # the system has already taken the lease away
                fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # the other program waits for this
        if self._is_wanted:
            raise CorruptCheckpointError(
                f"another program writes to {self._path}", hint="start again when nobody changes the model's files"
            )
        length = os.fstat(self.descriptor).st_size
        if length < self._end:
            fail_truncated(self._path, self._end, length)

    def close(self) -> None:
        """Close the file; the mapping lives as long as its tensors."""
        self._file.close()
