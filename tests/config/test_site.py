"""Site files: strict, every mistake one sentence, and nothing that could end a line of a batch script."""

from __future__ import annotations

from pathlib import Path

import pytest

from vaedist.config.site import Site, load_site, seconds
from vaedist.core.errors import UserError
from vaedist.slurm.script import cluster_folder

SITES = sorted((cluster_folder() / "sites").glob("*.yaml"))


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_site(path)


def test_the_shipped_sites_are_those_that_the_help_names() -> None:
    assert [path.stem for path in SITES] == ["conda", "example", "generic"]
    assert [load_site(path).name for path in SITES] == ["conda", "example", "generic"]


def test_the_example_explains_every_key(tmp_path: Path) -> None:
    text = (cluster_folder() / "sites" / "example.yaml").read_text()
    missing = [name for name in Site.model_fields if f"\n{name}:" not in f"\n{text}"]
    assert missing == ["container"], (
        "a container excludes what else the example shows; vaedist.def tells of it"
    )


def test_a_file_names_its_site_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert site(tmp_path, "partition: gpu").name == "mine"
    assert site(tmp_path, "name: other").name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "did you mean 'partition'"),
        ("time: 12:00:00", "write it in quotes"),
        ("time: 90", "write it in quotes"),
        ("time: '1:2'", "is not a time"),
        ("time: '00:00:00'", "is not a time"),
        ("time: '00:60:00'", "is not a time"),
        ("{time: '10:00:00', time_max: '09:00:00'}", "longer than time_max"),
        ("gpu_syntax: gres", "needs gpus_per_node"),
        ("{gpu_syntax: typed, gpus_per_node: 1}", "needs gpu_type"),
        ("gpus_per_node: 1", "gpu_syntax: none asks for no GPU"),
        ("continue_by: hope", "continue_by"),
        ("mem: lots", "mem"),
        ("extra: ['-p high']", "is no option of sbatch"),
        ("extra: ['--signal=TERM@3']", "is set by vaedist"),
        ("extra: ['--output=/tmp/x']", "is set by vaedist"),
        ('partition: "a\\nb"', "line break"),
        ('account: "a\\rb"', "line break"),
        ('setup: ["true\\n#SBATCH --array=0-999"]', "line break"),
        ('modules: ["cuda\\ngcc"]', "line break"),
        ('variables: {A: "x\\ny"}', "line break"),
        ("variables: {A: yes}", "write the text in quotes"),
        ("variables: {'A;id': x}", "no name of an environment variable"),
        ("name: '$(id)'", "name"),
        ("{container: x.sif, continue_by: resubmit}", "container"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        site(tmp_path, text)
    assert message in str(error.value)
    assert "mine.yaml: " in str(error.value)


def test_numbers_among_the_variables_are_text(tmp_path: Path) -> None:
    assert site(tmp_path, "variables: {A: 1, B: 2.5, C: x}").variables == {"A": "1", "B": "2.5", "C": "x"}


def test_seconds() -> None:
    assert [seconds(text) for text in ("00:00:01", "04:00:00", "100:00:00", "1-02:03:04")] == [
        1,
        14400,
        360000,
        93784,
    ]


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, []),
        ({"gpu_syntax": "gres", "gpus_per_node": 2}, [("gres", "gpu:2")]),
        ({"gpu_syntax": "typed", "gpus_per_node": 2, "gpu_type": "a100"}, [("gres", "gpu:a100:2")]),
        ({"gpu_syntax": "gpus_per_node", "gpus_per_node": 4}, [("gpus-per-node", "4")]),
        (
            {"gpu_syntax": "gpus_per_node", "gpus_per_node": 4, "gpu_type": "h100"},
            [("gpus-per-node", "h100:4")],
        ),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants(settings: dict[str, object], asked: list[object]) -> None:
    assert Site.model_validate(settings).gpu_options() == asked


def test_a_time_that_the_site_does_not_take_is_refused() -> None:
    here = Site(time="01:00:00", time_max="10:00:00")
    assert here.checked_time(None) == "01:00:00"
    assert here.checked_time("10:00:00") == "10:00:00"
    with pytest.raises(UserError, match="give 10:00:00 or less"):
        here.checked_time("10:00:01")
    with pytest.raises(UserError, match="--time: '5' is not a time"):
        here.checked_time("5")


def test_the_node_local_folder_is_named_on_the_node() -> None:
    here = Site(node_local="/tmp/$USER-${SLURM_JOB_ID}/x")
    assert here.node_local_folder({"USER": "ada", "SLURM_JOB_ID": "7"}) == "/tmp/ada-7/x"
    with pytest.raises(UserError, match=r"\$SLURM_JOB_ID is not set on this node"):
        here.node_local_folder({"USER": "ada"})
    assert Site().node_local_folder({}) is None


def test_settings_replace_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("partition: gpu\nmax_restarts: 3\n")
    assert load_site(path, ["partition=high"]).options()[0] == ("partition", "high")
