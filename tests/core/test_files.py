"""Files that cannot be written: one sentence for each reason a person can mend, and everything else as it is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vaedist.core.errors import CannotWrite
from vaedist.core.files import disk_errors


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            errno.ENOSPC,
            r"no room to write the log in .* \(No space left on device; [\d.]+ MiB free\).*make room",
        ),
        (errno.EDQUOT, r"no room to write the log in .*Disk quota exceeded"),
        (errno.EFBIG, r"no room to write the log in .*File too large"),
        (errno.EROFS, r"cannot write the log in .*\(Read-only file system\).*make the folder writable"),
        (errno.EACCES, r"cannot write the log in .*\(Permission denied\)"),
        (errno.EPERM, r"cannot write the log in .*\(Operation not permitted\)"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(code: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match=message) as raised, disk_errors("the log", tmp_path):
        raise OSError(code, os.strerror(code))
    assert "checkpoints written before are intact" in str(raised.value)
    assert "run the same command again" in str(raised.value)


def test_any_other_error_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors("the log", tmp_path):
        (tmp_path / "nothing").read_bytes()
