"""NIfTI files and Analyze pairs: which way is up, how bright, whose they are, and what is wrong with bad ones."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vaedist.data.packing.pack import PackingConfig, pack
from vaedist.data.sources import ImageSource, Item, Problem, SourceSettings, detect, find
from vaedist.data.sources.volume import subjects_of


def opened(path: Path, name: str | None = None, **settings: object) -> ImageSource:
    return find(name or detect(path)).open_source(path, SourceSettings(**settings))  # type: ignore[arg-type]


def listed(source: ImageSource) -> tuple[list[Item], list[Problem]]:
    found = list(source.items())
    return [one for one in found if isinstance(one, Item)], [one for one in found if isinstance(one, Problem)]


def head_volume(seed: int = 0) -> np.ndarray:
    """(x, y, z) = (20, 24, 16): a ball of noise in air, brighter to the right, brightest to the front."""
    generator = np.random.Generator(np.random.PCG64(seed))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in (20, 24, 16)), indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.8
    return (inside * (500 + 100 * x + 300 * y + generator.normal(0, 5, x.shape))).astype(np.float32)


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_is_cut_into_axial_slices(tmp_path: Path, suffix: str) -> None:
    save_nifti(tmp_path / "in" / f"sub-07_T1w{suffix}", head_volume())
    assert detect(tmp_path / "in") == "volume"
    source = opened(tmp_path / "in", workspace=tmp_path)
    items, problems = listed(source)
    assert problems == []
    assert {item.subject for item in items} == {"sub-07"}
    assert items[0].key.startswith("sub-07_T1w_slice_")
    middle = next(item for item in items if item.key.endswith("_slice_8"))
    picture = source.load(middle).astype(float)
    assert picture.shape == (24, 20)
    # Front is up and brightest; the patient's right, the far end of x, is on the right and brighter.
    assert picture[4:10, 7:13].mean() > picture[14:20, 7:13].mean() + 30
    assert picture[10:14, 13:17].mean() > picture[10:14, 3:7].mean() + 10


def test_stored_orientation_does_not_matter(tmp_path: Path) -> None:
    data = head_volume()
    save_nifti(tmp_path / "a" / "one.nii", data)
    flipped = np.diag([-1.0, -1.0, 1.0, 1.0])
    flipped[:3, 3] = (19, 23, 0)
    save_nifti(tmp_path / "b" / "one.nii", data[::-1, ::-1], flipped)
    turned = np.eye(4)[[2, 0, 1, 3]]  # stored axes are (y, z, x)
    save_nifti(tmp_path / "c" / "one.nii", data.transpose(1, 2, 0), turned)
    pictures = []
    for name in "abc":
        source = opened(tmp_path / name, workspace=tmp_path / name)
        items, _ = listed(source)
        pictures.append(np.stack([source.load(item) for item in items]))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


def test_analyze_pairs_of_a_raw_oasis_disc(tmp_path: Path) -> None:
    for subject in ("OAS1_0001", "OAS1_0002"):
        folder = tmp_path / "disc1" / f"{subject}_MR1" / "PROCESSED" / "MPRAGE" / "T88_111"
        folder.mkdir(parents=True)
        data = (head_volume() * 2).astype(np.int16)
        for name in (f"{subject}_MR1_mpr_n4_anon_111_t88_masked_gfc", f"{subject}_MR1_mpr_n4_anon_sbj_111"):
            nibabel.save(nibabel.AnalyzeImage(data, np.eye(4)), folder / f"{name}.hdr")
    source = opened(tmp_path / "disc1", workspace=tmp_path)
    items, problems = listed(source)
    assert problems == []
    assert {item.subject for item in items} == {"OAS1_0001", "OAS1_0002"}
    assert all("t88_masked_gfc" in item.origin for item in items), "one version of each scan"
    assert source.load(items[0]).shape == (24, 20)
    assert all(len(item.key) <= 95 for item in items)
    chosen, _ = listed(opened(tmp_path / "disc1", workspace=tmp_path, match="*_sbj_111.hdr"))
    assert {item.subject for item in chosen} == {"OAS1_0001", "OAS1_0002"}
    assert all("sbj" in item.origin for item in chosen)


def test_intensities_are_scaled_per_volume_not_per_slice(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in" / "a.nii", head_volume() * np.linspace(0.5, 1, 16, dtype=np.float32))
    save_nifti(tmp_path / "in" / "b.nii", head_volume() * 1000)
    source = opened(tmp_path / "in", workspace=tmp_path)
    items, _ = listed(source)
    pictures = {item.key: source.load(item).astype(float) for item in items}
    assert pictures["a_slice_11"].mean() > 1.2 * pictures["a_slice_4"].mean(), "slices keep their ratio"
    assert 235 < pictures["b_slice_8"].max() <= 255


def test_long_voxels_make_square_pixels(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in" / "a.nii", head_volume(), np.diag([1.0, 2.0, 1.0, 1.0]))
    source = opened(tmp_path / "in", workspace=tmp_path)
    items, _ = listed(source)
    assert source.load(items[0]).shape == (48, 20)


def test_slice_range_and_axis(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in" / "a.nii", head_volume())
    items, _ = listed(opened(tmp_path / "in", workspace=tmp_path, slices=(0.25, 0.75)))
    assert [item.key for item in items] == [f"a_slice_{i}" for i in range(4, 12)]
    source = opened(tmp_path / "in", workspace=tmp_path, axis=0)
    items, _ = listed(source)
    assert source.load(items[0]).shape == (16, 24)


def test_bad_volumes_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_nifti(folder / "good.nii", head_volume())
    whole = (folder / "good.nii").read_bytes()
    (folder / "cut.nii").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii").touch()
    (folder / "text.nii").write_bytes(b"hello" * 100)
    save_nifti(folder / "constant.nii", np.ones((8, 8, 8), np.float32))
    save_nifti(folder / "film.nii", np.ones((8, 8, 8, 5), np.float32))
    save_nifti(folder / "nan.nii", np.full((8, 8, 8), np.nan, np.float32))
    huge = bytearray(whole)
    huge[42:48] = struct.pack("<hhh", 30000, 30000, 30000)
    (folder / "huge.nii").write_bytes(bytes(huge))
    items, problems = listed(opened(folder, workspace=tmp_path))
    assert {item.subject for item in items} == {"good"}
    told = {problem.origin: problem.reason for problem in problems}
    assert set(told) == {f"{n}.nii" for n in ("cut", "empty", "text", "constant", "film", "nan", "huge")}
    assert "three axes" in told["film.nii"]
    assert "constant" in told["constant.nii"]
    assert "--max-bytes" in told["huge.nii"]


def test_volumes_wait_in_a_private_folder(tmp_path: Path) -> None:
    save_nifti(tmp_path / "in" / "a.nii", head_volume())
    listed(opened(tmp_path / "in", workspace=tmp_path))
    assert (tmp_path / "volumes").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("paths", "subjects"),
    [
        # A folder for each patient, whatever the files are called.
        (["p1/T1.nii", "p1/T2.nii", "p2/T1.nii", "p2/T2.nii"], "p1 p1 p2 p2"),
        (["p1/p1_flair.nii.gz", "p1/p1_t1.nii.gz", "p2/p2_flair.nii.gz"], "p1 p1 p2"),
        (["raw/p1/a/T1.nii", "raw/p1/b/T1.nii", "raw/p2/a/T1.nii"], "p1 p1 p2"),
        (["p1/anat/T1.nii", "p1/anat/T2.nii", "p2/anat/T1.nii"], "p1 p1 p2"),
        (["train/p1/T1.nii", "train/p2/T1.nii", "test/p3/T1.nii"], "p1 p2 p3"),
        # A folder for each contrast.
        (["T1/p1.nii", "T1/p2.nii", "T1/p3.nii", "T2/p1.nii", "T2/p2.nii", "T2/p3.nii"], "p1 p2 p3 p1 p2 p3"),
        # One folder for all.
        (["p1.nii", "p2.nii.gz", "p3.hdr"], "p1 p2 p3"),
        (["raw/p1.nii", "raw/p2.nii"], "p1 p2"),
        (["train/p1.nii", "test/p2.nii"], "p1 p2"),
        # Names that tell.
        (["sub-01/anat/sub-01_T1w.nii", "sub-02/anat/sub-02_T1w.nii"], "sub-01 sub-02"),
        (["disc1/OAS1_0001_MR1/x.hdr", "disc2/OAS1_0001_MR2/x.hdr"], "OAS1_0001 OAS1_0001"),
    ],
)
def test_scans_of_one_patient_are_one_subject(paths: list[str], subjects: str) -> None:
    found = subjects_of(paths)
    assert [found[path] for path in paths] == subjects.split()


def test_contrasts_of_one_patient_stay_in_one_split(tmp_path: Path) -> None:
    """Named as in many data sets, a folder for a patient and a file for a contrast: no head may be on both sides."""
    for patient in range(6):
        for number, contrast in enumerate(("t1", "t2")):
            save_nifti(
                tmp_path / "in" / f"P{patient}" / f"{contrast}.nii", head_volume(10 * patient + number)
            )
    index = pack(
        PackingConfig(
            str(tmp_path / "in"), tmp_path / "out", size=16, validation_fraction=0.2, test_fraction=0.2
        )
    ).index
    sides = [{split.subject(i) for i in range(split.count)} for split in index.splits.values()]
    assert len(sides) == 3 and sum(map(len, sides)) == 6
    assert set.union(*sides) == {f"P{patient}" for patient in range(6)}
