"""`vaedist-export RUN DIR`: a trained run as one folder to give away."""

from __future__ import annotations

from vaedist.cli.parser import Parser
from vaedist.cli.shared_options import add_run, add_verbosity, add_weights
from vaedist.core.errors import EXIT_FINISHED, cli_command


def build_parser() -> Parser:
    parser = Parser(
        prog="vaedist-export",
        description="Put a trained run's chosen weights into a new folder that others can use: with vaedist (every "
        "command opens it like a run, and init_from starts from it), with torch alone (encoder and decoder as programs "
        "of torch.export, checked against the run), or by name from a safetensors file. A model card says what it is; "
        "no path of this machine is in it.",
    )
    add_run(parser)
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    add_weights(parser)
    programs = parser.add_mutually_exclusive_group()
    programs.add_argument(
        "--no-programs",
        action="store_true",
        help="only what vaedist reads, and the model card: the smallest folder",
    )
    programs.add_argument(
        "--onnx",
        action="store_true",
        help="encoder and decoder as ONNX too (needs onnx, onnxscript and onnxruntime)",
    )
    parser.add_argument("--licence", metavar="TEXT", default="", help="of the weights, for the model card")
    parser.add_argument(
        "--data-licence", metavar="TEXT", default="", help="of the training images, for the model card"
    )
    add_verbosity(parser)
    return parser


@cli_command
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)

    from vaedist.inference.export.export_run import export_run

    folder = export_run(
        arguments.run,
        arguments.folder,
        weights=arguments.weights,
        programs=not arguments.no_programs,
        onnx=arguments.onnx,
        licence=arguments.licence,
        data_licence=arguments.data_licence,
    )
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not arguments.quiet:
            print(f"{path.stat().st_size:>12,} bytes  {path}")
    return EXIT_FINISHED


if __name__ == "__main__":
    raise SystemExit(main())
