"""Errors that a user can mend, and the exit code that goes with it."""

from __future__ import annotations

import pytest

from vaedist.core import errors
from vaedist.core.errors import DataError, Diverged, NotDefined, UserError, cli_command, did_you_mean


@pytest.mark.parametrize(
    ("name", "valid", "message"),
    [
        ("vqave", ["vae", "vqvae"], "; did you mean 'vqvae'? Valid: vae, vqvae"),
        ("zzz", ["vae", "vqvae"], "; Valid: vae, vqvae"),
        ("x", [], "; Valid: (none)"),
        ("b", ["c", "b", "a"], "; did you mean 'b'? Valid: a, b, c"),
    ],
)
def test_did_you_mean(name: str, valid: list[str], message: str) -> None:
    assert did_you_mean(name, valid) == message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError, 2),
        (NotDefined, 2),
        (DataError, 3),
        (Diverged, 4),
        (errors.WorkerLost, 5),
        (errors.OutOfMemory, 5),
        (errors.CannotWrite, 6),
    ],
    ids=lambda one: str(one),
)
def test_a_user_error_is_one_line_and_its_exit_code(
    error: type[UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli_command
    def main(argv: list[str] | None = None) -> int:
        raise error("the shard train-000003.tar is missing; copy it back")

    assert main([]) == code
    message = capsys.readouterr().err
    assert message.endswith(": error: the shard train-000003.tar is missing; copy it back\n")
    assert message.count("\n") == 1


def test_the_exit_codes_are_the_documented_ones() -> None:
    table = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("| ")]
    documented = {int(line.split("|")[1]) for line in table if line.split("|")[1].strip().isdigit()}
    classes = [UserError, *UserError.__subclasses__()]
    ends = {errors.EXIT_FINISHED, 1, errors.EXIT_STOPPED, errors.EXIT_INTERRUPTED}
    assert documented == ends | {one.exit_code for one in classes}


def test_a_bug_keeps_its_traceback() -> None:
    @cli_command
    def main(argv: list[str] | None = None) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_cli_command_passes_its_code_and_arguments_through() -> None:
    @cli_command
    def main(argv: list[str] | None = None) -> int:
        return len(argv or [])

    assert main(["a", "b"]) == 2
    assert main() == 0


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    @cli_command
    def main(argv: list[str] | None = None) -> int:
        raise KeyboardInterrupt

    assert main([]) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")
