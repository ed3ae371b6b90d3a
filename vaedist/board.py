"""`vaedist-board [RUNS]`: TensorBoard on a login node, for the one person who started it.

TensorBoard has no login, and every user of a shared machine can connect to its ports. So it listens on the loopback
address alone, on a port that the kernel chose, and answers only below a path of 128 random bits, which is printed and
never on a command line. This process serves everything: TensorBoard's faster data server would listen on a port of its
own without any such protection.
"""

from __future__ import annotations

from pathlib import Path

from vaedist.cli.parser import Parser
from vaedist.core.errors import EXIT_FINISHED, UserError, cli_command


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-board",
        description="Show the curves, pictures, latents and searches below a folder in TensorBoard, and print the "
        "address to open: here, and through ssh from one's own machine. Nobody else on a shared machine can open it. "
        "Ctrl-C ends it.",
    )
    parser.add_argument(
        "runs",
        metavar="RUNS",
        nargs="?",
        type=Path,
        default=Path("runs"),
        help="a run folder, a search, or a folder of such (default: runs)",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=0, help="default: one that is free, another one each time"
    )
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    folder: Path = arguments.runs
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the run folder, or the folder that holds runs")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port is {arguments.port}; give 0 (a free one) to 65535")

    import getpass
    import secrets
    import signal
    import socket
    import threading

    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: over.set())
    path = f"/{secrets.token_hex(16)}"
    port = _serve(folder, arguments.port, path)
    host = socket.gethostname()
    print(f"TensorBoard of {folder.absolute()}")
    print(f"open                        http://localhost:{port}{path}/")
    print(f"from your own machine first ssh -N -L {port}:localhost:{port} {getpass.getuser()}@{host}")
    print("Ctrl-C ends it", flush=True)
    over.wait()
    return EXIT_FINISHED


def _serve(folder: Path, port: int, path: str) -> int:
    """Start TensorBoard in threads of this process; the port."""
    import logging
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tensorboard import program
    from tensorboard.program import TensorBoardServerException

    # TensorBoard's own start line names the address without the path, and werkzeug logs every request.
    for name in ("tensorboard", "werkzeug"):
        logging.getLogger(name).setLevel(logging.ERROR)
    board = program.TensorBoard()
    options = {"logdir": str(folder), "host": "127.0.0.1", "port": str(port), "path_prefix": path}
    words = [f"--{name}={value}" for name, value in options.items()]
    board.configure(argv=["vaedist-board", *words, "--load_fast=false", "--reload_multifile=true"])
    try:
        address: str = board.launch()
    except TensorBoardServerException:
        raise UserError(f"port {port} of this machine is taken: give another --port, or none") from None
    return int(address.split("//", 1)[1].split("/", 1)[0].rpartition(":")[2])


if __name__ == "__main__":
    raise SystemExit(main())
